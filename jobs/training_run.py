"""What a run trains: its dialogues and frame tokens, its plan, and the notes by which it is known again."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import sys
from pathlib import Path

from tqdm import tqdm
from transformers import AutoConfig

from actors import checkpoint
from actors.causal_lm import causal_lm_folder, load_tokenizer
from actors.config import Config, ConfigError
from actors.dialogue import Template
from actors.remote import is_remote
from actors.vision import vision_fingerprint
from jobs.dataset import DatasetError, TrainingSet
from jobs.dialogue_files import has_dialogues, read_dialogues, to_line
from jobs.dialogues import DataConfig
from jobs.encode_frames import StoreConfig
from jobs.frame_store import FrameStore
from jobs.plan import Plan
from jobs.run_folder import RunFolder
from jobs.training_config import FREE, TrainingConfig

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
PLAN_FILE = "plan.json"


def portable(config: Config) -> Config:
    """The same settings with local paths made absolute: workers run in other folders."""
    sections = copy.deepcopy(config.sections)
    paths = {
        ("data", "folder"): config.section("data", DataConfig).folder,
        ("store", "folder"): config.section("store", StoreConfig).folder,
    }
    if not is_remote(folder := config.section("training", TrainingConfig).folder):
        paths["training", "folder"] = folder
    for key in ("llm", "vision", "checkpoint"):
        value = getattr(config.model, key)
        if value is not None and Path(value).exists():
            paths["model", key] = value
    for (section, key), path in paths.items():
        sections.setdefault(section, {})[key] = str(Path(path).absolute())
    return Config(sections, config.source)


def run_folder(config: Config) -> RunFolder:
    settings = config.section("training", TrainingConfig)
    return RunFolder(f"{settings.folder.rstrip('/')}/{settings.name}")


def load_data(config: Config, template: Template | None = None) -> TrainingSet:
    """The training dialogues with their frame tokens, checked against the model and each other."""
    return _load(config, "train", template)


def load_validation(config: Config, template: Template | None = None) -> TrainingSet:
    """The dialogues that are validated on. Raises DatasetError where there are none."""
    return _load(config, "validation", template)


def check_held_out(config: Config, data: TrainingSet) -> None:
    """Raises DatasetError where a video to validate on is trained on, now or before in `model.checkpoint`."""
    folder = Path(config.section("data", DataConfig).folder)
    if not has_dialogues(folder / "validation"):
        return
    held_out = {one.video_id: one.task for one in read_dialogues(folder / "validation") if one.num_frames}
    if both := sorted(held_out.keys() & set(data.video_ids())):
        task = next(one.task for one in data.dialogues if one.video_id == both[0])
        raise DatasetError(
            f"{len(both)} videos are in training and validation, such as {both[0]!r}, of which {task} is trained on, "
            f"{held_out[both[0]]} validated: make the splits in {folder} again with jobs.build_dialogues, "
            "from annotations that agree in them"
        )
    if config.model.checkpoint is None:
        return
    before = checkpoint.checkpoint_folder(config.model.checkpoint) / checkpoint.SETTINGS_FILE
    if before.is_file():
        seen = held_out.keys() & set(checkpoint.read_settings(before.parent).trained_videos)
        if both := sorted(seen):
            raise DatasetError(
                f"{len(both)} validation videos were trained on in model.checkpoint {config.model.checkpoint}, such as "
                f"{both[0]!r}: use the data.validation_fraction it was trained with"
            )


def _load(config: Config, split: str, template: Template | None) -> TrainingSet:
    settings = config.section("training", TrainingConfig)
    data = Path(config.section("data", DataConfig).folder)
    dialogues = read_dialogues(data / split)
    if not dialogues:
        advice = "annotations, or lower" if split == "train" else "more annotations, or raise"
        raise DatasetError(
            f"{data} has no {split} dialogues: give jobs.build_dialogues {advice} data.validation_fraction"
        )
    folder = config.section("store", StoreConfig).folder
    store = FrameStore.open(folder, expect_fingerprint=vision_fingerprint(config.model))
    llm = causal_lm_folder(config.model.llm)
    template = template or Template(load_tokenizer(llm), config.model.frames)
    return TrainingSet(dialogues, store, template, settings.objective, settings.max_tokens or max_positions(llm))


def max_positions(llm: Path) -> int | None:
    """Positions that the LLM in a folder was made for, where it says so."""
    positions = getattr(AutoConfig.from_pretrained(llm), "max_position_embeddings", None)
    return None if positions is None else int(positions)


def make_plan(config: Config, data: TrainingSet, folder: RunFolder) -> Plan:
    """The plan of a run, with the measurements kept in its folder where they are of the same dialogues."""
    settings = config.section("training", TrainingConfig)
    key = _measured_key(data)
    if folder.exists(PLAN_FILE) and (plan := Plan.from_json(folder.read(PLAN_FILE), key, settings)) is not None:
        return plan
    plan = measured_plan(data, settings)
    folder.write(PLAN_FILE, plan.to_json(key))
    return plan


def measured_plan(data: TrainingSet, settings: TrainingConfig) -> Plan:
    """The plan over `data`, every dialogue of which is rendered once."""
    shown = tqdm(range(len(data)), desc="measuring dialogues", disable=not sys.stderr.isatty())
    return Plan([data.measure(index) for index in shown], settings)


def keep_settings(config: Config, data: TrainingSet, folder: RunFolder) -> None:
    """Note what a run trains, so that nothing else goes on under its name. Raises ConfigError."""
    now = {
        "model": config.model.model_dump(mode="json"),
        "training": config.section("training", TrainingConfig).model_dump(mode="json", exclude=FREE),
        "frames": data.store.info.model_dump(mode="json"),
        "dialogues": {"count": len(data), "sha256": _dialogues_key(data)},
    }
    if folder.exists(SETTINGS_FILE):
        before = json.loads(folder.read(SETTINGS_FILE))
        for section, key in ((section, key) for section, values in now.items() for key in values):
            old, new = before.get(section, {}).get(key), now[section][key]
            if old != new:
                raise ConfigError(
                    f"the run in {folder} was started with {section}.{key} {old}, now it is {new}: "
                    "give another training.name, or remove that folder"
                )
        logger.info("run=%s goes on where it stopped", folder)
        return
    folder.write(SETTINGS_FILE, json.dumps(now, indent=2) + "\n")


def _measured_key(data: TrainingSet) -> str:
    template = data.template
    asked = f"{data.objective} {data.max_tokens} {template.frames} {template.eos_id} {template.plain.largest_id}"
    return hashlib.sha256(f"{_dialogues_key(data)} {asked}".encode()).hexdigest()


def _dialogues_key(data: TrainingSet) -> str:
    lines = "".join(to_line(dialogue) for dialogue in data.dialogues)
    return hashlib.sha256(lines.encode()).hexdigest()

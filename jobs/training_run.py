"""What a run trains: its dialogues and frame tokens, its plan, and the notes by which it is known again."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from pathlib import Path

from transformers import AutoConfig

from actors.causal_lm import causal_lm_folder, load_tokenizer
from actors.config import Config, ConfigError
from actors.dialogue import Template
from actors.vision import vision_fingerprint
from jobs.dataset import TrainingSet
from jobs.dialogue_files import read_dialogues, to_line
from jobs.dialogues import DataConfig
from jobs.encode_frames import StoreConfig
from jobs.frame_store import FrameStore
from jobs.plan import Plan
from jobs.training_config import FREE, TrainingConfig

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
PLAN_FILE = "plan.json"


def portable(config: Config) -> Config:
    """The same settings with local paths made absolute: workers run in other folders."""
    sections = copy.deepcopy(config.sections)
    paths = {
        ("training", "folder"): config.section("training", TrainingConfig).folder,
        ("data", "folder"): config.section("data", DataConfig).folder,
        ("store", "folder"): config.section("store", StoreConfig).folder,
    }
    for key in ("llm", "vision", "checkpoint"):
        value = getattr(config.model, key)
        if value is not None and Path(value).exists():
            paths["model", key] = value
    for (section, key), path in paths.items():
        sections.setdefault(section, {})[key] = str(Path(path).absolute())
    return Config(sections, config.source)


def run_folder(config: Config) -> Path:
    settings = config.section("training", TrainingConfig)
    return Path(settings.folder) / settings.name


def load_data(config: Config, template: Template | None = None) -> TrainingSet:
    """The training dialogues with their frame tokens, checked against the model and each other."""
    settings = config.section("training", TrainingConfig)
    dialogues = read_dialogues(Path(config.section("data", DataConfig).folder) / "train")
    folder = config.section("store", StoreConfig).folder
    store = FrameStore.open(folder, expect_fingerprint=vision_fingerprint(config.model))
    llm = causal_lm_folder(config.model.llm)
    template = template or Template(load_tokenizer(llm), config.model.frames)
    return TrainingSet(dialogues, store, template, settings.objective, settings.max_tokens or max_positions(llm))


def max_positions(llm: Path) -> int | None:
    """Positions that the LLM in a folder was made for, where it says so."""
    positions = getattr(AutoConfig.from_pretrained(llm), "max_position_embeddings", None)
    return None if positions is None else int(positions)


def make_plan(config: Config, data: TrainingSet, file: Path) -> Plan:
    """The plan of a run, with the measurements kept in `file` where they are of the same dialogues."""
    settings = config.section("training", TrainingConfig)
    key = _measured_key(data)
    if file.is_file() and (plan := Plan.from_json(file.read_text(), key, settings)) is not None:
        return plan
    plan = Plan([data.measure(index) for index in range(len(data))], settings)
    file.parent.mkdir(parents=True, exist_ok=True)
    _write(file, plan.to_json(key))
    return plan


def keep_settings(config: Config, data: TrainingSet, file: Path) -> None:
    """Note what a run trains, so that nothing else goes on under its name. Raises ConfigError."""
    now = {
        "model": config.model.model_dump(mode="json"),
        "training": config.section("training", TrainingConfig).model_dump(mode="json", exclude=FREE),
        "frames": data.store.info.model_dump(mode="json"),
        "dialogues": {"count": len(data), "sha256": _dialogues_key(data)},
    }
    if file.is_file():
        before = json.loads(file.read_text())
        for section, key in ((section, key) for section, values in now.items() for key in values):
            old, new = before.get(section, {}).get(key), now[section][key]
            if old != new:
                raise ConfigError(
                    f"the run in {file.parent} was started with {section}.{key} {old}, now it is {new}: "
                    "give another training.name, or remove that folder"
                )
        logger.info("run=%s goes on where it stopped", file.parent)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    _write(file, json.dumps(now, indent=2) + "\n")


def _measured_key(data: TrainingSet) -> str:
    template = data.template
    asked = f"{data.objective} {data.max_tokens} {template.frames} {template.eos_id} {template.plain.largest_id}"
    return hashlib.sha256(f"{_dialogues_key(data)} {asked}".encode()).hexdigest()


def _dialogues_key(data: TrainingSet) -> str:
    lines = "".join(to_line(dialogue) for dialogue in data.dialogues)
    return hashlib.sha256(lines.encode()).hexdigest()


def _write(file: Path, text: str) -> None:
    temporary = file.with_suffix(".part")
    temporary.write_text(text)
    temporary.replace(file)

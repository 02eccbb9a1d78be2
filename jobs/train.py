"""Fine-tune a video language model on streaming dialogues: LoRA on the LLM, the connector fully.

Needs the dialogues of jobs.build_dialogues and the frame tokens of jobs.encode_frames. The run's
files are in training.folder/training.name:

  checkpoint/     the trained model, ready to be served (model.checkpoint=...)
  metrics.jsonl   one line per step: loss, learning rate, tokens a second
  curves.png      the same as a picture
  steps/          checkpoints on the way; the same command again goes on from the last one

Workers are processes of Ray Train: one on a laptop's CPU, or one per GPU of a cluster.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

import ray.train
import ray.train.torch
import torch
from ray.actor import ActorHandle
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from actors import checkpoint
from actors.cache import CacheError, whole_folder
from actors.causal_lm import causal_lm_folder, load_tokenizer
from actors.config import Config, ConfigError, ModelConfig, Section
from actors.dialogue import Template
from actors.embedded import EmbeddedModelError
from actors.parts import CheckpointError
from actors.runtime import limit_threads, native_dtype
from actors.turns import DialogueError
from actors.vision import vision_fingerprint
from actors.weights import WeightsError
from jobs.cluster import connect, is_local
from jobs.dataset import DatasetError, TrainingSet
from jobs.dialogue_files import DialogueFileError, read_dialogues, to_line
from jobs.dialogues import DataConfig
from jobs.encode_frames import StoreConfig
from jobs.frame_store import FrameStore, StoreError
from jobs.learner import Learner, TrainingConfig, TrainingError
from jobs.program import run
from jobs.training_log import TrainingLog, plot_log

logger = logging.getLogger(__name__)

STATE_FILE = "learner.pt"  # beside a servable checkpoint: what only going on with the training needs
# Settings that do not change what is learned, so that a run may go on with others.
FREE = {
    "folder",
    "workers",
    "cpus_per_worker",
    "gpu",
    "threads",
    "forward_size",
    "checkpoint_every",
    "keep_checkpoints",
}


def train(config: Config) -> Path:
    """Run the training that `config` describes; returns the folder of the final checkpoint.

    Settings and files that do not fit together are refused before a worker starts.
    """
    config = portable(config)
    settings = config.section("training", TrainingConfig)
    settings.check()
    run_folder = Path(settings.folder) / settings.name
    template = Template(load_tokenizer(causal_lm_folder(config.model.llm)), config.model.frames)
    data = load_data(config, template)
    keep_settings(config, data, run_folder / "settings.json")
    steps = settings.num_steps(len(data))
    logger.info("run=%s dialogues=%d videos=%d steps=%d", run_folder, len(data), len(data.video_ids()), steps)
    connect()
    result = _trainer(config, settings, run_folder).fit()
    if result.checkpoint is None:
        raise TrainingError(f"the run in {run_folder} ended without a checkpoint: look at its metrics.jsonl")
    with result.checkpoint.as_directory() as folder, whole_folder(run_folder / "checkpoint") as part:
        shutil.copytree(folder, part, ignore=shutil.ignore_patterns(STATE_FILE, ".*"), dirs_exist_ok=True)
    plot_log(run_folder / "metrics.jsonl", run_folder / "curves.png")
    logger.info("trained: serve it with model.checkpoint=%s", run_folder / "checkpoint")
    return run_folder / "checkpoint"


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


def load_data(config: Config, template: Template) -> TrainingSet:
    """The training dialogues with their frame tokens, checked against the model and each other."""
    dialogues = read_dialogues(Path(config.section("data", DataConfig).folder) / "train")
    folder = config.section("store", StoreConfig).folder
    store = FrameStore.open(folder, expect_fingerprint=vision_fingerprint(config.model))
    return TrainingSet(dialogues, store, template, config.section("training", TrainingConfig).objective)


class _Trainer(TorchTrainer):
    """Ray's trainer, with Ctrl-C as everywhere and, on a cluster of our own, without an actor that is no use there."""

    def _register_sigint_handler(self, controller: ActorHandle[TrainController]) -> None:
        """Ray's would swallow the KeyboardInterrupt and exit with 0."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        """The cleaner tidies up after a program that died, where the cluster goes on without it.

        It needs Ray's dashboard, and complains every second where it finds none, or several clusters.
        """
        callbacks = super()._create_default_callbacks()
        return [c for c in callbacks if not (is_local() and isinstance(c, PlacementGroupCleanerCallback))]


def _trainer(config: Config, settings: TrainingConfig, run_folder: Path) -> _Trainer:
    if is_local():
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away
    resources = {"CPU": settings.cpus_per_worker} | ({"GPU": 1} if settings.gpu else {})
    return _Trainer(
        _work,
        train_loop_config={"sections": config.sections, "source": config.source},
        scaling_config=ScalingConfig(
            num_workers=settings.workers, use_gpu=settings.gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="steps",
            storage_path=str(run_folder),
            checkpoint_config=CheckpointConfig(num_to_keep=settings.keep_checkpoints),
            failure_config=FailureConfig(max_failures=settings.max_failures),
        ),
    )


def _work(parcel: dict) -> None:
    """One worker, from loading the model to the last step."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = Config(parcel["sections"], parcel["source"])
    settings = config.section("training", TrainingConfig)
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    limit_threads(settings.threads)
    device = ray.train.torch.get_device()
    loaded = _start(config.model, settings, device)
    module = ray.train.torch.prepare_model(loaded.model)
    data = load_data(config, loaded.template)
    learner = Learner(module, data, settings, rank, workers)
    if (saved := ray.train.get_checkpoint()) is not None:
        with saved.as_directory() as folder:
            learner.restore(Path(folder) / STATE_FILE)
    path = Path(settings.folder) / settings.name / "metrics.jsonl"
    log = TrainingLog(path, learner.step, learner.num_steps) if rank == 0 else None
    while learner.step < learner.num_steps:
        step = learner.take_step()
        if log is not None:
            log.add(step)
        if learner.step % settings.checkpoint_every == 0 or learner.step == learner.num_steps:
            _report({"step": learner.step, "loss": step.loss}, learner, loaded if rank == 0 else None)


def _start(model: ModelConfig, settings: TrainingConfig, device: torch.device) -> checkpoint.Loaded:
    """The model before its first step: new adapter and connector, or those of `model.checkpoint`."""
    dtype = native_dtype(getattr(torch, model.dtype), device)
    if model.checkpoint is None:
        return checkpoint.untrained(model, settings.seed, device, dtype, settings.adapter)
    loaded = checkpoint.load(model, device, dtype, merged=False)
    if loaded.adapter != settings.adapter:
        raise ConfigError(
            f"model.checkpoint {model.checkpoint} has the adapter {loaded.adapter}, training.adapter is "
            f"{settings.adapter}: make them equal to train it further"
        )
    return loaded


def _report(metrics: dict[str, float], learner: Learner, loaded: checkpoint.Loaded | None) -> None:
    """Hand a checkpoint to Ray Train; one worker writes it (`loaded`), all wait."""
    if loaded is None:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        checkpoint.save(folder, loaded, learner.data.video_ids())
        learner.save(folder / STATE_FILE)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def keep_settings(config: Config, data: TrainingSet, file: Path) -> None:
    """Note what a run trains, so that nothing else goes on under its name. Raises ConfigError."""
    lines = "".join(to_line(dialogue) for dialogue in data.dialogues)
    now = {
        "model": config.model.model_dump(mode="json"),
        "training": config.section("training", TrainingConfig).model_dump(mode="json", exclude=FREE),
        "frames": data.store.info.model_dump(mode="json"),
        "dialogues": {"count": len(data), "sha256": hashlib.sha256(lines.encode()).hexdigest()},
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
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(now, indent=2) + "\n")
    temporary.replace(file)


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "store": StoreConfig,
    "training": TrainingConfig,
}
USER_ERRORS = (
    CacheError,
    CheckpointError,
    DatasetError,
    DialogueError,
    DialogueFileError,
    EmbeddedModelError,
    StoreError,
    TrainingError,
    WeightsError,
)

if __name__ == "__main__":
    sys.exit(run(train, module="jobs.train", about=__doc__, sections=SECTIONS, user_errors=USER_ERRORS))

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
from actors.config import Config, ConfigError, ModelConfig, Section
from actors.embedded import EmbeddedModelError
from actors.parts import CheckpointError
from actors.runtime import limit_threads, native_dtype
from actors.turns import DialogueError
from actors.weights import WeightsError
from jobs.cluster import connect, is_local
from jobs.dataset import DatasetError
from jobs.dialogue_files import DialogueFileError
from jobs.dialogues import DataConfig
from jobs.encode_frames import StoreConfig
from jobs.frame_store import StoreError
from jobs.learner import Learner, TrainingError
from jobs.program import run
from jobs.training_config import TrainingConfig
from jobs.training_log import TrainingLog, plot_log
from jobs.training_run import PLAN_FILE, SETTINGS_FILE, keep_settings, load_data, make_plan, portable, run_folder

logger = logging.getLogger(__name__)

STATE_FILE = "learner.pt"  # beside a servable checkpoint: what only going on with the training needs


def train(config: Config) -> Path:
    """Run the training that `config` describes; returns the folder of the final checkpoint.

    Settings and files that do not fit together are refused before a worker starts.
    """
    config = portable(config)
    settings = config.section("training", TrainingConfig)
    settings.check()
    folder = run_folder(config)
    data = load_data(config)
    keep_settings(config, data, folder / SETTINGS_FILE)
    plan = make_plan(config, data, folder / PLAN_FILE)
    logger.info("run=%s dialogues=%d videos=%d steps=%d", folder, len(data), len(data.video_ids()), plan.num_steps)
    connect()
    result = _trainer(config, settings, folder).fit()
    if result.checkpoint is None:
        raise TrainingError(f"the run in {folder} ended without a checkpoint: look at its metrics.jsonl")
    with result.checkpoint.as_directory() as trained, whole_folder(folder / "checkpoint") as part:
        shutil.copytree(trained, part, ignore=shutil.ignore_patterns(STATE_FILE, ".*"), dirs_exist_ok=True)
    plot_log(folder / "metrics.jsonl", folder / "curves.png")
    logger.info("trained: serve it with model.checkpoint=%s", folder / "checkpoint")
    return folder / "checkpoint"


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


def _trainer(config: Config, settings: TrainingConfig, folder: Path) -> _Trainer:
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
            storage_path=str(folder),
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
    data = load_data(config, loaded.template)
    plan = make_plan(config, data, run_folder(config) / PLAN_FILE)
    learner = Learner(loaded.model, data, plan, settings, rank, workers)
    if (saved := ray.train.get_checkpoint()) is not None:
        with saved.as_directory() as folder:
            learner.restore(Path(folder) / STATE_FILE)
    log = TrainingLog(run_folder(config) / "metrics.jsonl", learner.step, learner.num_steps) if rank == 0 else None
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

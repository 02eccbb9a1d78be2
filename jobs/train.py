"""Fine-tune a video language model on streaming dialogues: LoRA on the LLM, the connector fully.

Needs the dialogues of jobs.build_dialogues and the frame tokens of jobs.encode_frames. The run's
files are in training.folder/training.name:

  checkpoint/     the trained model, ready to be served (model.checkpoint=...); best/ with training.keep_best
  metrics.jsonl   one line per step: losses, learning rate, tokens a second; and one per validation
  curves.png      the same as a picture, and tensorboard/ for TensorBoard
  steps/          checkpoints on the way; the same command again goes on from the last one

Workers are processes of Ray Train: one on a laptop's CPU, or one per GPU of a cluster. With --dry-run it
prints the plan, and what memory and time it needs, and loads no weights.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

import ray.train
from ray.actor import ActorHandle
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from actors import checkpoint
from actors.cache import CacheError, whole_folder
from actors.config import Config, ModelConfig, Section
from actors.embedded import EmbeddedModelError
from actors.parts import CheckpointError
from actors.remote import RemoteError
from actors.turns import DialogueError
from actors.weights import WeightsError
from jobs.cluster import connect, is_local
from jobs.dataset import DatasetError
from jobs.dialogue_files import DialogueFileError
from jobs.dialogues import DataConfig
from jobs.encode_frames import StoreConfig
from jobs.estimate import dry_run
from jobs.frame_store import StoreError
from jobs.learner import TrainingError
from jobs.program import run
from jobs.run_folder import RunFolder
from jobs.training_config import TrainingConfig
from jobs.training_log import METRICS_FILE, plot_log
from jobs.training_run import check_held_out, keep_settings, load_data, load_validation, make_plan, portable, run_folder
from jobs.training_worker import FAILURE_FILE, STATE_FILE, score_name, work
from jobs.validation import Validation

logger = logging.getLogger(__name__)


def train(config: Config) -> str | None:
    """Run the training that `config` describes; returns the address of the final checkpoint.

    Settings and files that do not fit together are refused before a worker starts. With `training.dry_run`
    nothing is trained and none is returned.
    """
    config = portable(config)
    settings = config.section("training", TrainingConfig)
    settings.check()
    if settings.dry_run:
        print(dry_run(config))
        return None
    folder = run_folder(config)
    with folder.alone():
        return _train(config, settings, folder)


def _train(config: Config, settings: TrainingConfig, folder: RunFolder) -> str:
    data = load_data(config)
    check_held_out(config, data)
    if settings.validate_every is not None:
        held_out = Validation(load_validation(config, data.template), settings.validation_dialogues, settings.seed)
        if held_out.idle:
            logger.warning("validation on %d dialogues; %d more teach nothing", held_out.dialogues, held_out.idle)
    keep_settings(config, data, folder)
    folder.remove(FAILURE_FILE)
    plan = make_plan(config, data, folder)
    logger.info("run=%s dialogues=%d videos=%d steps=%d", folder, len(data), len(data.video_ids()), plan.num_steps)
    if clipped := [one.clipped for one in plan.measured if one.clipped]:
        logger.warning(
            "clipped to %s positions: %d dialogues, %d positions of them", data.max_tokens, len(clipped), sum(clipped)
        )
    connect()
    result = _trainer(config, settings, folder).fit()
    if folder.exists(FAILURE_FILE):
        raise TrainingError(folder.read(FAILURE_FILE))
    if result.checkpoint is None:
        raise TrainingError(f"the run in {folder} ended without a checkpoint: look at its {METRICS_FILE}")
    _publish(result.checkpoint, folder, "checkpoint")
    if settings.keep_best is not None:
        best = result.get_best_checkpoint(score_name(settings.keep_best), mode="max")
        _publish(best or result.checkpoint, folder, "best")
    plot_log(folder)
    logger.info("trained: serve it with model.checkpoint=%s", folder.name("checkpoint"))
    return folder.name("checkpoint")


def _publish(saved: ray.train.Checkpoint, folder: RunFolder, name: str) -> None:
    """A checkpoint without what only training needs, whole or not at all."""
    ignored = shutil.ignore_patterns(STATE_FILE, ".*")
    with saved.as_directory() as trained:
        if folder.remote:
            with tempfile.TemporaryDirectory() as temporary:
                shutil.copytree(trained, temporary, ignore=ignored, dirs_exist_ok=True)
                folder.put(Path(temporary), name, last=checkpoint.SETTINGS_FILE)
            return
        with whole_folder(Path(folder.path) / name) as part:
            shutil.copytree(trained, part, ignore=ignored, dirs_exist_ok=True)


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


def _trainer(config: Config, settings: TrainingConfig, folder: RunFolder) -> _Trainer:
    if is_local():
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away
    resources = {"CPU": settings.cpus_per_worker} | ({"GPU": 1} if settings.gpu else {})
    path, files = folder.for_ray()
    return _Trainer(
        work,
        train_loop_config={"sections": config.sections, "source": config.source},
        scaling_config=ScalingConfig(
            num_workers=settings.workers, use_gpu=settings.gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="steps",
            storage_path=path,
            storage_filesystem=files,
            checkpoint_config=CheckpointConfig(
                num_to_keep=settings.keep_checkpoints,
                checkpoint_score_attribute=score_name(settings.keep_best) if settings.keep_best else None,
                checkpoint_score_order="max",
            ),
            failure_config=FailureConfig(max_failures=settings.max_failures),
        ),
    )


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
    RemoteError,
    StoreError,
    TrainingError,
    WeightsError,
)

FLAGS = {"--dry-run": "training.dry_run=true"}

if __name__ == "__main__":
    sys.exit(run(train, module="jobs.train", about=__doc__, sections=SECTIONS, user_errors=USER_ERRORS, flags=FLAGS))

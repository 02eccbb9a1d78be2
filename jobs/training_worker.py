"""One process of Ray Train, from loading the model to the last step.

It goes on from the checkpoint that Ray hands it, if there is one: after a failure, or in a run that was
stopped and started again.
"""

from __future__ import annotations

import logging
import math
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import ray.train
import ray.train.torch
import torch

from actors import checkpoint
from actors.config import Config, ConfigError, ModelConfig
from actors.runtime import limit_threads, native_dtype
from jobs.learner import Learner, TrainingError
from jobs.training_config import MORE_IS_BETTER, Metric, TrainingConfig
from jobs.training_log import TrainingLog
from jobs.training_run import load_data, load_validation, make_plan, run_folder
from jobs.validation import Validation

STATE_FILE = "learner.pt"  # beside a servable checkpoint: what only going on with the training needs
FAILURE_FILE = "failure.txt"  # why a run ended that would fail again in the same way


def work(parcel: dict) -> None:
    """Train the settings in `parcel` (its `sections` and `source`)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = Config(parcel["sections"], parcel["source"])
    settings = config.section("training", TrainingConfig)
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    limit_threads(settings.threads)
    device = ray.train.torch.get_device()
    loaded = start(config.model, settings, device)
    folder = run_folder(config)
    data = load_data(config, loaded.template)
    learner = Learner(loaded.model, data, make_plan(config, data, folder), settings, rank, workers)
    held_out = load_validation(config, loaded.template) if settings.validate_every else None
    validation = held_out and Validation(held_out, settings.validation_dialogues, settings.seed, rank, workers)
    if (saved := ray.train.get_checkpoint()) is not None:
        with saved.as_directory() as restored:
            learner.restore(Path(restored) / STATE_FILE)
    with ExitStack() as stack:
        log = stack.enter_context(TrainingLog(folder, learner.step, learner.num_steps)) if rank == 0 else None
        last = min(learner.num_steps, settings.stop_at or learner.num_steps)
        while learner.step < last:
            try:
                step = learner.take_step()
            except TrainingError as error:  # every worker's; trying again would end in the same way
                if rank == 0:
                    folder.write(FAILURE_FILE, str(error))
                return
            if log is not None:
                log.add(step)
            metrics: dict[str, float | None] = {"step": learner.step, "train_loss": step.loss}
            ended = learner.step == last
            validating = validation and (ended or learner.step % (settings.validate_every or 1) == 0)
            if validation and validating:
                found = validation.of(loaded.model)
                metrics |= found
                if log is not None:
                    log.add_validation(learner.step, found)
            if settings.keep_best is not None:
                metrics[score_name(settings.keep_best)] = score(metrics.get(settings.keep_best), settings.keep_best)
            if ended or validating or learner.step % settings.checkpoint_every == 0:
                if log is not None:
                    log.upload()
                _report(metrics, learner, loaded if rank == 0 else None)


def score_name(metric: Metric) -> str:
    """Under which Ray finds a checkpoint's score, the more the better: those of different metrics are not compared."""
    return f"score_{metric}"


def score(value: float | None, metric: Metric) -> float:
    """Of a checkpoint for its metric: one without a value of it, or with NaN, is worse than any.

    Always a number: Ray keeps scores as JSON, in which infinities become null, that a run which goes on stumbles over.
    """
    if value is None or not math.isfinite(value):
        return -sys.float_info.max
    return value if metric in MORE_IS_BETTER else -value


def start(model: ModelConfig, settings: TrainingConfig, device: torch.device | str) -> checkpoint.Loaded:
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


def _report(metrics: Mapping[str, float | None], learner: Learner, loaded: checkpoint.Loaded | None) -> None:
    """Hand a checkpoint to Ray Train; one worker writes it (`loaded`), all wait."""
    known = {name: value for name, value in metrics.items() if value is not None}
    if loaded is None:
        ray.train.report(known)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        checkpoint.save(folder, loaded, learner.data.video_ids())
        learner.save(folder / STATE_FILE)
        ray.train.report(known, checkpoint=ray.train.Checkpoint.from_directory(folder))

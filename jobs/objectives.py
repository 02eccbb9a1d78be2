"""Train by the paper's objective and by the two it is compared with, and grade all three alike.

The shape of its Table 1a at a small scale: the same start, dialogues, order and number of steps for each objective,
with several seeds, then the streaming metrics by teacher forcing on the validation split. A model of `per_frame` is
graded in its own form (jobs/per_frame.py). Every second validation dialogue chooses each model's threshold of
P(silent), the one with the best fluency, at which it is graded on the others. Training dialogues in which nothing is
said are left out: `interleaved` learns nothing from them. `objectives.folder` gets DATE-objectives.json, .md and .png.

Needs dialogues and frame tokens, as jobs.train does; docs/training.md makes up small ones, with which all takes nearly
two hours of one core.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Annotated

from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from actors import checkpoint
from actors.config import Config, ModelConfig, Section
from actors.model import VideoLLM
from actors.objective import Objective
from actors.runtime import limit_threads
from actors.turns import Assistant
from jobs.dataset import TrainingSet
from jobs.dialogues import DataConfig
from jobs.encode_frames import StoreConfig
from jobs.learner import Learner
from jobs.machine import cpu_name
from jobs.metrics import Forward, Reply, evaluate, forward_of, summarize
from jobs.objectives_report import ObjectivesReport, Outcome
from jobs.per_frame import PerFrameForward
from jobs.program import run
from jobs.train import USER_ERRORS
from jobs.training_config import TrainingConfig
from jobs.training_run import check_held_out, load_data, load_validation, measured_plan
from jobs.training_worker import start

logger = logging.getLogger(__name__)

THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
OBJECTIVES: tuple[Objective, ...] = ("per_frame", "interleaved", "streaming")


class ObjectivesConfig(Section):
    """What is compared."""

    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1, description="each trains every objective once")
    dialogues: int = Field(default=24, ge=1, description="of the validation split that are graded, at most")
    thresholds: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        default=THRESHOLDS, min_length=1, description="of P(silent), below which it speaks: each model has its best"
    )
    processes: int = Field(default=1, ge=1, description="runs at a time, of `training.threads` each")
    folder: str = Field(default="benchmarks", description="where the result goes")


def compare(config: Config) -> ObjectivesReport:
    """Train and grade everything, `processes` at a time; what is done so far is saved each time."""
    settings, training = config.section("objectives", ObjectivesConfig), config.section("training", TrainingConfig)
    report = ObjectivesReport(
        date=time.strftime("%Y-%m-%d"),
        processor=cpu_name(),
        model=config.model.llm,
        start=config.model.checkpoint or "untrained",
        data=config.section("data", DataConfig).folder,
        batch=training.batch_size,
        stream_weight=config.model.stream_loss_weight,
        outcomes=[],
    )
    wanted = [(objective, seed) for seed in settings.seeds for objective in OBJECTIVES]
    spawn = multiprocessing.get_context("spawn")  # a forked process would share this one's threads
    with ProcessPoolExecutor(settings.processes, spawn) as pool:
        runs = [pool.submit(train_and_grade, _of(config, *one), settings) for one in wanted]
        try:
            for done in as_completed(runs):
                outcome = done.result()
                logger.info("%s", outcome.line())
                report.outcomes.append(outcome)
                report.outcomes.sort(key=lambda one: (one.seed, OBJECTIVES.index(one.objective)))
                report.save(settings.folder)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    print(report.table())
    return report


def train_and_grade(config: Config, settings: ObjectivesConfig) -> Outcome:
    """One objective with one seed, in this process. Raises DatasetError where a graded video is trained on."""
    training = config.section("training", TrainingConfig)
    limit_threads(training.threads)
    loaded = start(config.model, training, "cpu")
    data = load_data(config, loaded.template)
    check_held_out(config, data)
    spoken = [
        one for one in data.dialogues if any(isinstance(turn, Assistant) and turn.learn for turn in one.conversation)
    ]
    silent, data.dialogues = len(data.dialogues) - len(spoken), spoken
    held_out = load_validation(_of(config, "streaming", training.seed), loaded.template)
    learner = Learner(loaded.model, data, measured_plan(data, training), training)
    began, losses, tokens = time.process_time(), [], 0
    shown = tqdm(
        range(learner.num_steps), desc=f"{training.objective} {training.seed}", disable=not sys.stderr.isatty()
    )
    for _ in shown:
        step = learner.take_step()
        losses.append(step.loss)
        tokens += step.tokens
    seconds = time.process_time() - began
    replies = graded(loaded, held_out, training.objective, settings)
    fps = held_out.store.info.fps
    chosen = {threshold: summarize(dialogues[::2], fps).fluency or 0.0 for threshold, dialogues in replies.items()}
    threshold = max(chosen, key=chosen.__getitem__)
    found = summarize(replies[threshold][1::2], fps)
    return Outcome(
        objective=training.objective,
        seed=training.seed,
        threshold=threshold,
        time_diff=found.time_diff,
        fluency=found.fluency,
        lm_ppl=found.lm_ppl,
        lm_correctness=found.lm_correctness,
        outcomes={str(name): count for name, count in found.outcomes.items()},
        dialogues=len(replies[threshold][1::2]),
        left_out=silent,
        positions=tokens,
        seconds=seconds,
        losses=losses,
    )


def graded(
    loaded: checkpoint.Loaded, data: TrainingSet, objective: Objective, settings: ObjectivesConfig
) -> dict[float, list[list[Reply]]]:
    """The replies of the first dialogues of `data`, which streams, whatever was learned; at each threshold."""
    model: VideoLLM = loaded.model.eval()
    forward = forward_of(model)
    if objective == "per_frame":
        forward = PerFrameForward(forward, loaded.template)
    replies: dict[float, list[list[Reply]]] = {threshold: [] for threshold in settings.thresholds}
    for index in range(min(len(data), settings.dialogues)):
        sample, once = data[index], _Once(forward)
        for threshold, graded_at in replies.items():
            graded_at.append(
                evaluate(once, loaded.template, sample.rendered, sample.frames, threshold, by_argmax=False)
            )
    return replies


class _Once:
    """A Forward that computes the same logits once."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._known: dict[tuple[bytes, bytes, int], Tensor] = {}

    def __call__(self, input_ids: Tensor, frames: Tensor, positions: Tensor) -> Tensor:
        asked = (input_ids.numpy().tobytes(), positions.numpy().tobytes(), len(frames))
        if asked not in self._known:
            self._known[asked] = self._forward(input_ids, frames, positions)
        return self._known[asked]


def _of(config: Config, objective: Objective, seed: int) -> Config:
    sections = copy.deepcopy(config.sections)
    sections.setdefault("training", {}).update({"objective": objective, "seed": seed})
    return Config(sections, config.source)


if __name__ == "__main__":
    sys.exit(
        run(
            compare,
            module="jobs.objectives",
            about=__doc__,
            example="configs/default_model.yaml data.folder=FOLDER store.folder=FOLDER",
            sections={
                "model": ModelConfig,
                "data": DataConfig,
                "store": StoreConfig,
                "training": TrainingConfig,
                "objectives": ObjectivesConfig,
            },
            user_errors=USER_ERRORS,
        )
    )

"""Grade a checkpoint on dialogues: single decisions, whole streams in which it hears itself, and answers.

Dialogues come from `evaluation.dialogues`, their frames from the store `store.folder`. Teacher-forced,
the four streaming metrics of the paper are computed in both modes (docs/metrics.md). Self-conditioned,
the frames and the user's turns of each dialogue go through the session and the engine that serve, and
what the model says of its own accord is graded beside controls, at the session's threshold and over
many; with `evaluation.live=true` also at the pace of a stream that goes on while the model computes.
`evaluation.streamingbench` and `evaluation.ovobench` ask the questions of those two in streams.
Dialogues of the offline benchmarks (COIN, Ego4D LTA) are answered and graded against their names.

With `evaluation.calibrate=true` the best of the thresholds is stored in the checkpoint: it is then what
serving, narration and later evaluations use that are given none. Do that on validation data.

The folder `evaluation.folder` gets `metrics.json`, `report.md` with its plots, and `predictions.jsonl`, a
line a dialogue. What was graded is kept in `finished.jsonl` as it comes: an evaluation that was stopped
goes on when it is started again. Videos that the checkpoint was trained on are refused; `--allow-seen`,
which is `evaluation.allow_seen=true`, grades them all the same, and the report says so.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from pydantic import Field

from actors.calibration import CALIBRATION_FILE, Calibration, write_calibration
from actors.config import Config, ConfigError, ModelConfig, Section
from actors.engine import EngineConfig, EngineError
from actors.messages import SessionSettings
from actors.parts import CheckpointError
from actors.session import SessionError
from actors.session_log import BusConfig
from actors.turns import DialogueError
from actors.weights import WeightsError
from jobs.annotations import AnnotationError, AnnotationsConfig, video_id
from jobs.coin import KINDS
from jobs.dataset import DatasetError
from jobs.dialogue_files import DialogueFileError, read_dialogues
from jobs.dialogues import DataConfig, Dialogue
from jobs.encode_frames import StoreConfig
from jobs.evaluation import Evaluation
from jobs.evaluation_plots import draw
from jobs.evaluation_report import Offline, Report, named, page
from jobs.event_metrics import EventsError
from jobs.finished import Finished, FinishedError, key_of
from jobs.frame_store import FrameStore, StoreError
from jobs.graded_events import grade_events
from jobs.grader import Deciding, Heard, Identity, Live, Pace
from jobs.grader_pool import graders
from jobs.offline_benchmarks import (
    GENERATION,
    SUBMISSION,
    Answered,
    BenchmarkError,
    categories_of,
    check,
    grade,
    is_offline,
    write_submission,
)
from jobs.online_benchmarks import Asked, OnlineBenchmarkError, Probed, read_all, score, streams_of
from jobs.program import run
from jobs.stream_groups import GradedStream, groups_of
from jobs.streams import play_of
from jobs.threshold_sweep import THRESHOLDS, Point, Sweep, best
from jobs.timing_metrics import Window

logger = logging.getLogger(__name__)

FINISHED = "finished.jsonl"
LTA_FORMATS = ("lta", "lta_test")


class EvaluationConfig(Section):
    """What is graded, and how."""

    dialogues: str | None = Field(
        default=None, description="a dialogue file, or a split; default: validation of data.folder"
    )
    folder: str = Field(default="runs/evaluation", description="where the results go, and what is needed to go on")
    allow_seen: bool = Field(default=False, description="grade videos the checkpoint was trained on, too")
    max_dialogues: int | None = Field(default=None, ge=1, description="evenly spread over all; default: all of them")
    workers: int | None = Field(
        default=None,
        ge=0,
        description="actors of a Ray cluster that share the dialogues, 0 for this process alone; "
        "default: 0, and in a submitted job as many as fit",
    )
    at_once: int = Field(default=4, ge=1, description="streams that share an engine")
    before_s: float = Field(default=1.0, ge=0, description="how much earlier than its label a response may come")
    after_s: float = Field(default=3.0, ge=0, description="how much later")
    interval_s: float = Field(default=10.0, gt=0, description="of the control that speaks at a fixed interval")
    thresholds: tuple[float, ...] = Field(
        default=THRESHOLDS, description="tried for the curve of precision and recall; [] tries none"
    )
    live: bool = Field(default=False, description="also grade streams that go on while the model computes")
    calibrate: bool = Field(default=False, description="store the best of these thresholds in the checkpoint")
    streamingbench: tuple[str, ...] = Field(default=(), description="files questions_*.json of StreamingBench")
    ovobench: str | None = Field(default=None, description="the file ovo_bench_new.json of OVO-Bench")
    polled: bool = Field(default=False, description="each question of these two in a stream of its own")
    answer_tokens: int = Field(default=512, ge=1, description="the longest answer of an offline benchmark")


class EvaluationError(ValueError):
    """The dialogues cannot be graded with this checkpoint; says why."""


def run_evaluation(config: Config) -> Path:
    """Grade everything and write the folder; its path."""
    settings = config.section("evaluation", EvaluationConfig)
    _check(config, settings)
    source = settings.dialogues or str(Path(config.section("data", DataConfig).folder) / "validation")
    folder = Path(settings.folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / FINISHED).exists():
        raise ConfigError(f"{folder} holds something else than an evaluation: choose another evaluation.folder")
    online = read_all(settings.streamingbench, settings.ovobench)
    wanted = settings.dialogues is not None or not online
    everything = read_dialogues(source) if wanted else []
    if wanted and not everything:
        advice = "raise data.validation_fraction and run jobs.build_dialogues again, or set evaluation.dialogues"
        raise EvaluationError(f"{source} has no dialogues: {advice if settings.dialogues is None else 'give others'}")
    categories = categories_of(everything, _annotations(config, KINDS))
    seen = [one for one in everything if one.num_frames or not is_offline(one)]
    if blind := len(everything) - len(seen):
        logger.warning("left out %d of %d dialogues: data.max_frames cut them before any frame", blind, len(everything))
    if wanted and not seen:
        raise EvaluationError(f"no dialogue of {source} shows a frame: raise data.max_frames, and build them again")
    dialogues = _chosen(seen, settings.max_dialogues)
    check(dialogues, _annotations(config, LTA_FORMATS))
    with Finished(folder / FINISHED) as finished:
        pool = graders(config, settings.workers)
        identity = pool.identity()
        probed = _probed(config, online, settings.polled)
        refuse_seen([*dialogues, *(stream.dialogue for stream in probed)], identity, settings.allow_seen)
        dialogues = [dialogues[index] for index in pool.there(dialogues)] if dialogues else []
        evaluation = Evaluation(pool, finished, config, identity, settings.at_once)
        result = _grade(config, settings, identity, evaluation, dialogues, source, categories)
        result = replace(result, online=_online(config, evaluation, probed, result.threshold), left_out=blind)
    _write(folder, result)
    print((folder / "report.md").read_text())
    return folder


def refuse_seen(dialogues: Sequence[Dialogue], identity: Identity, allowed: bool) -> None:
    """Raises EvaluationError where the checkpoint was trained on a video, unless that is allowed."""
    seen = sorted({dialogue.video_id for dialogue in dialogues} & set(identity.trained_videos))
    if seen and not allowed:
        shown = ", ".join(seen[:3]) + (f" and {len(seen) - 3} more" if len(seen) > 3 else "")
        raise EvaluationError(
            f"the checkpoint was trained on {shown}: grade it on other videos, or give --allow-seen "
            "for numbers that do not tell how it does on new ones"
        )


def _grade(
    config: Config,
    settings: EvaluationConfig,
    identity: Identity,
    evaluation: Evaluation,
    dialogues: Sequence[Dialogue],
    source: str,
    categories: Mapping[str, Collection[str]],
) -> Report:
    session = config.section("session", SessionSettings).with_threshold_of(identity.threshold)
    window = Window(settings.before_s, settings.after_s)
    streamed = [dialogue for dialogue in dialogues if not is_offline(dialogue) and dialogue.num_frames]
    played = [play_of(dialogue) for dialogue in streamed]

    def play(indices: Sequence[int], threshold: float) -> Iterator[tuple[int, Heard]]:
        at = session.model_copy(update={"threshold": threshold})
        for number, heard in evaluation.heard([streamed[index] for index in indices], at):
            yield indices[number], heard

    sweep = Sweep(played, play)
    curve = sweep.curve(settings.thresholds, window) if streamed else []
    threshold, chosen_from = session.threshold, identity.calibrated_on
    if settings.calibrate and not streamed:
        raise EvaluationError(
            f"evaluation.calibrate chooses the threshold at which streams are best, but {source} has no stream: "
            "give evaluation.dialogues some, or leave evaluation.calibrate out"
        )
    if settings.calibrate:
        threshold, chosen_from = best(curve).threshold, "these dialogues"
        _calibrate(config, settings, identity, streamed, best(curve), source)
    elif "threshold" in config.section("session", SessionSettings).model_fields_set:
        chosen_from = None
    heard, _ = sweep.at(threshold)
    decided = evaluation.decided(streamed, Deciding(threshold=threshold, decide_by=session.decide_by))
    live: list[Live | None] = [None] * len(streamed)
    if settings.live:
        at = session.model_copy(update={"threshold": threshold})
        live = [*evaluation.live(streamed, Pace(settings=at, credits=config.section("bus", BusConfig).credits))]
    streams = [GradedStream(*parts) for parts in zip(played, heard, decided, live, strict=True)]
    answered = _answers(evaluation, [dialogue for dialogue in dialogues if is_offline(dialogue)], settings)
    return Report(
        model=config.model.checkpoint or f"{config.model.llm} without training",
        fingerprint=identity.fingerprint,
        dialogues=source,
        num_dialogues=len(dialogues),
        num_videos=len({dialogue.video_id for dialogue in dialogues}),
        seen_videos=sorted({dialogue.video_id for dialogue in dialogues} & set(identity.trained_videos)),
        num_trained=None if config.model.checkpoint is None else len(identity.trained_videos),
        fps=identity.fps,
        threshold=threshold,
        chosen_from=chosen_from,
        window=window,
        streams=streams,
        groups=groups_of(streams, window, settings.interval_s),
        events=grade_events(streams),
        curve=curve,
        offline=_offline(config, answered, categories),
        answered=answered,
        annotations=_annotations(config, LTA_FORMATS),
    )


def _calibrate(
    config: Config,
    settings: EvaluationConfig,
    identity: Identity,
    streamed: Sequence[Dialogue],
    point: Point,
    source: str,
) -> None:
    """Store the threshold in the checkpoint's folder."""
    if not point.timing.f1:
        raise EvaluationError(
            "at no threshold did the model say anything in time: nothing was stored in the checkpoint "
            f"({point.timing.labelled} labels, {point.timing.said} responses at {point.threshold:g})"
        )
    calibration = Calibration(
        fingerprint=identity.fingerprint,
        threshold=point.threshold,
        metric="temporal F1",
        value=round(point.timing.f1, 4),
        before_s=settings.before_s,
        after_s=settings.after_s,
        data=source,
        data_digest=key_of([dialogue.model_dump(mode="json") for dialogue in streamed]),
        num_dialogues=len(streamed),
        fps=identity.fps,
    )
    folder = Path(str(config.model.checkpoint))
    write_calibration(folder, calibration)
    logger.info("threshold=%g f1=%.3f stored in %s", point.threshold, point.timing.f1, folder / CALIBRATION_FILE)


def _probed(config: Config, asked: Sequence[Asked], polled: bool) -> list[Probed]:
    """The streams of online benchmarks. Raises OnlineBenchmarkError where none of their videos was encoded."""
    if not asked:
        return []
    store = FrameStore.open(config.section("store", StoreConfig).folder)
    names = {video_id(one.video) for one in asked}
    counts = {name: store.num_frames(name) for name in names if name in store}
    if not counts:
        raise OnlineBenchmarkError(
            f"none of the {len(names)} videos of the benchmark is in {store.path}: run jobs.encode_frames with "
            "store.videos naming their folder"
        )
    if len(counts) < len(names):
        logger.warning("left out, not in the frame-token store: %d of %d videos", len(names) - len(counts), len(names))
    return streams_of(asked, counts, store.info.fps, config.model.system_prompt, polled)


def _online(
    config: Config, evaluation: Evaluation, probed: Sequence[Probed], threshold: float
) -> dict[str, dict[str, float]]:
    session = config.section("session", SessionSettings).model_copy(update={"threshold": threshold})
    heard = dict(evaluation.heard([stream.dialogue for stream in probed], session))
    return score(probed, [heard[index] for index in range(len(probed))])


def _answers(evaluation: Evaluation, dialogues: Sequence[Dialogue], settings: EvaluationConfig) -> list[Answered]:
    answered = []
    for task in sorted({dialogue.task for dialogue in dialogues}):
        asked = [dialogue for dialogue in dialogues if dialogue.task == task]
        generation = GENERATION[task].model_copy(update={"max_tokens": settings.answer_tokens})
        texts = evaluation.answers(asked, generation)
        answered += [Answered(dialogue, beams) for dialogue, beams in zip(asked, texts, strict=True)]
    return answered


def _offline(
    config: Config, answered: Sequence[Answered], categories: Mapping[str, Collection[str]]
) -> dict[str, Offline]:
    graded = {}
    for task in sorted({one.dialogue.task for one in answered}):
        ones = [one for one in answered if one.dialogue.task == task]
        names = categories.get(task, ())
        values = grade(task, ones, _annotations(config, LTA_FORMATS), names)
        graded[task] = Offline(len(ones), values, len(names))
    return graded


def _annotations(config: Config, formats: Collection[str]) -> Path | None:
    """The folder of the first dataset that has one of these formats."""
    datasets = config.section("annotations", AnnotationsConfig).datasets
    paths = [dataset.path for dataset in datasets.values() if dataset.format in formats]
    return Path(paths[0]) if paths else None


def _chosen(dialogues: Sequence[Dialogue], most: int | None) -> list[Dialogue]:
    if most is None or most >= len(dialogues):
        return list(dialogues)
    return [dialogues[index * len(dialogues) // most] for index in range(most)]


def _check(config: Config, settings: EvaluationConfig) -> None:
    """Raises ConfigError for what would fail at the end only."""
    if not settings.calibrate:
        return
    if not Path(config.model.checkpoint or "").is_dir() or config.model.checkpoint is None:
        raise ConfigError(
            f"evaluation.calibrate stores the threshold in model.checkpoint, which is {config.model.checkpoint!r}: "
            "give the folder of a checkpoint"
        )
    if "threshold" in config.section("session", SessionSettings).model_fields_set:
        raise ConfigError("session.threshold is given, but evaluation.calibrate chooses one: leave one of them out")
    if not settings.thresholds:
        raise ConfigError("evaluation.thresholds is empty, but evaluation.calibrate chooses among them: leave it out")


def _write(folder: Path, result: Report) -> None:
    rows: list[dict[str, object]] = []
    for stream in result.streams:
        row: dict[str, object] = {
            "dialogue_id": stream.played.dialogue.dialogue_id,
            "task": stream.played.dialogue.task,
            "video_id": stream.played.dialogue.video_id,
            "labels": [{"time": label.time, "text": label.text} for label in stream.played.labels],
            "said": [asdict(turn) for turn in stream.heard.said],
            "p_silent": [round(p, 4) for p in stream.heard.p_silent],
            "live": None if stream.live is None else asdict(stream.live),
            "timing": named(stream.timing(result.window)),
            "replies": [
                {"outcome": r.outcome, "frame_diff": r.frame_diff, "fluency": r.fluency, "lm_ppl": r.lm_ppl}
                for r in stream.decided.replies["strict"]
            ],
        }
        rows.append(row)
    for one in result.answered:
        dialogue = one.dialogue
        rows.append(
            {
                "dialogue_id": dialogue.dialogue_id,
                "task": dialogue.task,
                "video_id": dialogue.video_id,
                "labels": list(dialogue.labels),
                "answers": one.texts,
            }
        )
    write_submission(result.answered, result.annotations, folder / SUBMISSION)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    plots = draw(result, folder)
    (folder / "report.md").write_text(page(result, plots))
    (folder / "metrics.json").write_text(json.dumps(result.values(), indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    return run(
        run_evaluation,
        module="jobs.evaluate",
        about=__doc__,
        example="configs/embedded.yaml evaluation.dialogues=held_out.jsonl",
        sections={
            "model": ModelConfig,
            "evaluation": EvaluationConfig,
            "session": SessionSettings,
            "engine": EngineConfig,
            "annotations": AnnotationsConfig,
            "data": DataConfig,
            "store": StoreConfig,
        },
        user_errors=(
            AnnotationError,
            BenchmarkError,
            CheckpointError,
            DatasetError,
            DialogueError,
            DialogueFileError,
            EngineError,
            EvaluationError,
            EventsError,
            FinishedError,
            OnlineBenchmarkError,
            SessionError,
            StoreError,
            WeightsError,
        ),
        argv=arguments,
        flags={"--allow-seen": "evaluation.allow_seen=true"},
    )


if __name__ == "__main__":
    sys.exit(main())

"""Grade a checkpoint on dialogues: every decision by itself, and whole streams in which it hears itself.

Dialogues come from `evaluation.dialogues`, their frames from the store `store.folder`. Teacher-forced,
the four streaming metrics of the paper are computed in both modes (docs/metrics.md). Self-conditioned,
the frames and the user's turns of each dialogue go through the session and the engine that serve, and
what the model says of its own accord is graded by its time, beside controls (docs/evaluation.md).

The folder `evaluation.folder` gets `metrics.json`, `report.md` and `predictions.jsonl`, a line a
dialogue. Videos that the checkpoint was trained on are refused; `--allow-seen`, which is
`evaluation.allow_seen=true`, grades them all the same, and the report says so.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from pydantic import Field
from tqdm import tqdm

from actors.backends import build_engine, load_model
from actors.cache import whole_folder
from actors.checkpoint import Loaded
from actors.config import Config, ConfigError, ModelConfig, Section
from actors.engine import Engine, EngineConfig
from actors.messages import SessionSettings
from actors.parts import CheckpointError
from actors.runtime import limit_threads
from actors.session import SessionError
from actors.turns import Assistant, DialogueError, Stream, System, User
from actors.weights import WeightsError
from jobs.annotations import Moment
from jobs.controls import (
    Control,
    LabelledStream,
    always_silent,
    always_speak,
    change_detector,
    fit_change_detector,
    fixed_interval,
    grade,
    oracle,
)
from jobs.dataset import DatasetError, TrainingSet
from jobs.dialogue_files import DialogueFileError, read_dialogues
from jobs.dialogues import DataConfig, Dialogue
from jobs.encode_frames import StoreConfig
from jobs.evaluation_report import Report, named, report
from jobs.frame_store import FrameStore, StoreError
from jobs.metrics import Mode, Reply, evaluate, forward_of, summarize
from jobs.program import run
from jobs.replay import FrameChunk, Question, Recording, Transcript, replay
from jobs.timing_metrics import Timing, Window, timing

logger = logging.getLogger(__name__)

MODES: tuple[Mode, ...] = ("strict", "paper")
CHUNK_FRAMES = 32


class EvaluationConfig(Section):
    """What is graded, and how."""

    dialogues: str | None = Field(
        default=None, description="a dialogue file, or a split; default: validation of data.folder"
    )
    folder: str = Field(default="runs/evaluation", description="where the results go; what was there is replaced")
    allow_seen: bool = Field(default=False, description="grade videos the checkpoint was trained on, too")
    before_s: float = Field(default=1.0, ge=0, description="how much earlier than its label a response may come")
    after_s: float = Field(default=3.0, ge=0, description="how much later")
    interval_s: float = Field(default=10.0, gt=0, description="of the control that speaks at a fixed interval")
    at_once: int = Field(default=4, ge=1, description="streams that share the engine")


class EvaluationError(ValueError):
    """The dialogues cannot be graded with this checkpoint; says why."""


@dataclass(frozen=True)
class Played:
    """A dialogue as a stream: the user's turns, what is labelled between them, and its frames."""

    dialogue: Dialogue
    questions: list[Question]
    stream: LabelledStream


def run_evaluation(config: Config) -> Path:
    """Grade everything and write the folder; its path."""
    settings, session = config.section("evaluation", EvaluationConfig), config.section("session", SessionSettings)
    source = settings.dialogues or str(Path(config.section("data", DataConfig).folder) / "validation")
    folder = Path(settings.folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "metrics.json").exists():
        raise ConfigError(f"{folder} holds something else than an evaluation: choose another evaluation.folder")
    dialogues = read_dialogues(source)
    loaded = load_model(config)
    refuse_seen(dialogues, loaded, settings.allow_seen)
    store = FrameStore.open(config.section("store", StoreConfig).folder, expect_fingerprint=loaded.features)
    data = TrainingSet(dialogues, store, loaded.template)
    limit_threads(config.section("engine", EngineConfig).threads)
    # Before the engine is built, which takes over the model's attention.
    replies = {mode: teacher_forced(loaded, data, session.threshold, mode) for mode in MODES}
    played = [play_of(dialogue, store) for dialogue in data.dialogues]
    engine = build_engine(loaded.model, loaded.template, config.section("engine", EngineConfig))
    transcripts = self_conditioned(engine, played, session, settings.at_once)
    window = Window(settings.before_s, settings.after_s)
    timings = [_timing(item, transcripts[item.dialogue.dialogue_id], window) for item in played]
    streams = [item.stream for item in played]
    controls = {name: grade(control, streams, window) for name, control in _controls(streams, window, settings).items()}
    result = Report(
        model=config.model.checkpoint or f"{config.model.llm} without training",
        fingerprint=loaded.fingerprint,
        dialogues=source,
        num_dialogues=len(played),
        num_videos=len(data.video_ids()),
        seen_videos=sorted(set(data.video_ids()) & set(loaded.trained_videos)),
        fps=store.info.fps,
        threshold=session.threshold,
        window=window,
        teacher_forced={mode: summarize(replies[mode], store.info.fps, mode) for mode in MODES},
        self_conditioned=sum(timings, start=Timing()),
        controls=controls,
    )
    with whole_folder(folder) as part:
        (part / "metrics.json").write_text(json.dumps(result.values(), indent=2) + "\n")
        (part / "report.md").write_text(report(result))
        with (part / "predictions.jsonl").open("w") as lines:
            for item, graded, timed in zip(played, replies["strict"], timings, strict=True):
                row = _prediction(item, transcripts[item.dialogue.dialogue_id], graded, timed)
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    print((folder / "report.md").read_text())
    return folder


def refuse_seen(dialogues: Sequence[Dialogue], loaded: Loaded, allowed: bool) -> None:
    """Raises EvaluationError where the checkpoint was trained on a video, unless that is allowed."""
    seen = sorted({dialogue.video_id for dialogue in dialogues} & set(loaded.trained_videos))
    if seen and not allowed:
        shown = ", ".join(seen[:3]) + (f" and {len(seen) - 3} more" if len(seen) > 3 else "")
        raise EvaluationError(
            f"the checkpoint was trained on {shown}: grade it on other videos, or give --allow-seen "
            "for numbers that do not tell how it does on new ones"
        )


def teacher_forced(loaded: Loaded, data: TrainingSet, threshold: float, mode: Mode) -> list[list[Reply]]:
    """The graded replies of every dialogue."""
    forward = forward_of(loaded.model)
    indices = tqdm(range(len(data)), desc=f"teacher-forced, {mode}", disable=None, file=sys.stderr)
    samples = (data[index] for index in indices)
    return [evaluate(forward, loaded.template, sample.rendered, sample.frames, threshold, mode) for sample in samples]


def play_of(dialogue: Dialogue, store: FrameStore) -> Played:
    """The turns of a dialogue at their times; time 0 is its first frame.

    An answer to the user comes when the user asks: only what the assistant says of its own accord is a label.
    """
    shown = 0
    questions: list[Question] = []
    labels: list[Moment] = []
    turns = [turn for turn in dialogue.conversation if not isinstance(turn, Stream) or turn.num_frames]
    for before, turn in pairwise([System(content=""), *turns]):
        time = max(shown - 1, 0) / dialogue.fps
        match turn:
            case Stream():
                shown += turn.num_frames
            case User():
                questions.append(Question(turn.content, time))
            case Assistant() if not isinstance(before, User):
                labels.append(Moment(time=time, text=turn.content))
    times = [index / dialogue.fps for index in range(shown)]
    frames = store.frames(dialogue.video_id, *dialogue.frames)
    return Played(dialogue, questions, LabelledStream(times, frames, labels, shown / dialogue.fps))


def self_conditioned(
    engine: Engine, played: Sequence[Played], settings: SessionSettings, at_once: int = 1
) -> dict[str, Transcript]:
    """What the model says in each dialogue's stream, by dialogue id."""
    transcripts: dict[str, Transcript] = {}
    with tqdm(total=len(played), desc="self-conditioned", disable=None, file=sys.stderr) as bar:
        for transcript in replay(engine, [_recording(item, settings) for item in played], at_once):
            transcripts[transcript.name] = transcript
            bar.update()
    return transcripts


def _recording(item: Played, settings: SessionSettings) -> Recording:
    first = item.dialogue.conversation[0] if item.dialogue.conversation else None
    if isinstance(first, System) and settings.instructions is None:
        settings = settings.model_copy(update={"instructions": first.content})
    times, tokens = list(item.stream.times), item.stream.tokens
    starts = range(0, len(times), CHUNK_FRAMES)
    chunks = [FrameChunk(times[i : i + CHUNK_FRAMES], tokens[i : i + CHUNK_FRAMES]) for i in starts]
    return Recording(item.dialogue.dialogue_id, chunks, item.questions, settings)


def _timing(item: Played, transcript: Transcript, window: Window) -> Timing:
    said = [Moment(time=turn.time, text=turn.text) for turn in transcript.utterances if turn.question is None]
    return timing(said, item.stream.labels, item.stream.duration_s, window)


def _controls(streams: Sequence[LabelledStream], window: Window, settings: EvaluationConfig) -> dict[str, Control]:
    controls: dict[str, Control] = {
        "always silent": always_silent,
        "always speaking": always_speak,
        f"every {settings.interval_s:g} s": fixed_interval(settings.interval_s),
    }
    if any(len(stream.times) > 1 for stream in streams):
        controls["change of picture"] = change_detector(fit_change_detector(streams, window))
    return controls | {"oracle": oracle}


def _prediction(item: Played, transcript: Transcript, replies: Sequence[Reply], timed: Timing) -> dict[str, object]:
    return {
        "dialogue_id": item.dialogue.dialogue_id,
        "video_id": item.dialogue.video_id,
        "labels": [{"time": label.time, "text": label.text} for label in item.stream.labels],
        "said": [asdict(turn) for turn in transcript.utterances],
        "p_silent": [round(p, 4) for p in transcript.p_silent],
        "timing": named(timed),
        "replies": [
            {"outcome": reply.outcome, "frame_diff": reply.frame_diff, "fluency": reply.fluency, "lm_ppl": reply.lm_ppl}
            for reply in replies
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    return run(
        run_evaluation,
        module="jobs.evaluate",
        about=__doc__,
        sections={
            "model": ModelConfig,
            "evaluation": EvaluationConfig,
            "session": SessionSettings,
            "engine": EngineConfig,
            "data": DataConfig,
            "store": StoreConfig,
        },
        user_errors=(
            CheckpointError,
            DatasetError,
            DialogueError,
            DialogueFileError,
            EvaluationError,
            SessionError,
            StoreError,
            WeightsError,
        ),
        argv=["evaluation.allow_seen=true" if word == "--allow-seen" else word for word in given],
    )


if __name__ == "__main__":
    sys.exit(main())

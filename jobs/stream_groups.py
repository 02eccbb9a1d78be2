"""Graded streams added up, in all and by task, each group beside what a model has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from jobs.grader import MODES, Decided, Heard, Live
from jobs.metrics import Mode, StreamMetrics, summarize
from jobs.streams import Played
from jobs.threshold_sweep import timed
from jobs.timing_metrics import Timing, Window, moments_of, timing

ALL = "all streams"


@dataclass(frozen=True)
class GradedStream:
    """One dialogue's stream: what was to be said, what was heard, and every decision by itself.

    `live` is what was heard at the stream's pace, None where that was not asked for.
    """

    played: Played
    heard: Heard
    decided: Decided
    live: Live | None = None

    def timing(self, window: Window) -> Timing:
        """What was said of its own accord, graded."""
        return timed(self.played, self.heard, window)

    @property
    def labelled(self) -> LabelledStream:
        """What controls get to see."""
        return LabelledStream(self.played.times, self.decided.changes, self.played.labels, self.played.duration_s)


@dataclass(frozen=True)
class LiveTiming:
    """Streams that went on while the model computed: their timing, and how long after a frame its decision came."""

    timing: Timing
    lag_p50_s: float
    lag_p95_s: float
    decided: int
    dropped: int


@dataclass(frozen=True)
class Group:
    """Streams that are added up; `live` is None where their own pace was not asked for."""

    num_dialogues: int
    teacher_forced: dict[Mode, StreamMetrics]
    self_conditioned: Timing
    controls: dict[str, Timing]
    live: LiveTiming | None = None


def groups_of(streams: Sequence[GradedStream], window: Window, interval_s: float) -> dict[str, Group]:
    """All streams and, where there are several tasks, those of each; empty without a stream."""
    if not streams:
        return {}
    groups = {ALL: _group(streams, window, interval_s)}
    tasks = sorted({stream.played.dialogue.task for stream in streams})
    for task in tasks if len(tasks) > 1 else ():
        chosen = [stream for stream in streams if stream.played.dialogue.task == task]
        groups[task] = _group(chosen, window, interval_s)
    return groups


def _group(streams: Sequence[GradedStream], window: Window, interval_s: float) -> Group:
    labelled = [stream.labelled for stream in streams]
    fps = streams[0].played.dialogue.fps
    return Group(
        num_dialogues=len(streams),
        teacher_forced={
            mode: summarize([stream.decided.replies[mode] for stream in streams], fps, mode) for mode in MODES
        },
        self_conditioned=sum((stream.timing(window) for stream in streams), start=Timing()),
        controls={
            name: grade(control, labelled, window) for name, control in _controls(labelled, window, interval_s).items()
        },
        live=_live(streams, window),
    )


def _live(streams: Sequence[GradedStream], window: Window) -> LiveTiming | None:
    lives = [(stream.played, stream.live) for stream in streams if stream.live is not None]
    lags_s = sorted(lag for _, live in lives for lag in live.lags_s)
    if not lags_s:
        return None
    return LiveTiming(
        sum(
            (timing(moments_of(live.said), played.labels, played.duration_s, window) for played, live in lives),
            start=Timing(),
        ),
        lag_p50_s=lags_s[len(lags_s) // 2],
        lag_p95_s=lags_s[len(lags_s) * 95 // 100],
        decided=len(lags_s),
        dropped=sum(live.dropped for _, live in lives),
    )


def _controls(streams: Sequence[LabelledStream], window: Window, interval_s: float) -> dict[str, Control]:
    controls: dict[str, Control] = {
        "always silent": always_silent,
        "always speaking": always_speak,
        f"every {interval_s:g} s": fixed_interval(interval_s),
    }
    if any(len(stream.times) > 1 for stream in streams):
        controls["change of picture"] = change_detector(fit_change_detector(streams, window))
    return controls | {"oracle": oracle}

"""What a model has to beat: ways to choose when to speak that understand nothing, and one that knows it all.

Every report has them beside the model, graded in the same way. A control gets a stream with its labels
and returns what it says; only the oracle looks at the labels.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from jobs.annotations import Moment
from jobs.timing_metrics import Timing, Window, timing

SENTENCE = "Something happens in the video."


@dataclass(frozen=True)
class LabelledStream:
    """A stream's frames and what should be said, in order of time.

    `changes` (F,) is how far each frame is from the one before, 0 for the first.
    """

    times: Sequence[float]
    changes: Sequence[float]
    labels: Sequence[Moment]
    duration_s: float


Control = Callable[[LabelledStream], list[Moment]]


def always_silent(stream: LabelledStream) -> list[Moment]:
    """Says nothing."""
    return []


def always_speak(stream: LabelledStream) -> list[Moment]:
    """Speaks at every frame."""
    return [_stock(time) for time in stream.times]


def oracle(stream: LabelledStream) -> list[Moment]:
    """Says the labels, each at the first frame at or after its time, or the last one."""
    return [
        Moment(time=stream.times[min(bisect_left(stream.times, label.time), len(stream.times) - 1)], text=label.text)
        for label in (stream.labels if stream.times else ())
    ]


def fixed_interval(seconds: float) -> Control:
    """Speaks at the first frame, then as soon as `seconds` have passed since it spoke."""

    def control(stream: LabelledStream) -> list[Moment]:
        said: list[Moment] = []
        for time in stream.times:
            if not said or time - said[-1].time >= seconds:
                said.append(_stock(time))
        return said

    return control


def change_detector(threshold: float) -> Control:
    """Speaks at the first frame, and at frames that are farther than `threshold` from the ones before."""

    def control(stream: LabelledStream) -> list[Moment]:
        first = [_stock(time) for time in stream.times[:1]]
        later = zip(stream.times[1:], stream.changes[1:], strict=True)
        return first + [_stock(time) for time, change in later if change > threshold]

    return control


def frame_changes(tokens: torch.Tensor) -> list[float]:
    """Cosine distance of each frame's tokens (F, N, D) to those of the frame before, mean over its tokens; first 0."""
    tokens = tokens.float()
    return [0.0, *(1 - F.cosine_similarity(tokens[1:], tokens[:-1], dim=-1).mean(-1)).tolist()][: len(tokens)]


def fit_change_detector(streams: Sequence[LabelledStream], window: Window, candidates: int = 32) -> float:
    """The threshold with the best F1 on `streams`, of those that let it speak up to four times as often as labelled."""
    changes = sorted((change for stream in streams for change in stream.changes[1:]), reverse=True)
    if not changes:
        raise ValueError("no stream has two frames: there is no change to detect")
    most = min(4 * sum(len(stream.labels) for stream in streams), len(changes) - 1)
    thresholds = [changes[round(rank * most / candidates)] for rank in range(candidates + 1)]
    return max(thresholds, key=lambda threshold: grade(change_detector(threshold), streams, window).f1 or 0.0)


def grade(control: Control, streams: Sequence[LabelledStream], window: Window) -> Timing:
    """A control's timing over all streams."""
    return sum(
        (timing(control(stream), stream.labels, stream.duration_s, window) for stream in streams), start=Timing()
    )


def _stock(time: float) -> Moment:
    return Moment(time=time, text=SENTENCE)

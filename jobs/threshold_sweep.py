"""Which threshold to speak at: whole streams at many thresholds, and the one that is best on them.

A session decides by comparing P(silent) with the threshold and nothing else, and up to the first frame at
which two thresholds decide differently its context is the same. What was heard at one threshold therefore
holds for every other that decides all its frames alike, and only streams in which one does not are run again:
where a model is sure of itself, ten thresholds cost little more than one. Thresholds are tried from low
to high, as long as one that speaks more can still be better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from jobs.grader import Heard
from jobs.streams import Played
from jobs.timing_metrics import Timing, Window, moments_of, timing

THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)

Play = Callable[[Sequence[int], float], Iterable[tuple[int, Heard]]]


@dataclass(frozen=True)
class Point:
    """All streams at one threshold; `runs` of them had to be run for it."""

    threshold: float
    timing: Timing
    runs: int


def holds_at(heard: Heard, threshold: float) -> bool:
    """Whether the same would surely have been heard at that threshold.

    At a frame where the model spoke although P(silent) was not below the threshold, silence was not the
    likeliest: it speaks there at any. Where the user had spoken nothing was decided.
    """
    if threshold == heard.threshold:
        return True
    spoke, asked = set(heard.spoke), set(heard.asked)
    for frame, p_silent in enumerate(heard.p_silent):
        if frame in asked:
            continue
        if frame in spoke:
            if p_silent < heard.threshold and p_silent >= threshold:
                return False
        elif p_silent < threshold:
            return False
    return True


class Sweep:
    """What was heard in each of the streams, at the thresholds that were tried so far.

    `play` runs the streams of some indices at a threshold.
    """

    def __init__(self, streams: Sequence[Played], play: Play) -> None:
        self.streams = streams
        self.play = play
        self._heard: list[list[Heard]] = [[] for _ in streams]

    def at(self, threshold: float) -> tuple[list[Heard], int]:
        """What is heard in each stream at a threshold, and how many had to be run for it."""
        found: list[Heard | None] = [
            next((one for one in heard if holds_at(one, threshold)), None) for heard in self._heard
        ]
        missing = [index for index, one in enumerate(found) if one is None]
        for index, heard in self.play(missing, threshold) if missing else ():
            self._heard[index].append(heard)
            found[index] = heard
        return [one for one in found if one is not None], len(missing)

    def curve(self, thresholds: Iterable[float], window: Window) -> list[Point]:
        """All streams graded at each threshold, from low to high, until no higher one can be the best."""
        points: list[Point] = []
        for threshold in sorted(set(thresholds)):
            heard, runs = self.at(threshold)
            total = sum(
                (timed(stream, one, window) for stream, one in zip(self.streams, heard, strict=True)), start=Timing()
            )
            points.append(Point(threshold, total, runs))
            if hopeless(total, best(points).timing):
                break
        return points


def timed(stream: Played, heard: Heard, window: Window) -> Timing:
    """What was said of its own accord in one stream, graded."""
    return timing(moments_of(heard.said), stream.labels, stream.duration_s, window)


def best(points: Sequence[Point]) -> Point:
    """The point with the best F1; of equals the one with fewer false alarms, then the lower threshold."""
    return max(
        points,
        key=lambda point: (
            point.timing.f1 or 0.0,
            -(point.timing.false_alarms_per_quiet_hour or 0.0),
            -point.threshold,
        ),
    )


def hopeless(speaking: Timing, reached: Timing) -> bool:
    """Whether speaking yet more cannot reach that F1, even if every label were matched from here on."""
    possible = 2 * speaking.labelled / max(1, speaking.said + speaking.labelled)
    return speaking.said > speaking.labelled and possible < (reached.f1 or 0.0)

"""Whether one checkpoint is better than another, or was lucky with the videos: the paired bootstrap.

Both were graded on the same streams. Videos are drawn again with replacement, many times, the same ones for
both; how the difference of the two spreads over the draws is how sure it is. Streams of one video are drawn
together, because they are alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from jobs.timing_metrics import HOUR_S, Timing

COUNTS = [field.name for field in fields(Timing)]
CONFIDENCE = 0.95

# Every number as a ratio of sums: what is added up above the line and below it.
RATIOS: Mapping[str, tuple[Mapping[str, float], tuple[str, ...]]] = {
    "precision": ({"matched": 1}, ("said",)),
    "recall": ({"matched": 1}, ("labelled",)),
    "f1": ({"matched": 2}, ("said", "labelled")),
    "mean_error_s": ({"error_s": 1}, ("matched",)),
    "text_similarity": ({"likeness": 1}, ("matched",)),
    "duplicate_ratio": ({"duplicates": 1}, ("said",)),
    "false_alarms_per_quiet_hour": ({"false_alarms": HOUR_S}, ("quiet_s",)),
}


@dataclass(frozen=True)
class Difference:
    """One number of both, and the interval in which 95 % of the drawn differences lie.

    `p` is how often a difference at least as far on the other side of 0 is drawn, twice: small means sure.
    None where a number has nothing to count.
    """

    first: float | None
    second: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None


def compare(
    first: Sequence[Timing], second: Sequence[Timing], videos: Sequence[str], draws: int = 10_000, seed: int = 0
) -> dict[str, Difference]:
    """Second minus first of every number, for the same streams in the same order; `videos` are their videos."""
    names = sorted(set(videos))
    groups = np.array([names.index(video) for video in videos])
    sums = [_by_video(timings, groups, len(names)) for timings in (first, second)]
    random = np.random.default_rng(seed)
    weights = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    everything = np.ones((1, len(names)))
    return {
        name: _difference(
            [_ratio(name, everything @ counts)[0] for counts in sums],
            [_ratio(name, weights @ counts) for counts in sums],
        )
        for name in RATIOS
    }


def _difference(found: Sequence[float], drawn: Sequence[np.ndarray]) -> Difference:
    first, second = (None if np.isnan(value) else float(value) for value in found)
    differences = drawn[1] - drawn[0]
    differences = differences[~np.isnan(differences)]
    if first is None or second is None or not len(differences):
        return Difference(first, second, None, None, None, None)
    low, high = np.quantile(differences, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    side = min((differences <= 0).mean(), (differences >= 0).mean())
    return Difference(first, second, second - first, float(low), float(high), min(1.0, 2 * float(side)))


def _by_video(timings: Sequence[Timing], groups: np.ndarray, count: int) -> np.ndarray:
    """The counts of each video (videos, COUNTS)."""
    sums = np.zeros((count, len(COUNTS)))
    np.add.at(sums, groups, np.array([[getattr(timing, name) for name in COUNTS] for timing in timings], float))
    return sums


def _ratio(name: str, sums: np.ndarray) -> np.ndarray:
    """A number (R,) of sums (R, COUNTS), NaN where there is nothing to count."""
    above, below = RATIOS[name]
    top = sum(factor * sums[:, COUNTS.index(count)] for count, factor in above.items())
    bottom = sum(sums[:, COUNTS.index(count)] for count in below)
    return np.divide(top, bottom, out=np.full(len(sums), np.nan), where=np.asarray(bottom) > 0)

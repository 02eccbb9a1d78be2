"""Whether the assistant speaks when there is something to say: what it said against what was labelled.

A response is right by its time alone, over whole streams in which the model heard itself; the four
metrics of `jobs.metrics` grade single decisions by teacher forcing. A response belongs to a label when
it comes at most `before_s` earlier or `after_s` later, each response to one label at most; how alike the
texts of such a pair are is a number of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from actors.session import REMEMBERED_RESPONSES, nearly_equal
from jobs.annotations import Moment
from jobs.replay import Utterance
from jobs.text_similarity import chrf

WORDS_PER_S = 2.5  # how fast text is spoken
HOUR_S = 3600.0


@dataclass(frozen=True)
class Window:
    """How far from a label a response may be, in seconds."""

    before_s: float = 1.0
    after_s: float = 3.0

    def holds(self, said_s: float, labelled_s: float) -> bool:
        return labelled_s - self.before_s <= said_s <= labelled_s + self.after_s


@dataclass(frozen=True)
class Timing:
    """Counts of one stream or, added up, of many; what follows from them is None where there is nothing to count.

    `false_alarms` are responses in quiet time, `quiet_s`, which is in no label's window. `error_s` is the
    sum over matched pairs of the distance in time, `late_s` of how late the response came, `likeness` of
    how alike the texts are.
    """

    said: int = 0
    labelled: int = 0
    matched: int = 0
    error_s: float = 0.0
    late_s: float = 0.0
    likeness: float = 0.0
    duplicates: int = 0
    false_alarms: int = 0
    quiet_s: float = 0.0
    speaking_s: float = 0.0
    duration_s: float = 0.0

    def __add__(self, other: Timing) -> Timing:
        return Timing(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def precision(self) -> float | None:
        return _ratio(self.matched, self.said)

    @property
    def recall(self) -> float | None:
        return _ratio(self.matched, self.labelled)

    @property
    def f1(self) -> float | None:
        return _ratio(2 * self.matched, self.said + self.labelled)

    @property
    def mean_error_s(self) -> float | None:
        return _ratio(self.error_s, self.matched)

    @property
    def mean_late_s(self) -> float | None:
        return _ratio(self.late_s, self.matched)

    @property
    def text_similarity(self) -> float | None:
        """From 0 to 1, of the responses that came in time."""
        return _ratio(self.likeness, self.matched)

    @property
    def duplicate_ratio(self) -> float | None:
        """Responses that say nearly what one of the last few said."""
        return _ratio(self.duplicates, self.said)

    @property
    def false_alarms_per_quiet_hour(self) -> float | None:
        return _ratio(self.false_alarms * HOUR_S, self.quiet_s)

    @property
    def speaking_share(self) -> float | None:
        """Share of the time in which a response is being spoken, at WORDS_PER_S."""
        return _ratio(self.speaking_s, self.duration_s)


def timing(said: Sequence[Moment], labelled: Sequence[Moment], duration_s: float, window: Window) -> Timing:
    """Grade what was said in one stream of `duration_s` seconds; both lists in order of time."""
    said_s, labelled_s = ([moment.time for moment in moments] for moments in (said, labelled))
    pairs = match(said_s, labelled_s, window)
    late_s = [said_s[i] - labelled_s[j] for i, j in pairs]
    busy = [(time - window.before_s, time + window.after_s) for time in labelled_s]
    spoken = [(moment.time, moment.time + len(moment.text.split()) / WORDS_PER_S) for moment in said]
    return Timing(
        said=len(said),
        labelled=len(labelled),
        matched=len(pairs),
        error_s=sum(map(abs, late_s)),
        late_s=sum(late_s),
        likeness=sum(chrf(said[i].text, labelled[j].text) for i, j in pairs),
        duplicates=sum(
            any(nearly_equal(moment.text, earlier.text) for earlier in said[max(0, i - REMEMBERED_RESPONSES) : i])
            for i, moment in enumerate(said)
        ),
        false_alarms=sum(not any(window.holds(time, label) for label in labelled_s) for time in said_s),
        quiet_s=duration_s - _covered(busy, duration_s),
        speaking_s=_covered(spoken, duration_s),
        duration_s=duration_s,
    )


def moments_of(said: Iterable[Utterance]) -> list[Moment]:
    """What was said of the model's own accord; the time of an answer is the user's doing."""
    return [Moment(time=turn.time, text=turn.text) for turn in said if turn.question is None]


def match(said_s: Sequence[float], labelled_s: Sequence[float], window: Window) -> list[tuple[int, int]]:
    """Pairs (response, label): as many as possible and, of those, as close together as possible.

    Both lists ascend. Pairs need not cross then, so aligning the lists finds the best there is.
    """
    Best = tuple[int, float]  # pairs, and minus the sum of their distances
    table: list[list[Best]] = [[(0, 0.0)] * (len(labelled_s) + 1)]
    first = 0  # the first label that a response from here on may be paired with
    for said in said_s:
        while first < len(labelled_s) and labelled_s[first] + window.after_s < said:
            first += 1
        above = table[-1]
        row = above.copy()  # rows ascend: without a pair a place has what stands above it, or to its left
        for j in range(first, len(labelled_s)):
            best = max(above[j + 1], row[j])
            if window.holds(said, labelled_s[j]):
                pairs, closeness = above[j]
                best = max(best, (pairs + 1, closeness - abs(said - labelled_s[j])))
            elif best == above[j + 1]:
                break
            row[j + 1] = best
        table.append(row)
    found: list[tuple[int, int]] = []
    i, j = len(said_s), len(labelled_s)
    while i and j:
        if table[i][j] == table[i - 1][j]:
            i -= 1
        elif table[i][j] == table[i][j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            found.append((i, j))
    return found[::-1]


def _covered(spans: Iterable[tuple[float, float]], duration_s: float) -> float:
    """Seconds of [0, duration_s] in at least one of the spans."""
    total = reached = 0.0
    for start, stop in sorted(spans):
        stop = min(stop, duration_s)
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None

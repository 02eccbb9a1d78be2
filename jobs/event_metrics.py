"""Was the right thing said at the right moment? Responses against events with acceptable words.

An event is a moment and the words of which a response must have one: `[{"time": 4.5, "words": ["rabbit",
"bunny"]}]`, written by hand beside a video as `VIDEO.events.json`. A response counts for an event if it
starts within the window around it; each event and each response counts once.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from actors.config import Section

WINDOW = 1.5  # seconds before and after an event
SUFFIX = ".events.json"


class EventsError(ValueError):
    """A file of events cannot be read; says where and what is expected."""


class Event(Section):
    """Something to be told at `time` (seconds), in a response that has one of `words`."""

    time: float = Field(ge=0)
    words: tuple[str, ...] = Field(min_length=1)

    def named_by(self, text: str) -> bool:
        """Whether one of the words is in the text, as a whole word, also in the plural."""
        return any(re.search(rf"\b{re.escape(word)}(s|es)?\b", text, re.IGNORECASE) for word in self.words)


class Said(NamedTuple):
    """A response and the video time at which it starts."""

    time: float
    text: str


@dataclass(frozen=True)
class EventScores:
    """Counts over one or more videos: right is in time and with an acceptable word, timed is in time."""

    events: int
    responses: int
    right: int
    timed: int

    def __add__(self, other: EventScores) -> EventScores:
        return EventScores(
            self.events + other.events,
            self.responses + other.responses,
            self.right + other.right,
            self.timed + other.timed,
        )

    @property
    def f1(self) -> float:
        """Of what is right; 1 where there was nothing to say and nothing was said."""
        return _f1(self.right, self.events, self.responses)

    @property
    def timing_f1(self) -> float:
        """Of what is in time, whatever was said."""
        return _f1(self.timed, self.events, self.responses)


NOTHING = EventScores(0, 0, 0, 0)


def event_scores(said: Sequence[Said], events: Sequence[Event], window: float = WINDOW) -> EventScores:
    """The scores of one video, its responses and events in order of time."""
    near = [[abs(one.time - event.time) <= window for event in events] for one in said]
    named = [
        [close and event.named_by(one.text) for close, event in zip(row, events, strict=True)]
        for one, row in zip(said, near, strict=True)
    ]
    return EventScores(len(events), len(said), _most_pairs(named), _most_pairs(near))


def pieces(
    said: Sequence[Said], events: Sequence[Event], seconds: float, window: float = WINDOW
) -> list[tuple[list[Said], list[Event]]]:
    """A video's responses and events in pieces of `seconds` at least (the last may be shorter), cut between pairs.

    A cut lies where for longer than `window` nothing happens and nothing is said. Of few videos each says much the
    same throughout, and intervals over pieces are less of a lottery than those over videos.
    """
    moments = sorted([*(one.time for one in said), *(one.time for one in events)])
    cuts, start = list[float](), 0.0
    for earlier, later in itertools.pairwise(moments):
        if later - earlier > window and later - start >= seconds:
            cuts.append(later)
            start = later
    edges = list(itertools.pairwise([-math.inf, *cuts, math.inf]))
    return [
        (
            [one for one in said if low <= one.time < high],
            [one for one in events if low <= one.time < high],
        )
        for low, high in edges
    ]


def interval(parts: Sequence[EventScores], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of F1 when the parts (videos, or pieces of one) are drawn again with replacement."""
    drawn = random.Random(seed)
    scores = sorted(sum(drawn.choices(parts, k=len(parts)), NOTHING).f1 for _ in range(draws))
    return scores[int(0.025 * draws)], scores[int(0.975 * draws)]


def share_interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; (0, 1) of nothing."""
    if count == 0:
        return 0.0, 1.0
    z, share = 1.96, right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def poisson_interval(count: int) -> tuple[float, float]:
    """About the 95 % interval of a rate of which `count` were seen (Wilson and Hilferty's approximation)."""

    def edge(shape: float, z: float) -> float:
        return shape * (1 - 1 / (9 * shape) + z / (3 * math.sqrt(shape))) ** 3

    return edge(count, -1.96) if count else 0.0, edge(count + 1, 1.96)


def read_events(path: Path) -> list[Event]:
    """The events of a file, in order of time. Raises EventsError."""
    try:
        events = TypeAdapter(list[Event]).validate_json(path.read_bytes())
    except ValidationError as error:
        raise EventsError(f'{path}: expected [{{"time": seconds, "words": [...]}}, ...]: {error}') from None
    return sorted(events, key=lambda event: event.time)


def _f1(right: int, events: int, responses: int) -> float:
    return 2 * right / (events + responses) if events + responses else 1.0


def _most_pairs(fits: Sequence[Sequence[bool]]) -> int:
    """The most pairs (row, column) that fit, no row or column twice, and in order."""
    best = [0] * (len(fits[0]) + 1) if fits else [0]
    for row in fits:
        above, best = best, [0] * len(best)
        for column, fit in enumerate(row, start=1):
            best[column] = max(above[column], best[column - 1], above[column - 1] + fit)
    return best[-1]

"""Streams of videos with a file of events beside them: was the right thing said at the right moment?

The events of `VIDEO.events.json` (jobs/event_metrics.py) that fall into a dialogue's frames are those of its
stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.event_metrics import NOTHING, SUFFIX, WINDOW, Event, EventScores, Said, event_scores, interval, read_events
from jobs.stream_groups import GradedStream
from jobs.timing_metrics import moments_of


@dataclass(frozen=True)
class GradedEvents:
    """Scores of all streams with events; `interval` is the 95 % one of F1, over streams drawn again."""

    num_streams: int
    scores: EventScores
    interval: tuple[float, float]
    window_s: float = WINDOW


def grade_events(streams: Sequence[GradedStream]) -> GradedEvents | None:
    """None where no video has events beside it. Raises EventsError for a file that is none of events."""
    parts = []
    for stream in streams:
        events = events_of(stream)
        if events is not None:
            said = [Said(moment.time, moment.text) for moment in moments_of(stream.heard.said)]
            parts.append(event_scores(said, events))
    return GradedEvents(len(parts), sum(parts, NOTHING), interval(parts)) if parts else None


def events_of(stream: GradedStream) -> list[Event] | None:
    """What happens in a stream, in its own time; None where nobody wrote that down."""
    dialogue = stream.played.dialogue
    if not dialogue.video or not (file := Path(dialogue.video).with_suffix(SUFFIX)).is_file():
        return None
    start = dialogue.frames[0] / dialogue.fps
    return [
        Event(time=event.time - start, words=event.words)
        for event in read_events(file)
        if 0 <= event.time - start < stream.played.duration_s
    ]

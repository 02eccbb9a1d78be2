"""Chats written by rule, from the annotations alone: no language model is needed.

The user asks at given times about what was, is or comes next; the assistant answers from what is
annotated, and says everything when it starts. Steps of an activity are labels ("cut the onion"),
captions are sentences ("You cut the onion."): each has its own words. VideoLLM-online, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.annotations import Moment
from jobs.questions import CURRENT, PAST


@dataclass(frozen=True)
class Phrases:
    """What the assistant says around a text, and where there is none to say."""

    past: str
    no_past: str
    current: str
    no_current: str
    next: str
    no_next: str
    started: str
    done: str


STEPS = Phrases(
    past="You have finished this step: {}.",
    no_past="No step is finished yet.",
    current="You are at this step: {}.",
    no_current="You are between two steps.",
    next="The next step is: {}.",
    no_next="No step is left after this one.",
    started="Now {}.",
    done="Well done, that was the last step.",
)
CAPTIONS = Phrases(
    past="Before this: {}",
    no_past="There was nothing to tell before this.",
    current="{}",
    no_current="There is nothing to tell right now.",
    next="After this: {}",
    no_next="There is nothing more to come.",
    started="{}",
    done="",
)


def converse(
    told: Sequence[Moment], duration: float, asked: Sequence[tuple[float, str]], phrases: Phrases
) -> list[Moment]:
    """Questions, answers and what the assistant says by itself, in order of time, from the first question on.

    `asked` are the times and questions. What starts at the time of a question is part of its answer.
    """
    first = min(time for time, _ in asked)
    last = min(max(moment.stop or moment.time for moment in told), duration)
    messages: list[tuple[float, int, Moment]] = []
    for time, question in asked:
        messages.append((time, 0, Moment(time=time, text=question, role="user")))
        messages.append((time, 1, Moment(time=time, text=_answer(question, time, told, phrases))))
    messages += [
        (moment.time, 2, Moment(time=moment.time, text=phrases.started.format(moment.text)))
        for moment in told
        if moment.time > first
    ]
    if last > first and phrases.done:
        messages.append((last, 3, Moment(time=last, text=phrases.done)))
    return [message for _, _, message in sorted(messages, key=lambda item: item[:2])]


def _answer(question: str, time: float, told: Sequence[Moment], phrases: Phrases) -> str:
    if question in PAST:
        over = [moment.text for moment in told if (moment.stop or moment.time) <= time]
        return phrases.past.format(over[-1]) if over else phrases.no_past
    if question in CURRENT:
        now = [moment.text for moment in told if moment.time <= time <= (moment.stop or moment.time)]
        return phrases.current.format(now[-1]) if now else phrases.no_current
    ahead = [moment.text for moment in told if moment.time > time]
    return phrases.next.format(ahead[0]) if ahead else phrases.no_next

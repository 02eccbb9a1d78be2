"""Chats about GoalStep activities written by rule, from the steps alone: no language model is needed.

The user asks up to three questions at drawn times, about what was, is or comes next; the assistant
answers from the steps, and says each step when it starts. A row used several times (its dataset's
weight) becomes as many different chats; the paper has ten a video. VideoLLM-online, section 3.3.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from jobs import chat
from jobs.annotations import Moment, VideoAnnotation
from jobs.clock import Extent
from jobs.livechat import unfit
from jobs.questions import CURRENT, NEXT, PAST
from jobs.scenes import Scene

QUESTIONS = 3


def scenes(row: VideoAnnotation, video: Extent, rng: random.Random) -> Iterator[Scene]:
    """One chat about the row's steps; none if it would be shorter or longer than chats should be."""
    steps = [step for step in row.moments if step.time <= video.duration]
    if not steps:
        return
    messages = converse(steps, video.duration, rng)
    if unfit(messages) is None:
        yield from chat.scenes(row.model_copy(update={"moments": tuple(messages)}), video, rng)


def converse(steps: Sequence[Moment], duration: float, rng: random.Random) -> list[Moment]:
    """Questions, answers and what the assistant says by itself, in order of time, from the first question on."""
    first, last = steps[0].time, min(max(step.stop or step.time for step in steps), duration)
    asked = sorted({round(rng.uniform(first, last), 1) for _ in range(rng.randint(1, QUESTIONS))})
    messages: list[tuple[float, int, Moment]] = []
    for time in asked:
        questions = rng.choice((PAST, CURRENT, NEXT))
        answer = _answer(questions, time, steps)
        messages.append((time, 0, Moment(time=time, text=rng.choice(questions), role="user")))
        messages.append((time, 1, Moment(time=time, text=answer)))
    started = [step for step in steps if step.time > asked[0]]
    messages += [(step.time, 2, Moment(time=step.time, text=f"Now {step.text}.")) for step in started]
    if last > asked[0]:
        messages.append((last, 3, Moment(time=last, text="Well done, that was the last step.")))
    return [message for _, _, message in sorted(messages, key=lambda item: item[:2])]


def _answer(questions: Sequence[str], time: float, steps: Sequence[Moment]) -> str:
    if questions is PAST:
        done = [step.text for step in steps if (step.stop or step.time) <= time]
        return f"You have finished this step: {done[-1]}." if done else "No step is finished yet."
    if questions is CURRENT:
        at = [step.text for step in steps if step.time <= time <= (step.stop or step.time)]
        return f"You are at this step: {at[-1]}." if at else "You are between two steps."
    ahead = [step.text for step in steps if step.time > time]
    return f"The next step is: {ahead[0]}." if ahead else "No step is left after this one."

"""Chats about what is annotated: which are asked for, and which of the answers are of use.

For each chat up to three questions about what was, is or comes next are drawn with the times they are
asked at; a writer (jobs/writer.py) fills in what the assistant says. VideoLLM-online, section 3.3.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from jobs.annotations import Moment
from jobs.clock import Extent
from jobs.goalstep import BLANK, activity_of
from jobs.livechat import ChatError, parse_chat, tells_time, to_words, unfit
from jobs.questions import CURRENT, NEXT, PAST, about_anything
from jobs.template_chat import CAPTIONS, STEPS, converse
from jobs.writer import Request, UnusableText

MOST_QUESTIONS = 3


def chat_request(
    video_id: str, told: Sequence[Moment], video: Extent, rng: random.Random, captions: bool = False
) -> Request | None:
    """A request for a chat about the steps of an activity, or the captions of any video; None if the video has none."""
    told = [moment for moment in told if moment.time <= video.duration and moment.text.strip()]
    if not told:
        return None
    activity = activity_of(video_id, told, video)
    choices = [question for kind in _kinds(told, captions) for question in kind]
    places = sorted(rng.random() for _ in range(rng.randint(1, MOST_QUESTIONS)))
    questions = rng.sample(choices, len(places))
    first, last = activity.times[0], activity.times[-1]
    asked = [
        (round(first + place * (last - first), 1), question) for place, question in zip(places, questions, strict=True)
    ]
    by_rule = converse(told, video.duration, asked, CAPTIONS if captions else STEPS)
    return Request(activity.request(questions, places), to_words(by_rule))


def read_chat(words: str, captions: Sequence[Moment] | None = None) -> list[Moment]:
    """The messages of a chat that a writer wrote, about `captions` if not about steps.

    Raises UnusableText for one that is of no use.
    """
    try:
        messages = parse_chat(words)
    except ChatError:
        raise UnusableText("a line has no time") from None
    if not messages:
        raise UnusableText("no line is a message")
    if messages[0].role != "user":
        raise UnusableText("does not begin with a question")
    if not any(message.role == "assistant" for message in messages):
        raise UnusableText("nothing is answered")
    if any(message.text.strip() in ("", BLANK) for message in messages):
        raise UnusableText("a blank was left")
    if captions is None:
        if reason := unfit(messages):
            raise UnusableText(reason)
    # What is said about any video may be short, and may quote a caption that names a time.
    elif tells_time(messages, captions):
        raise UnusableText("tells a time")
    return messages


def _kinds(told: Sequence[Moment], captions: bool) -> list[tuple[str, ...]]:
    """The questions that the annotations can answer: what is now needs to be known to last."""
    if not captions:
        return [PAST, CURRENT, NEXT]
    lasting = all(moment.stop is not None and moment.stop > moment.time for moment in told)
    return [about_anything(kind) for kind in (PAST, CURRENT, NEXT) if lasting or kind is not CURRENT]

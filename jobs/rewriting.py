"""Narrations about the camera wearer, rewritten for the camera wearer, a few lines at a time.

"C picks up a knife." becomes "You pick up a knife." The published checkpoints that chat were trained on
narrations refined in this way. VideoLLM-online, section 4.1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from jobs.annotations import Moment
from jobs.second_person import second_person
from jobs.writer import Request, UnusableText

LINES = 10  # of a request: enough to tell what "it" is, few enough to keep count of
PROMPT = (
    "These numbered lines tell what a person called C does, in order. Rewrite each line so that it speaks to C: "
    "say 'you' for C and leave everything and everybody else as it is. Answer with the same numbers, one short "
    "sentence a line, and nothing else.\n\n{lines}"
)
LINE = re.compile(r"^\s*(\d+)[.):]\s*(\S.*?)\s*$", re.MULTILINE)


def rewriting_requests(moments: Sequence[Moment]) -> list[tuple[Sequence[Moment], Request]]:
    """The moments, a few at a time, each with the request to rewrite them."""
    parts = [moments[first : first + LINES] for first in range(0, len(moments), LINES)]
    return [(part, Request(PROMPT.format(lines=_numbered(part)), _by_rule(part))) for part in parts]


def rewritten(moments: Sequence[Moment], words: str) -> list[Moment]:
    """The moments with the new texts. Raises UnusableText unless there is one for each."""
    lines = [(int(number), text) for number, text in LINE.findall(words)]
    if [number for number, _ in lines] != list(range(1, len(moments) + 1)):
        raise UnusableText("other lines than were asked for")
    if any(re.search(r"\bC\b", text) for _, text in lines):
        raise UnusableText("still speaks of C")
    return [
        moment.model_copy(update={"text": " ".join(text.split())})
        for moment, (_, text) in zip(moments, lines, strict=True)
    ]


def _numbered(moments: Sequence[Moment]) -> str:
    return "\n".join(f"{number}. {moment.text}" for number, moment in enumerate(moments, start=1))


def _by_rule(moments: Sequence[Moment]) -> str:
    return _numbered([moment.model_copy(update={"text": second_person(moment.text)}) for moment in moments])

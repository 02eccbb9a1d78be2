"""Chats that a language model wrote: read from its words, and refused where they cannot be shown.

A line such as `20.5s Assistant: Boil the water.` is a message. An assistant that sees a stream knows
no absolute time, so a chat in which it tells one is of no use, nor is a very short or long one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from jobs.annotations import Moment

ROLES = {"User: ": "user", "Assistant: ": "assistant"}
SHORTEST_S, LONGEST_S = 60, 3600
TIMESTAMP = re.compile(r"\b\d+(?:\.\d+)?\s*(?:s|secs?|seconds?)\b", re.IGNORECASE)


class ChatError(ValueError):
    """A model's words are no chat; says which line."""


def parse_chat(words: str, eos: str = "<|eot_id|>") -> list[Moment]:
    """The messages in what a model wrote, in its order; lines that are none are skipped.

    Raises ChatError for a line with a role but no time before it.
    """
    messages = []
    for line in words.replace(eos, "").splitlines():
        found = next((role for role in ROLES if role.strip() in line), None)
        if found is None:
            continue
        before = line[: line.index(found.strip())]
        # The reference cuts at a fixed offset: without a space after the colon a letter is lost.
        content = line[len(before) + len(found) :]
        try:
            time = float(before.strip().removesuffix("s"))
            messages.append(Moment.model_validate({"time": time, "text": content, "role": ROLES[found]}))
        except ValueError:
            raise ChatError(f"line {line[:80]!r}: expected a time before {found.strip()!r}, such as '20.5s'") from None
    return messages


def to_words(messages: Sequence[Moment]) -> str:
    """Messages as a model should write them: the form that `parse_chat` reads."""
    roles = {role: words for words, role in ROLES.items()}
    return "\n".join(f"{message.time:.2f}s {roles[message.role]}{message.text}" for message in messages)


def unfit(messages: Sequence[Moment]) -> str | None:
    """Why a chat is of no use, or None."""
    lasts = messages[-1].time - messages[0].time if messages else 0
    if lasts < SHORTEST_S:
        return f"lasts less than {SHORTEST_S} s"
    if lasts > LONGEST_S:
        return f"lasts more than {LONGEST_S} s"
    return "tells a time" if tells_time(messages) else None


def tells_time(messages: Sequence[Moment], told: Sequence[Moment] = ()) -> bool:
    """Whether the assistant names seconds; those that a text of `told` names are what it was told."""
    known = {time.lower() for moment in told for time in TIMESTAMP.findall(moment.text)}
    said = (time for message in messages if message.role == "assistant" for time in TIMESTAMP.findall(message.text))
    return any(time.lower() not in known for time in said)

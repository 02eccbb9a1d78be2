"""Scenes: turns over consecutive frames of a video, before they have a name and a system prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from actors.turns import Assistant, Stream, Turn, User


@dataclass(frozen=True)
class Scene:
    """Turns whose streams show the video's frames from `first` on, one after another.

    `labels` are the names an answer is graded against, where a task has such names.
    """

    first: int
    turns: tuple[Turn, ...]
    labels: tuple[str, ...] = ()

    @property
    def frames(self) -> tuple[int, int]:
        """The range [first, last + 1)."""
        return self.first, self.first + count_frames(self.turns)


def count_frames(turns: Iterable[Turn]) -> int:
    """How many frames the stream turns show."""
    return sum(turn.num_frames for turn in turns if isinstance(turn, Stream))


def clip(turns: Sequence[Turn], max_frames: int) -> tuple[Turn, ...]:
    """The beginning of a conversation: what comes before the first stream that exceeds `max_frames` in all."""
    shown = 0
    for index, turn in enumerate(turns):
        if isinstance(turn, Stream):
            shown += turn.num_frames
            if shown > max_frames:
                return tuple(turns[:index])
    return tuple(turns)


def answered(first: int, last: int, question: str, labels: Sequence[str], answer: str | None) -> Scene:
    """A question about frames first..last, asked before them and answered after; `answer` is None where unknown."""
    turns: list[Turn] = [User(content=question)]
    if answer is None:
        return Scene(first, (*turns, Stream(num_frames=last - first + 1)), tuple(labels))
    turns += [Stream(num_frames=last - first + 1, learn=True), Assistant(content=answer, learn=True)]
    return Scene(first, tuple(turns), tuple(labels))


def sentence(text: str) -> str:
    """A label as an answer: "put in the sim card" is "Put in the sim card."."""
    return text.capitalize() + "."


def numbered(labels: Sequence[str]) -> str:
    """Labels as answers, one a line, with their numbers."""
    return "\n".join(f"{number}. {sentence(label)}" for number, label in enumerate(labels, start=1))

"""The turns of a dialogue, as types: what datasets hold and training renders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, TypeAdapter, ValidationError, model_validator


class DialogueError(ValueError):
    """A dialogue or a tokenizer cannot be used; says what was found and what is expected."""


class _Turn(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class System(_Turn):
    """Instructions before everything else; at most one, and first."""

    role: Literal["system"] = "system"
    content: str


class User(_Turn):
    """Something the user said."""

    role: Literal["user"] = "user"
    content: str


class Assistant(_Turn):
    """Something the assistant said; with `learn`, a target of training."""

    role: Literal["assistant"] = "assistant"
    content: str
    learn: StrictBool = False


class Stream(_Turn):
    """Consecutive frames. `learn` says at how many, from the first, the decision is a target; true is all."""

    role: Literal["stream"] = "stream"
    num_frames: int = Field(ge=0)
    learn: StrictBool | StrictInt = False

    @property
    def num_learned(self) -> int:
        """How many frames, from the first, have a decision to learn."""
        return self.num_frames * self.learn if isinstance(self.learn, bool) else self.learn

    @model_validator(mode="after")
    def _within(self) -> Self:
        if not 0 <= self.num_learned <= self.num_frames:
            raise ValueError(
                f"learn is {self.learn}, expected true, false or a number from 0 to {self.num_frames} frames"
            )
        return self


Turn = Annotated[System | User | Assistant | Stream, Field(discriminator="role")]
_TURNS: TypeAdapter[list[Turn]] = TypeAdapter(list[Turn])


def parse(conversation: Sequence[Turn | Mapping[str, object]]) -> list[Turn]:
    """Turns from turns or plain mappings. Raises DialogueError for an unknown role or key, or a later system turn."""
    try:
        turns = _TURNS.validate_python(list(conversation))
    except ValidationError as error:
        problems = "; ".join(f"turn {'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise DialogueError(f"not a dialogue: {problems}") from None
    for index, turn in enumerate(turns):
        if index and isinstance(turn, System):
            raise DialogueError(f"turn {index} is a system turn: a dialogue has at most one, and it is the first")
    return turns

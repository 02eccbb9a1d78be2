"""The engine protocol: sessions opened on one model, stepped together, closed.

Whoever owns an engine calls it from one thread. Input goes to the `Session` that `open` returns;
`step` runs at most one forward of the model and returns what was logged, per session and in
context order. `reference` is the plain backend: one session, one frame a step, the Hugging Face
cache; it is what other backends are compared with.
"""

from __future__ import annotations

from typing import Literal, Protocol

from pydantic import Field

from actors.config import Section
from actors.messages import LogEntry, SessionSettings
from actors.session import Limits, Session


class NoCapacity(RuntimeError):
    """No memory is left for another session; says how much one needs and how much there is."""


class EngineConfig(Section):
    """How sessions are run. Lengths are positions of the context (one per token).

    `max_positions` is the longest context (default: the model's limit). `window_trigger` and
    `window_keep` are a session's defaults: rebuild before passing the first, down to the second.
    """

    backend: Literal["reference"] = "reference"
    device: str = "cpu"
    threads: int = Field(default=1, ge=1)
    max_sessions: int = Field(default=8, ge=1)
    max_positions: int | None = Field(default=None, gt=0)
    window_trigger: int | None = Field(default=None, gt=0)
    window_keep: int | None = Field(default=None, gt=0)
    memory_tokens: int = Field(default=128, ge=0)

    def limits(self, model_positions: int) -> Limits:
        """Limits of a session on a model with that many positions."""
        capacity = min(self.max_positions or model_positions, model_positions)
        return Limits(capacity, self.window_trigger, self.window_keep, self.memory_tokens)


StepResult = list[tuple[str, list[LogEntry]]]


class Engine(Protocol):
    """What every backend does."""

    sessions: dict[str, Session]

    def open(self, session_id: str, settings: SessionSettings) -> Session:
        """A new session. Raises NoCapacity when memory is full, SessionError for settings that cannot hold."""

    def close(self, session_id: str) -> None:
        """Free what the session held. Unknown ids are ignored."""

    def step(self) -> StepResult:
        """Advance sessions by at most one forward; [] when there is nothing to do."""

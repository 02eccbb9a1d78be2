"""The engine protocol: sessions opened on one model, stepped together, closed.

Whoever owns an engine calls it from one thread. Input goes to the `Session` that `open` returns;
`step` runs at most one forward of the model and returns what was logged, per session and in
context order. `reference` is the plain backend: one session, one frame a step, the Hugging Face
cache; it is what other backends are compared with.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, Self

from pydantic import Field, model_validator
from transformers import PretrainedConfig

from actors.config import Section
from actors.messages import LogEntry, SessionSettings
from actors.session import Limits, Session

LENGTH_FREE_ROPE = {"default", "linear", "llama3", "yarn"}  # angles of a position do not depend on the others


class EngineError(ValueError):
    """The model and the engine's settings do not fit together; names both and what to change."""


class NoCapacity(RuntimeError):
    """No memory is left for another session; says how much one needs and how much there is."""


class EngineConfig(Section):
    """How sessions are run. Lengths are positions of the context (one per token).

    `kv_memory_gb` is what the KV memory of all sessions may take (default 1 GB); `kv_memory_share`,
    on CUDA, the share of the memory that is free after loading the model instead. A step appends about
    `token_budget` positions; `speculate` is the most frames of a session that are appended in one step.
    `untrained` allows a model without a checkpoint, whose words mean nothing, to show that all runs.
    `max_positions` is the longest context (default: the model's limit; beyond it, rotary positions simply
    go on, as the public reference lets them). `window_trigger` and `window_keep` are a session's
    defaults: rebuild before passing the first, down to the second.
    """

    backend: Literal["batched", "reference"] = "batched"
    untrained: bool = False
    device: str = "cpu"
    threads: int = Field(default=1, ge=1)
    max_sessions: int = Field(default=64, ge=1)
    kv_memory_gb: float | None = Field(default=None, gt=0)
    kv_memory_share: float | None = Field(default=None, gt=0, le=0.95)
    token_budget: int = Field(default=256, ge=16)
    speculate: int = Field(default=32, ge=1)
    max_positions: int | None = Field(default=None, gt=0)
    window_trigger: int | None = Field(default=None, gt=0)
    window_keep: int | None = Field(default=None, gt=0)
    memory_tokens: int = Field(default=128, ge=0)

    def limits(self, llm: PretrainedConfig) -> Limits:
        """Limits of a session on that model. Raises ValueError for more positions than it can be given."""
        made_for: int = llm.max_position_embeddings
        capacity = self.max_positions or made_for
        rope = (getattr(llm, "rope_parameters", None) or {}).get("rope_type")
        if capacity > made_for and rope not in LENGTH_FREE_ROPE:
            raise EngineError(
                f"engine.max_positions is {capacity}, the LLM is made for {made_for} and its positions (rope type "
                f"{rope}) do not go on beyond: set at most {made_for}"
            )
        trigger = min(self.window_trigger or capacity, capacity)
        if self.window_keep is not None and self.window_keep >= trigger:
            raise EngineError(
                f"engine.window_keep is {self.window_keep}, expected less than window_trigger or max_positions "
                f"({trigger})"
            )
        return Limits(capacity, self.window_trigger, self.window_keep, self.memory_tokens)

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.kv_memory_gb is not None and self.kv_memory_share is not None:
            raise ValueError("kv_memory_gb and kv_memory_share are both given: choose one")
        if self.kv_memory_share is not None and not self.device.startswith("cuda"):
            raise ValueError(f"kv_memory_share needs a CUDA device, device is {self.device!r}: give kv_memory_gb")
        return self


class KVUse(NamedTuple):
    """Positions of the KV memory: holding a context, set aside for sessions, and in all."""

    filled: int
    reserved: int
    total: int


StepResult = list[tuple[str, list[LogEntry]]]


class Engine(Protocol):
    """What every backend does."""

    sessions: dict[str, Session]
    idle: bool
    """Whether the last `step` found nothing to do; it will not, until new input comes."""

    @property
    def room(self) -> int:
        """How many more sessions `open` would take."""

    @property
    def kv_use(self) -> KVUse:
        """How full the KV memory is; may be asked from any thread."""

    def open(self, session_id: str, settings: SessionSettings) -> Session:
        """A new session. Raises NoCapacity when memory is full, SessionError for settings that cannot hold."""

    def close(self, session_id: str) -> None:
        """Free what the session held. Unknown ids are ignored."""

    def step(self) -> StepResult:
        """Advance sessions by at most one forward; [] when there is nothing to do."""

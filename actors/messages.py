"""Everything said on the bus, as types, and the one msgpack codec.

Three kinds: frames from the gateway to the encoders, session input (`:in`) from encoders and
gateway to the LLM, and the session log (`:out`), which holds everything that changes a session's
context in context order. A message carries the protocol's major version; fields that a newer
minor version added are ignored, so replicas of two versions can run side by side.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

import msgpack
import numpy as np
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from actors.config import Section

VERSION = 1


class MessageError(ValueError):
    """Bytes or fields that are no valid message; says what was found and what was expected."""


class SessionSettings(Section):
    """What a client may choose for one session.

    The context is re-prefilled when it would pass `window_trigger` positions and then keeps the
    newest part of about `window_keep` positions; both are bounded by the model's limit. By `argmax`, as
    published, the model speaks where P(silent) is below `threshold` or silence is not the likeliest;
    by `threshold` only where P(silent) is below it, so that a low one makes it quieter than it was trained.
    """

    threshold: float = Field(default=0.725, ge=0)
    decide_by: Literal["argmax", "threshold"] = "argmax"
    instructions: str | None = Field(default=None, max_length=8192)
    max_response_tokens: int = Field(default=100, ge=1, le=4096)
    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=2)
    seed: int = 0
    suppress_duplicates: bool = False
    window_trigger: int | None = Field(default=None, gt=0)
    window_keep: int | None = Field(default=None, gt=0)
    fps: float = Field(default=2.0, gt=0, le=60)

    def with_threshold_of(self, checkpoint: float | None) -> Self:
        """These settings with the checkpoint's threshold, if it has one and none was given."""
        if checkpoint is None or "threshold" in self.model_fields_set:
            return self
        return self.model_copy(update={"threshold": checkpoint})

    @classmethod
    def tolerant(cls, text: str) -> Self:
        """From the JSON of another process, which may be newer: settings it has and this one has not are left out."""
        return cls.model_validate(_known_settings(from_json(text or "{")))

    @model_validator(mode="after")
    def _finite(self) -> Self:
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold is {self.threshold}, expected a finite number")
        return self


def _known_settings(value: object) -> object:
    """Clients and files may not set what is unknown, but a newer replica may: rolling upgrades go on."""
    if isinstance(value, dict):
        return {name: setting for name, setting in value.items() if name in SessionSettings.model_fields}
    return value


TolerantSettings = Annotated[SessionSettings, BeforeValidator(_known_settings)]


class Message(BaseModel):
    """Base of all messages: frozen, strict about types, tolerant of fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    kinds: ClassVar[dict[str, type[Message]]] = {}
    kind: ClassVar[str]

    @classmethod
    def __pydantic_init_subclass__(cls, **_: object) -> None:
        Message.kinds[cls.kind] = cls


class Frame(Message):
    """An admitted frame on its way to an encoder: encoded picture bytes and its video time."""

    kind = "frame"
    session_id: str
    seq: int = Field(ge=0)
    time: float = Field(ge=0, allow_inf_nan=False)
    image: bytes


class FrameTokens(Message):
    """A frame after the vision encoder, before the connector: (N, D) in fp16 or bf16."""

    kind = "frame_tokens"
    seq: int = Field(ge=0)
    time: float = Field(ge=0, allow_inf_nan=False)
    dtype: Literal["float16", "bfloat16"]
    shape: tuple[int, int]
    data: bytes

    @classmethod
    def from_tensor(cls, seq: int, time: float, tokens: torch.Tensor) -> Self:
        """From (N, D) fp16 or bf16 on any device. Raises MessageError for another dtype or rank."""
        name = str(tokens.dtype).removeprefix("torch.")
        if name not in ("float16", "bfloat16") or tokens.ndim != 2:
            raise MessageError(
                f"frame tokens are {name} {list(tokens.shape)}, expected float16 or bfloat16 of two dimensions"
            )
        data = tokens.detach().cpu().contiguous().view(torch.uint16).numpy().tobytes()
        return cls(seq=seq, time=time, dtype=name, shape=tuple(tokens.shape), data=data)

    def tensor(self, shape: tuple[int, int]) -> torch.Tensor:
        """The tokens as a tensor of `shape` (N, D), the one the model expects.

        Raises MessageError for another shape, a wrong number of bytes, or a value that is not finite.
        """
        if self.shape != shape:
            raise MessageError(
                f"frame {self.seq} has tokens of shape {list(self.shape)}, the model expects {list(shape)}"
            )
        if len(self.data) != 2 * shape[0] * shape[1]:
            raise MessageError(
                f"frame {self.seq} carries {len(self.data)} bytes, "
                f"{list(shape)} in {self.dtype} needs {2 * shape[0] * shape[1]}"
            )
        words = torch.from_numpy(np.frombuffer(self.data, np.uint16).copy())
        tokens = words.view(getattr(torch, self.dtype)).view(shape)
        if not bool(torch.isfinite(tokens).all()):
            raise MessageError(f"frame {self.seq} has tokens that are not finite (NaN or infinity)")
        return tokens


class FrameSkipped(Message):
    """A frame that could not become tokens. It is in the session's order but not in its context."""

    kind = "frame_skipped"
    seq: int = Field(ge=0)
    time: float = Field(ge=0, allow_inf_nan=False)
    reason: str


class Query(Message):
    """A user's question: live (applies once frame `after_seq` is decided) or timed.

    A timed query (`time` given) applies at the first frame at or after its time. `after_seq` is the
    last frame admitted before it, -1 when there was none.
    """

    kind = "query"
    query_id: str
    text: str
    after_seq: int = Field(ge=-1)
    time: float | None = Field(default=None, allow_inf_nan=False)
    interrupt: bool = False


class Interrupt(Message):
    """Stop the response that is being spoken, now.

    `response_id` is the one its sender heard, if any. A replica that takes a session over cannot see which response an
    interrupt met, and cuts only the one it names.
    """

    kind = "interrupt"
    after_seq: int = Field(ge=-1)
    response_id: str | None = None


class SettingsChange(Message):
    """New settings, all of them, once frame `after_seq` is decided."""

    kind = "settings"
    after_seq: int = Field(ge=-1)
    settings: TolerantSettings


class End(Message):
    """No more input: after frame `after_seq`, answer what is still asked, then end."""

    kind = "end"
    after_seq: int = Field(ge=-1)


class FramesDecided(Message):
    """Consecutive frames now in the context, with P(silent) of each; the last may want to speak."""

    kind = "frames_decided"
    first_seq: int = Field(ge=0)
    times: list[float]
    p_silent: list[float]

    @property
    def last_seq(self) -> int:
        return self.first_seq + len(self.times) - 1

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if not self.times or len(self.times) != len(self.p_silent):
            raise ValueError(
                f"{len(self.times)} times and {len(self.p_silent)} probabilities, expected as many, at least one"
            )
        return self


class QueryConsumed(Message):
    """A user turn was written into the context; its response follows."""

    kind = "query_consumed"
    query_id: str
    text: str
    seq: int = Field(ge=-1)
    time: float


class ResponseStarted(Message):
    """The assistant's turn was opened, of its own accord when `query_id` is None."""

    kind = "response_started"
    response_id: str
    query_id: str | None
    seq: int = Field(ge=-1)
    time: float


class ResponseTokens(Message):
    """Tokens written into the open turn. `text` is what became readable with them."""

    kind = "response_tokens"
    response_id: str
    ids: list[int]
    text: str


class ResponseEnded(Message):
    """The open turn was closed with eos. `text` is the whole response."""

    kind = "response_ended"
    response_id: str
    reason: Literal["eos", "length", "interrupted", "duplicate"]
    text: str


class SettingsApplied(Message):
    """From here on the session runs with these settings."""

    kind = "settings_applied"
    settings: TolerantSettings


class InputRefused(Message):
    """A query or settings that this session cannot take; the context is unchanged."""

    kind = "input_refused"
    query_id: str | None
    reason: str


class Evicted(Message):
    """The context was rebuilt: system prompt, pinned query, memory, then everything from frame `first_seq`.

    `pinned` is the text of the standing instruction ("" when there is none or it is still in the
    window); `memory` is what was said in dropped turns, within its budget. `forgotten` positions had left the
    context before, `positions_before` were in it.
    """

    kind = "evicted"
    first_seq: int = Field(ge=0)
    positions_before: int
    forgotten: int | None = None
    pinned: str = ""
    memory: str = ""


class SessionEnded(Message):
    """Last entry of a log. `positions` is how many its context was given in all, `spoken` those of the responses."""

    kind = "session_ended"
    reason: str
    positions: int = Field(default=0, ge=0)
    spoken: int = Field(default=0, ge=0)


class Window(Message):
    """Where a takeover starts to read: kept in the session's meta by its owner, written before trimming.

    `out_position` is the log entry that decided `first_seq`; `in_id` the input entry from which
    bodies are kept; `consumed` the input entries at or after it that have already been acted on, `ahead` questions
    from before it about a moment still to come, with their input entries. Before `out_position` there were
    `responses` with `spoken` tokens, `recent` the latest that nobody had asked for; `next_seq` and `clock` are those
    of the frame decided or skipped last before it. From `out_position` to the eviction the log applied or refused
    `settled` changes of settings.
    """

    kind = "window"
    first_seq: int = Field(ge=0)
    out_position: int = Field(ge=0)
    in_id: str
    consumed: list[str]
    ahead: list[tuple[str, Query]] = []
    recent: list[str]
    responses: int = Field(default=0, ge=0)
    spoken: int = Field(default=0, ge=0)
    next_seq: int = Field(default=0, ge=0)
    clock: float = 0.0
    settled: int = Field(default=0, ge=0)
    settings: TolerantSettings


SessionInput = FrameTokens | FrameSkipped | Query | Interrupt | SettingsChange | End
LogEntry = (
    FramesDecided
    | FrameSkipped
    | QueryConsumed
    | InputRefused
    | ResponseStarted
    | ResponseTokens
    | ResponseEnded
    | SettingsApplied
    | Evicted
    | SessionEnded
)


def encode(message: Message) -> bytes:
    """One message as msgpack: its fields with the protocol version and the kind."""
    return msgpack.packb({"v": VERSION, "kind": message.kind, **message.model_dump()})


def decode(data: bytes) -> Message:
    """The message in `data`. Raises MessageError saying what is wrong with it."""
    try:
        fields = msgpack.unpackb(data)
    except Exception as error:  # msgpack raises many unrelated types on garbage
        raise MessageError(f"{len(data)} bytes that are no msgpack: {error}") from None
    if not isinstance(fields, dict):
        raise MessageError(f"msgpack of a {type(fields).__name__}, expected a map of fields")
    version = fields.pop("v", None)
    if version != VERSION:
        raise MessageError(f"message of protocol version {version!r}, expected {VERSION}: update the older program")
    kind = fields.pop("kind", None)
    model = Message.kinds.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise MessageError(f"message of kind {kind!r}, expected one of {', '.join(sorted(Message.kinds))}")
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'message'}: {p['msg']}" for p in error.errors())
        raise MessageError(f"bad {kind} message: {problems}") from None

"""What the three sides of the session log share: settings, errors, records, and the connection they speak through.

`LogConnection` is what a side may ask of Redis; `bus.py` is the one implementation. The sides are
gateway_side.py (clients), encoder_side.py (frames to tokens) and owner_side.py (LLM replicas).
"""

from __future__ import annotations

import itertools
import secrets
import zlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from actors.config import Section
from actors.messages import Frame, LogEntry, Message, MessageError, SessionSettings, decode
from actors.scripts import SESSION_ID, Keys

Entry = tuple[str, dict[bytes, bytes]]


class BusConfig(Section):
    """Where Redis is and the limits of the session log.

    `credits` bounds admitted but undecided frames of a session, `max_queued_frames` those that wait
    for an encoder in a partition. A frame taken by an encoder that was not heard of for
    `reclaim_idle_ms` goes to another. `retry_s` is how long a call goes on while Redis is away.
    """

    url: str | None = Field(default=None, repr=False)
    partitions: int = Field(default=16, ge=1, le=1024)
    prefix: str = ""
    lease_ms: int = Field(default=2000, gt=0)
    renew_ms: int = Field(default=500, gt=0)
    credits: int = Field(default=32, ge=1)
    resume_s: float = Field(default=60, gt=0)
    session_ttl_s: float = Field(default=3600, gt=0)
    max_deliveries: int = Field(default=3, ge=1)
    reclaim_idle_ms: int = Field(default=2000, gt=0)
    max_queued_frames: int = Field(default=512, ge=1)
    max_frame_bytes: int = Field(default=4 << 20, gt=0)
    max_message_bytes: int = Field(default=64 << 10, gt=0)
    max_pending_inputs: int = Field(default=32, ge=1)
    timeout_s: float = Field(default=4.0, ge=3)
    retry_s: float = Field(default=15.0, ge=0)

    @field_validator("prefix")
    @classmethod
    def _no_hash_tag(cls, prefix: str) -> str:
        if "{" in prefix or "}" in prefix:
            raise ValueError("braces choose the slot in a Redis Cluster: give a prefix without")
        return prefix

    @property
    def resume_ms(self) -> int:
        return int(self.resume_s * 1000)

    @property
    def session_ttl_ms(self) -> int:
        return int(self.session_ttl_s * 1000)


class BusError(Exception):
    """Something the bus cannot do. `code` is one word for programs, the text is for people."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


def session_expired(session_id: str) -> BusError:
    return BusError("session_expired", f"session {session_id!r} is not in Redis (any more): open a new one")


class SessionMeta(BaseModel):
    """What Redis knows of a session besides its streams.

    `admitted` is the next seq, `decided` the next undecided seq, `position` the next log position and
    `first_position` the first one still there. `held`: a replica has an unexpired lease on it.
    `idle_ms`: time since the client was last heard of. `request`: the last admitted numbered request.
    `client` opened it, `connection` is the number of its newest connection, `time` that of the last admitted
    frame in the video; `preferences` and `counts` are what gateways keep there for each other.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    epoch: int = Field(ge=0)
    owner: str
    fingerprint: str
    state: Literal["open", "ending", "ended"]
    settings: SessionSettings
    admitted: int = Field(ge=0)
    decided: int = Field(ge=0)
    position: int = Field(ge=0)
    first_position: int = Field(ge=0)
    in_id: str
    window: bytes
    held: bool
    idle_ms: int
    request: int = -1
    client: str = ""
    connection: int = 1
    time: float = -1.0
    preferences: str = ""
    counts: str = ""

    @classmethod
    def from_redis(cls, session_id: str, fields: Mapping[bytes, bytes], held: bool, idle_ms: int) -> SessionMeta:
        """From the hash. Raises BusError naming the field that is wrong."""
        texts = {name.decode(): value.decode(errors="replace") for name, value in fields.items()}
        if texts.get("writer") != "":  # the numbers of a gateway's own requests mean nothing to others
            texts.pop("request", None)
        try:
            settings = SessionSettings.tolerant(texts.get("settings", ""))
            own = {"settings": settings, "window": fields.get(b"window"), "held": held, "idle_ms": max(idle_ms, 0)}
            return cls.model_validate(texts | own)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "settings"
            text = f"meta of session {session_id!r} in Redis: {where}: {problem['msg']}, found {problem['input']!r:.80}"
            raise BusError("session_damaged", text) from None


@dataclass(frozen=True)
class PendingFrame:
    """A frame this consumer has taken and must publish a result for; `deliveries` counts from 1."""

    entry_id: str
    stream: str
    deliveries: int
    frame: Frame


@dataclass(frozen=True)
class Lease:
    """The right to write a session's log, as long as its epoch is the newest."""

    session_id: str
    epoch: int


class LogConnection(ABC):
    """Redis as the sides see it: every call is retried for a while and then raises BusError."""

    def __init__(self, config: BusConfig) -> None:
        self.config = config
        self.keys = Keys(config.prefix)
        self.name = secrets.token_hex(8)  # tells this process's requests from those of others
        self.numbers = itertools.count(1)

    def partition(self, session_id: str) -> int:
        """The partition of a session: the same in every process and on every machine."""
        return zlib.crc32(session_id.encode()) % self.config.partitions

    def session_keys(self, session_id: str) -> list[str]:
        return self.keys.session(self.partition(session_id), session_id)

    @abstractmethod
    async def script(self, name: str, keys: Sequence[str], args: Sequence[str | int | float | bytes]) -> object:
        """Run the script of that name in scripts.py."""

    @abstractmethod
    async def read(self, after: Mapping[str, str], count: int, block_ms: int = 0) -> dict[str, list[Entry]]:
        """Entries of Redis streams behind the given ids; waits up to `block_ms` for the first."""

    @abstractmethod
    async def read_range(self, stream: str, first: str, count: int) -> list[Entry]:
        """Entries of one Redis stream from id `first` on."""

    @abstractmethod
    async def read_group(self, consumer: str, streams: Sequence[str], count: int) -> list[list[Entry]]:
        """New entries for this consumer of the encoders' group, up to `count` of each stream."""

    @abstractmethod
    async def stale(self, streams: Sequence[str], idle_ms: int, count: int) -> list[list[tuple[str, int]]]:
        """Entries of each stream that a consumer took longer ago than that, with their deliveries."""

    @abstractmethod
    async def take_over(self, consumer: str, stream: str, idle_ms: int, entry_ids: Sequence[str]) -> list[Entry]:
        """Those entries that are still idle for that long; they are this consumer's now."""

    @abstractmethod
    async def wake(self, partition: int) -> None:
        """End the reads that wait on a partition, in every process."""

    @abstractmethod
    async def drop(self, stream: str, entry_id: str) -> None:
        """Acknowledge and delete an entry that nobody can use."""

    @abstractmethod
    def announcements(self) -> AsyncIterator[str | None]:
        """What is announced on the ready channel; None when something may have been missed."""


def position_of(entry_id: str) -> int:
    """Log position of a `:out` entry: its Redis id is `{position + 1}-0`."""
    return int(entry_id.partition("-")[0]) - 1


def log_entry(session_id: str, entry_id: str, fields: Mapping[bytes, bytes]) -> LogEntry:
    """The entry. Raises BusError when it is none."""
    try:
        return checked(fields.get(b"m", b""), LogEntry.__args__)  # type: ignore[return-value]
    except MessageError as error:
        text = f"log of session {session_id!r}, position {position_of(entry_id)}: {error}"
        raise BusError("session_damaged", text) from None


def checked(data: bytes, kinds: tuple[type[Message], ...]) -> Message:
    """The message in `data`. Raises MessageError for bad bytes and for kinds that do not belong here."""
    message = decode(data)
    if not isinstance(message, kinds):
        raise MessageError(f"a {message.kind} message, expected one of {', '.join(kind.kind for kind in kinds)}")
    return message


def check_session_id(session_id: str) -> None:
    """Raises BusError for an id that cannot be part of a key."""
    if not SESSION_ID.fullmatch(session_id):
        raise BusError(
            "session_id",
            f"session id {session_id!r:.160}: expected 1 to 128 letters, digits, dots, dashes, underscores",
        )

"""The clients' side of the session log: open a session, admit frames within credits, send input, follow the log."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import AsyncIterator, Mapping, Set
from weakref import WeakValueDictionary

from actors.client_side import ClientSide
from actors.messages import (
    End,
    Frame,
    Interrupt,
    LogEntry,
    Query,
    SessionEnded,
    SessionSettings,
    SettingsChange,
    encode,
)
from actors.session_log import (
    BusConfig,
    BusError,
    Entry,
    LogConnection,
    check_session_id,
    log_entry,
    position_of,
    session_expired,
)
from actors.tails import CHECK_S, PartitionTails

TAIL_BLOCK_MS = 1000


class GatewaySide(ClientSide):
    """What a gateway does for its clients."""

    def __init__(self, config: BusConfig) -> None:
        super().__init__(config)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tails: dict[int, PartitionTails] = {}

    async def open_session(
        self, session_id: str, fingerprint: str, settings: SessionSettings, client: str = ""
    ) -> None:
        """A new session that any replica of that model fingerprint may claim. Raises BusError if the id is taken.

        Only `client` may attach to it later; its first connection has the number 1.
        """
        check_session_id(session_id)
        partition, ttl_ms = self.partition(session_id), self.config.session_ttl_ms
        answer = await self.script(
            "OPEN",
            [*self.session_keys(session_id), self.keys.leases(partition), self.keys.wake(partition)],
            [session_id, secrets.token_hex(8), fingerprint, settings.model_dump_json(), ttl_ms, client],
        )
        if answer != b"ok":
            raise BusError("session_exists", f"session {session_id!r} exists already: choose another id, or resume it")

    async def admit_frame(
        self,
        session_id: str,
        time: float,
        image: bytes,
        bulk: bool = False,
        request: int | None = None,
        connection: int | None = None,
        counts: str = "",
    ) -> int | None:
        """Give a frame its seq and queue it for the encoders; None when the session has no credit left.

        `request` numbers a client's frames upwards, across gateways: the same number again returns the
        same seq and admits nothing. `counts` is noted with the frame. Raises BusError for a session that is
        gone, ends or has a newer connection than `connection`, an image that is too large, or a number older
        than the last.
        """
        if len(image) > self.config.max_frame_bytes:
            raise BusError(
                "frame_too_large", f"an image of {len(image)} bytes, at most {self.config.max_frame_bytes} are taken"
            )
        partition = self.partition(session_id)
        # Redis gives the seq; the one inside the message is a placeholder that readers replace.
        message = encode(Frame(session_id=session_id, seq=0, time=time, image=image))
        limits = (self.config.credits, self.config.max_queued_frames)
        ttl_ms, attached = self.config.session_ttl_ms, _number(connection)
        announcement = (self.keys.ready, f"{'bulk' if bulk else 'live'}:{partition}")
        async with self._lock(session_id):
            writer, number = (self.name, next(self.numbers)) if request is None else ("", request)
            answer = await self.script(
                "ADMIT",
                [*self.session_keys(session_id), self.keys.frames(partition, bulk)],
                [session_id, writer, number, *limits, repr(time), message, ttl_ms, *announcement, attached, counts],
            )
        match answer:
            case [b"ok", int(seq)]:
                return seq
            case [b"full"]:
                return None
            case [b"late", bytes(last)]:
                raise BusError("request_late", f"frame request {request} came after {last.decode()} was admitted")
            case _:
                raise self._closed(session_id, answer)

    async def send(
        self, session_id: str, message: Query | Interrupt | SettingsChange | End, connection: int | None = None
    ) -> None:
        """Put a message into the session's input. A query with the id of an earlier one is not sent again.

        Raises BusError when too many wait already, the message is too large, the session is gone, or it
        has a newer connection than `connection`.
        """
        data = encode(message)
        if len(data) > self.config.max_message_bytes:
            raise BusError(
                "message_too_large",
                f"a {message.kind} of {len(data)} bytes, at most {self.config.max_message_bytes} are taken",
            )
        ttl_ms = self.config.session_ttl_ms
        query_id, most = message.query_id if isinstance(message, Query) else "", self.config.max_pending_inputs
        async with self._lock(session_id):
            answer = await self.script(
                "SEND",
                self.session_keys(session_id),
                [self.name, next(self.numbers), message.kind, query_id, most, data, ttl_ms, _number(connection)],
            )
        if answer == b"full":
            raise BusError(
                "too_many_inputs",
                f"{most} queries or changes of session {session_id!r} wait already, no more are taken: try later",
            )
        if answer != b"ok":
            raise self._closed(session_id, [answer])

    async def tail(
        self, session_id: str, after: int = -1, onlooker: bool = False
    ) -> AsyncIterator[tuple[int, LogEntry]]:
        """The log behind position `after`, with positions, as it grows; ends with the session.

        That somebody reads it says that the session's client is there, unless it is an `onlooker` who does.
        Raises BusError `session_expired` when the session vanishes, `resume_too_late` when what follows
        `after` was trimmed.
        """
        check_session_id(session_id)
        tails = self._partition_tails(self.partition(session_id))
        tail = await tails.add(session_id, after, onlooker)
        try:
            await self._check_resume(session_id, after)
            while (item := await tail.next()) is not None:
                yield item
                if isinstance(item[1], SessionEnded):
                    return
        finally:
            tails.remove(tail)

    async def touch(self, session_id: str) -> None:
        """Say that the client is still there. Following its log says so, too."""
        problem = (await PartitionLog(self, self.partition(session_id)).check({session_id: math.inf}))[session_id]
        if isinstance(problem, Exception):
            raise problem

    async def abandon(self, session_id: str, reason: str) -> bool:
        """End a session that no replica holds; its log's last entry says why. False when one holds it."""
        answer = await self.script(
            "ABANDON",
            [*self.session_keys(session_id), self.keys.leases(self.partition(session_id))],
            [session_id, encode(SessionEnded(reason=reason)), self.config.resume_ms],
        )
        return answer == 1

    async def close_tails(self) -> None:
        await asyncio.gather(*(tails.close() for tails in self._tails.values()))

    async def _check_resume(self, session_id: str, after: int) -> None:
        meta = await self.session_meta(session_id)
        if meta is None:
            raise session_expired(session_id)
        if after >= meta.position:
            raise _went_back(session_id, after)
        if after + 1 < meta.first_position:
            raise resume_too_late(session_id, after, meta.first_position)

    def _partition_tails(self, partition: int) -> PartitionTails:
        if partition not in self._tails:
            check_s = min(CHECK_S, self.config.resume_s / 4)
            self._tails[partition] = PartitionTails(PartitionLog(self, partition), check_s)
        return self._tails[partition]

    def _lock(self, session_id: str) -> asyncio.Lock:
        """One request of a session at a time: the scripts know a repeated one by the last number only."""
        check_session_id(session_id)
        lock = self._locks.get(session_id)
        if lock is None:
            lock = self._locks[session_id] = asyncio.Lock()
        return lock

    def _closed(self, session_id: str, answer: object) -> BusError:
        if answer == [b"taken"]:
            return BusError("session_taken", f"session {session_id!r} is connected elsewhere since")
        if answer == [b"ended"]:
            return BusError("session_ended", f"session {session_id!r} takes no more input: it has been ended")
        return session_expired(session_id)


def _number(connection: int | None) -> int | str:
    return "" if connection is None else connection


class PartitionLog:
    """The logs of one partition, as tails read them."""

    def __init__(self, connection: LogConnection, partition: int) -> None:
        self._connection = connection
        self._partition = partition
        self._wake = connection.keys.wake(partition)
        self._wake_id = "0-0"

    async def read(self, after: Mapping[str, int], count: int) -> dict[str, list[tuple[int, LogEntry]] | Exception]:
        streams = {self._connection.keys.output(self._partition, session_id): session_id for session_id in after}
        ids = {stream: f"{after[session_id] + 1}-0" for stream, session_id in streams.items()}
        replies = await self._connection.read({self._wake: self._wake_id, **ids}, count, TAIL_BLOCK_MS)
        if woken := replies.pop(self._wake, None):
            self._wake_id = woken[-1][0]
        found: dict[str, list[tuple[int, LogEntry]] | Exception] = {}
        for stream, entries in replies.items():
            session_id = streams[stream]
            try:
                found[session_id] = _gap_free(session_id, after[session_id], entries)
            except BusError as error:
                found[session_id] = error
        return found

    async def check(self, after: Mapping[str, float], onlookers: Set[str] = frozenset()) -> dict[str, bool | Exception]:
        if not after:
            return {}
        keys = [key for session_id in after for key in self._connection.session_keys(session_id)]
        there = [int(session_id not in onlookers) for session_id in after]
        answer = await self._connection.script("TOUCH", keys, [self._connection.config.session_ttl_ms, *there])
        assert isinstance(answer, list)
        return {
            session_id: _state(session_id, last, state, position)
            for (session_id, last), (state, position) in zip(after.items(), answer, strict=True)
        }

    async def wake(self) -> None:
        await self._connection.wake(self._partition)


def _state(session_id: str, last: float, state: bytes, position: int) -> bool | BusError:
    """Whether a log that was read up to `last` is over; the error when it is gone, or shorter than what was read."""
    if not state:
        return session_expired(session_id)
    if position <= last < math.inf:
        return _went_back(session_id, last)
    return state == b"ended" and position <= last + 1


def _went_back(session_id: str, last: float) -> BusError:
    text = f"the log of session {session_id!r} ends before {last:g}: Redis has lost data"
    return BusError("session_expired", text)


def _gap_free(session_id: str, after: int, entries: list[Entry]) -> list[tuple[int, LogEntry]]:
    found = []
    for entry_id, fields in entries:
        position = position_of(entry_id)
        if position != after + 1:
            raise resume_too_late(session_id, after, position)
        found.append((position, log_entry(session_id, entry_id, fields)))
        after = position
    return found


def resume_too_late(session_id: str, after: int, first: int) -> BusError:
    text = f"the log of session {session_id!r} begins at {first}, position {after + 1} was asked for: it was trimmed"
    return BusError("resume_too_late", text)

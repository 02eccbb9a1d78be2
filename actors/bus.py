"""The bus: frames to encoders, input to the LLM and the session log to gateways, all in Redis.

`Bus` is one process's connection: gateway_side.py, encoder_side.py and owner_side.py say what it can
do, this module how it reaches Redis. Every step that must be whole is one Lua script (scripts.py);
every call may be repeated without acting twice, so a call goes on trying, with growing pauses, while
Redis is away, and raises BusError after `retry_s`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TypedDict, TypeVar, cast

from redis import exceptions

from actors import scripts
from actors.encoder_side import EncoderSide
from actors.gateway_side import GatewaySide
from actors.owner_side import OwnerSide
from actors.redis_address import AddressError, parse
from actors.redis_client import Command, RedisClient, Script, SingleClient
from actors.redis_cluster import ClusterClient
from actors.redis_errors import FAILURES, failure, is_away
from actors.replicas import ReplicaSide
from actors.scripts import GROUP
from actors.session_log import BusConfig, BusError, Entry, Lease, PendingFrame, SessionMeta
from actors.tasks import cancellable

__all__ = ["Bus", "BusConfig", "BusError", "Lease", "PendingFrame", "SessionMeta"]

log = logging.getLogger(__name__)

OLDEST_VERSION = (6, 2)
LONGEST_BLOCK_MS = 2000  # below every socket timeout, or a quiet read looks like a dead server
CONNECT_RETRY_S = 2.0
LONGEST_PAUSE_S = 1.0
QUIET_S = 10.0

T = TypeVar("T")
RawEntries = Sequence[tuple[bytes | None, dict[bytes, bytes] | None]]


StreamReplies = list[tuple[bytes, RawEntries]]


class PendingEntry(TypedDict):
    message_id: bytes
    times_delivered: int


class Bus(GatewaySide, EncoderSide, OwnerSide, ReplicaSide):
    """One process's connection to the session log. Made with `connect`, ended with `close`."""

    def __init__(self, config: BusConfig, url: str) -> None:
        super().__init__(config)
        try:
            self.address = parse(url)
        except AddressError as error:
            raise BusError("redis_address", str(error)) from None
        kind: type[RedisClient] = ClusterClient if self.address.kind == "cluster" else SingleClient
        self.client = kind(self.address, config.timeout_s)
        self._scripts = {name: Script(self.client, text) for name, text in scripts.texts().items()}
        self._retry_s = min(config.retry_s, CONNECT_RETRY_S)

    @classmethod
    async def connect(cls, config: BusConfig, url: str | None = None) -> Bus:
        """Connect to `url`, else `config.url`, else REDIS_URL; redis_address.py has the forms of an address.

        Raises BusError when the server is unreachable, refuses us, is too old, may evict keys, or holds
        a session log with another number of partitions.
        """
        url = url or config.url or os.environ.get("REDIS_URL")
        if not url:
            raise BusError("redis_address", "no Redis address: set REDIS_URL or bus.url, or start a RedisServer")
        bus = cls(config, url)
        try:
            await bus._check_server()
            await bus._check_partitions()
        except BaseException:
            await bus.close()
            raise
        bus._retry_s = config.retry_s
        return bus

    async def close(self) -> None:
        """Stop reading and close all connections. Tails end."""
        await self.close_tails()
        await self.close_listener()
        await self.close_renewals()
        await self.client.close()

    async def generation(self) -> str:
        """Made up when the server was first used; another one means that Redis has lost its data."""
        return (await self._register())[1]

    async def script(self, name: str, keys: Sequence[str], args: Sequence[str | int | float | bytes]) -> object:
        run = self._scripts[name]

        async def attempt() -> object:
            result: object = await run(keys=keys, args=args)
            return result

        return await self._call(attempt)

    async def read(self, after: Mapping[str, str], count: int, block_ms: int = 0) -> dict[str, list[Entry]]:
        wait = ("BLOCK", min(block_ms, LONGEST_BLOCK_MS)) if block_ms > 0 else ()
        ask = self.client.wait if wait else self.client.run
        command = ("XREAD", "COUNT", count, *wait, "STREAMS", *after.keys(), *after.values())
        first = next(iter(after))
        replies = cast(StreamReplies | None, await self._call(lambda: ask(first, command)))
        return {stream.decode(): _entries(entries) for stream, entries in replies or ()}

    async def read_range(self, stream: str, first: str, count: int) -> list[Entry]:
        return _entries(await self._run(stream, ("XRANGE", stream, first, "+", "COUNT", count)))

    async def read_group(self, consumer: str, streams: Sequence[str], count: int) -> list[list[Entry]]:
        commands = [
            ("XREADGROUP", "GROUP", GROUP, consumer, "COUNT", count, "STREAMS", stream, ">") for stream in streams
        ]
        replies = cast(list[StreamReplies | None], await self._grouped(streams, commands))
        return [[entry for _, entries in reply or () for entry in _entries(entries)] for reply in replies]

    async def stale(self, streams: Sequence[str], idle_ms: int, count: int) -> list[list[tuple[str, int]]]:
        commands = [("XPENDING", stream, GROUP, "IDLE", idle_ms, "-", "+", count) for stream in streams]
        replies = cast(list[list[PendingEntry] | None], await self._grouped(streams, commands))
        return [[(item["message_id"].decode(), item["times_delivered"]) for item in reply or ()] for reply in replies]

    async def take_over(self, consumer: str, stream: str, idle_ms: int, entry_ids: Sequence[str]) -> list[Entry]:
        return _entries(await self._run(stream, ("XCLAIM", stream, GROUP, consumer, idle_ms, *entry_ids)))

    async def wake(self, partition: int) -> None:
        key = self.keys.wake(partition)
        await self._run(key, ("XADD", key, "MAXLEN", 64, "*", "s", ""))

    async def drop(self, stream: str, entry_id: str) -> None:
        await self._run(stream, ("XACK", stream, GROUP, entry_id))
        await self._run(stream, ("XDEL", stream, entry_id))

    async def announcements(self) -> AsyncIterator[str | None]:
        pauses = _pauses()
        while True:
            pubsub = None
            try:
                with cancellable():
                    pubsub = await self.client.listener()
                    await pubsub.subscribe(self.keys.ready)
                yield None
                pauses = _pauses()
                while True:
                    with cancellable():
                        message = await pubsub.get_message(timeout=QUIET_S)
                        if message is None:
                            await pubsub.ping()  # a connection that died silently shows when it is written to
                            continue
                    if message["type"] == "message":
                        yield message["data"].decode()
            except FAILURES as error:
                log.warning("%s; announcements are interrupted", failure(error, self.address).text)
                await asyncio.sleep(next(pauses))
            finally:
                if pubsub is not None:
                    await pubsub.aclose()

    async def _grouped(self, streams: Sequence[str], commands: Sequence[Command]) -> list[object]:
        """Replies to one command a stream, None where its server is away while others answer.

        Makes the encoders' group where there is none (data loss, first use).
        """

        async def attempt() -> list[object]:
            replies = await self.client.run_each(streams, commands)
            missing = [place for place, reply in enumerate(replies) if _no_group(reply)]
            if missing:
                of = [streams[place] for place in missing]
                # An error means that another encoder was quicker.
                await self.client.run_each(of, [("XGROUP", "CREATE", stream, GROUP, "0", "MKSTREAM") for stream in of])
                again = await self.client.run_each(of, [commands[place] for place in missing])
                for place, reply in zip(missing, again, strict=True):
                    replies[place] = reply
            return self._without_those_away(streams, replies)

        return await self._call(attempt)

    def _without_those_away(self, streams: Sequence[str], replies: Sequence[object]) -> list[object]:
        """None in place of failures that will pass, as long as some stream has answered; raises the others."""
        away = [reply for reply in replies if isinstance(reply, Exception) and is_away(reply)]
        for reply in replies:
            if isinstance(reply, Exception) and (len(away) == len(replies) or not is_away(reply)):
                raise reply
        if away:
            log.warning("%d of %d frames streams do not answer: %s", len(away), len(streams), type(away[0]).__name__)
        return [None if isinstance(reply, Exception) else reply for reply in replies]

    async def _run(self, key: str, command: Command) -> RawEntries:
        """The reply to a command whose repetition does no harm."""
        return cast(RawEntries, await self._call(lambda: self.client.run(key, command)))

    async def _call(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """What `attempt` returns, tried again while Redis is away. Raises BusError."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._retry_s
        pauses = _pauses()
        while True:
            try:
                with cancellable():
                    return await attempt()
            except FAILURES as error:
                problem = failure(error, self.address)
                pause_s = next(pauses)
                if not problem.passing or loop.time() + pause_s > deadline:
                    raise problem.raised() from None
                await asyncio.sleep(pause_s)

    async def _check_server(self) -> None:
        for server, info in (await self._call(self.client.infos)).items():
            _check_info(server, info)

    async def _check_partitions(self) -> None:
        partitions, _ = await self._register()
        if partitions != self.config.partitions:
            raise BusError(
                "redis_partitions",
                f"the session log at {self.address.shown} (prefix {self.config.prefix!r}) has {partitions} partitions, "
                f"bus.partitions is {self.config.partitions}: use the same number, or another prefix",
            )

    async def _register(self) -> tuple[int, str]:
        answer = await self.script("REGISTER", [self.keys.bus], [self.config.partitions, secrets.token_hex(16)])
        match answer:
            case [bytes(partitions), bytes(generation)] if partitions.isdigit():
                return int(partitions), generation.decode()
        raise BusError("redis_error", f"{self.keys.bus} at {self.address.shown} holds {answer!r:.80}, no session log")


def _check_info(server: str, info: Mapping[str, object]) -> None:
    """Raises BusError for a server that cannot hold a session log."""
    if "sentinel" in (info.get("redis_mode"), info.get("server_mode")):
        raise BusError(
            "redis_address",
            f"{server} is a Sentinel: give its address as redis+sentinel://host:port/name-of-its-master",
        )
    found = str(info.get("redis_version", "unknown"))
    parts = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if parts < OLDEST_VERSION:
        raise BusError("redis_version", f"Redis at {server} is version {found}, expected 6.2 or newer")
    policy = info.get("maxmemory_policy", "unknown")
    if policy != "noeviction":
        raise BusError(
            "redis_policy",
            f"Redis at {server} has maxmemory-policy {policy}, expected noeviction, or it may drop parts of "
            "sessions: run `CONFIG SET maxmemory-policy noeviction` and set it in the server's configuration",
        )


def _no_group(reply: object) -> bool:
    return isinstance(reply, exceptions.ResponseError) and "NOGROUP" in str(reply)


def _entries(raw: RawEntries) -> list[Entry]:
    """Entries as (id, fields); Redis 6.2 gives no fields for one that was deleted."""
    return [(entry_id.decode(), fields or {}) for entry_id, fields in raw if entry_id is not None]


def _pauses() -> Iterator[float]:
    """Seconds to wait before each repetition: growing, and different in every process."""
    pause_s = 0.02
    while True:
        yield pause_s * random.uniform(0.5, 1.5)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

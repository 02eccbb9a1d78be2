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
from typing import TypedDict, TypeVar
from urllib.parse import urlsplit

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from actors import scripts
from actors.encoder_side import EncoderSide
from actors.gateway_side import GatewaySide
from actors.owner_side import OwnerSide
from actors.scripts import GROUP
from actors.session_log import BusConfig, BusError, Entry, Lease, PendingFrame, SessionMeta

__all__ = ["Bus", "BusConfig", "BusError", "Lease", "PendingFrame", "SessionMeta"]

log = logging.getLogger(__name__)

OLDEST_VERSION = (6, 2)
LONGEST_BLOCK_MS = 2000  # below every socket timeout, or a quiet read looks like a dead server
COMMAND_CONNECTIONS = 16
CONNECT_RETRY_S = 2.0
LONGEST_PAUSE_S = 1.0
QUIET_S = 10.0

T = TypeVar("T")
RawEntries = Sequence[tuple[bytes | None, dict[bytes, bytes] | None]]


class PendingEntry(TypedDict):
    message_id: bytes
    times_delivered: int


class Bus(GatewaySide, EncoderSide, OwnerSide):
    """One process's connection to the session log. Made with `connect`, ended with `close`."""

    def __init__(self, config: BusConfig, url: str) -> None:
        super().__init__(config)
        self.address = _address(url)
        timeouts = {"socket_timeout": config.timeout_s, "socket_connect_timeout": config.timeout_s}
        # redis-py repeats commands by itself, for a minute by default; only this module may, in bounded time.
        once = {"retry": Retry(NoBackoff(), 0), "protocol": 2}
        try:
            commands = BlockingConnectionPool.from_url(
                url, max_connections=COMMAND_CONNECTIONS, timeout=config.timeout_s, **timeouts, **once
            )
            readers = ConnectionPool.from_url(url, max_connections=1 << 16, **timeouts, **once)
        except ValueError:
            raise _bad_address() from None
        self._redis = Redis.from_pool(commands)
        self._readers = Redis.from_pool(readers)
        self._scripts = {name: self._redis.register_script(text) for name, text in scripts.texts().items()}
        self._retry_s = min(config.retry_s, CONNECT_RETRY_S)

    @classmethod
    async def connect(cls, config: BusConfig, url: str | None = None) -> Bus:
        """Connect to `url`, else `config.url`, else REDIS_URL.

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
        await self._redis.aclose(close_connection_pool=True)
        await self._readers.aclose(close_connection_pool=True)

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
        redis = self._readers if wait else self._redis
        command = ("XREAD", "COUNT", count, *wait, "STREAMS", *after.keys(), *after.values())
        replies: list[tuple[bytes, RawEntries]] = await self._call(lambda: redis.execute_command(*command)) or []
        return {stream.decode(): _entries(entries) for stream, entries in replies}

    async def read_range(self, stream: str, first: str, count: int) -> list[Entry]:
        command = ("XRANGE", stream, first, "+", "COUNT", count)
        return _entries(await self._call(lambda: self._redis.execute_command(*command)))

    async def read_group(self, consumer: str, streams: Sequence[str], count: int) -> list[list[Entry]]:
        commands = [
            ("XREADGROUP", "GROUP", GROUP, consumer, "COUNT", count, "STREAMS", stream, ">") for stream in streams
        ]
        replies: list[list[tuple[bytes, RawEntries]]] = await self._grouped(streams, commands)
        return [[entry for _, entries in reply or () for entry in _entries(entries)] for reply in replies]

    async def stale(self, streams: Sequence[str], idle_ms: int, count: int) -> list[list[tuple[str, int]]]:
        commands = [("XPENDING", stream, GROUP, "IDLE", idle_ms, "-", "+", count) for stream in streams]
        replies: list[list[PendingEntry]] = await self._grouped(streams, commands)
        return [[(item["message_id"].decode(), item["times_delivered"]) for item in reply] for reply in replies]

    async def take_over(self, consumer: str, stream: str, idle_ms: int, entry_ids: Sequence[str]) -> list[Entry]:
        command = ("XCLAIM", stream, GROUP, consumer, idle_ms, *entry_ids)
        return _entries(await self._call(lambda: self._redis.execute_command(*command)))

    async def wake(self, partition: int) -> None:
        await self._call(lambda: self._redis.xadd(self.keys.wake(partition), {"s": ""}, maxlen=64, approximate=False))

    async def drop(self, stream: str, entry_id: str) -> None:
        await self._call(lambda: self._redis.xack(stream, GROUP, entry_id))
        await self._call(lambda: self._redis.xdel(stream, entry_id))

    async def announcements(self) -> AsyncIterator[str | None]:
        pauses = _pauses()
        while True:
            pubsub = self._readers.pubsub()
            try:
                await pubsub.subscribe(self.keys.ready)
                yield None
                pauses = _pauses()
                while True:
                    message = await pubsub.get_message(timeout=QUIET_S)
                    if message is None:
                        await pubsub.ping()  # a connection that died silently shows when it is written to
                    elif message["type"] == "message":
                        yield message["data"].decode()
            except (exceptions.ConnectionError, exceptions.TimeoutError) as error:
                log.warning("redis=%s announcements interrupted: %s", self.address, type(error).__name__)
                await asyncio.sleep(next(pauses))
            finally:
                await pubsub.aclose()

    async def _grouped(self, streams: Sequence[str], commands: Sequence[tuple[str | int, ...]]) -> list:
        """Replies to one command a stream; makes the encoders' group where there is none (data loss, first use)."""

        async def attempt() -> list:
            replies = await self._pipelined(commands)
            missing = [stream for stream, reply in zip(streams, replies, strict=True) if _no_group(reply)]
            if missing:
                # An error means that another encoder was quicker.
                await self._pipelined([("XGROUP", "CREATE", stream, GROUP, "0", "MKSTREAM") for stream in missing])
                replies = await self._pipelined(commands)
            for reply in replies:
                if isinstance(reply, exceptions.RedisError):
                    raise reply
            return replies

        return await self._call(attempt)

    async def _pipelined(self, commands: Sequence[tuple[str | int, ...]]) -> list:
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command, parse_detail=True)  # for XPENDING, whose reply has two forms
        return await pipeline.execute(raise_on_error=False)

    async def _call(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """What `attempt` returns, tried again while Redis is away. Raises BusError."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._retry_s
        pauses = _pauses()
        while True:
            try:
                return await attempt()
            except exceptions.AuthenticationError as error:
                text = f"Redis at {self.address} refuses the user or password in its address ({error})"
                raise BusError("redis_auth", text) from None
            except (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ReadOnlyError) as error:
                pause_s = next(pauses)
                if loop.time() + pause_s > deadline:
                    text = f"no answer from Redis at {self.address} ({type(error).__name__}): is it running?"
                    raise BusError("redis_unreachable", text) from None
                await asyncio.sleep(pause_s)
            except exceptions.RedisError as error:
                if isinstance(error, exceptions.OutOfMemoryError) or "OOM command" in str(error):
                    text = f"Redis at {self.address} is full (maxmemory): give it more memory or fewer sessions"
                    raise BusError("redis_full", text) from None
                raise BusError("redis_error", f"Redis at {self.address}: {error}") from None

    async def _check_server(self) -> None:
        info = await self._call(lambda: self._redis.info())
        found = str(info.get("redis_version", "unknown"))
        parts = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
        if parts < OLDEST_VERSION:
            raise BusError("redis_version", f"Redis at {self.address} is version {found}, expected 6.2 or newer")
        policy = info.get("maxmemory_policy", "unknown")
        if policy != "noeviction":
            raise BusError(
                "redis_policy",
                f"Redis at {self.address} has maxmemory-policy {policy}, expected noeviction, or it may drop parts of "
                "sessions: run `CONFIG SET maxmemory-policy noeviction` and set it in the server's configuration",
            )

    async def _check_partitions(self) -> None:
        partitions, _ = await self._register()
        if partitions != self.config.partitions:
            raise BusError(
                "redis_partitions",
                f"the session log at {self.address} (prefix {self.config.prefix!r}) has {partitions} partitions, "
                f"bus.partitions is {self.config.partitions}: use the same number, or another prefix",
            )

    async def _register(self) -> tuple[int, str]:
        answer = await self.script("REGISTER", [self.keys.bus], [self.config.partitions, secrets.token_hex(16)])
        match answer:
            case [bytes(partitions), bytes(generation)] if partitions.isdigit():
                return int(partitions), generation.decode()
        raise BusError("redis_error", f"{self.keys.bus} at {self.address} holds {answer!r:.80}, no session log")


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


def _address(url: str) -> str:
    """Host and port, for messages: an address may hold a password."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("redis", "rediss", "unix"):
            raise ValueError(parts.scheme)
        return parts.path if parts.scheme == "unix" else f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
    except ValueError:
        raise _bad_address() from None


def _bad_address() -> BusError:
    return BusError("redis_address", "the Redis address is not of the form redis[s]://[user:password@]host:port[/db]")

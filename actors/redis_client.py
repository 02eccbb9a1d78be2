"""Commands to the server that holds their keys: here one server or a Sentinel's master, a cluster in redis_cluster.py.

The caller names a key with every command; all keys of a command lie in one partition. redis-py
repeats commands by itself, for a minute by default: here nothing is repeated, the bus alone decides
how long to go on.
"""

from __future__ import annotations

import asyncio
import hashlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TypedDict

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from actors.redis_address import RedisAddress

COMMANDS_AT_ONCE = 16  # connections of a process to one server, besides those that wait

Command = Sequence[str | int | float | bytes]


class ConnectionSettings(TypedDict, total=False):
    """redis-py's names."""

    username: str | None
    password: str | None
    socket_timeout: float
    socket_connect_timeout: float
    retry: Retry
    protocol: int
    db: int
    ssl: bool
    ssl_ca_certs: str | None
    ssl_certfile: str | None
    ssl_keyfile: str | None
    ssl_check_hostname: bool
    ssl_cert_reqs: str


class RedisClient(ABC):
    """What the bus needs of Redis. Errors are redis-py's."""

    def __init__(self, address: RedisAddress, timeout_s: float) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._free: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(COMMANDS_AT_ONCE))

    @abstractmethod
    async def run(self, key: str, command: Command) -> object:
        """The reply to a command whose keys lie where `key` does."""

    @abstractmethod
    async def wait(self, key: str, command: Command) -> object:
        """The reply to a command that blocks, on a connection beside those of `run`."""

    @abstractmethod
    async def run_each(self, keys: Sequence[str], commands: Sequence[Command]) -> list[object]:
        """Replies to many commands, one round trip a server; what fails is its exception."""

    @abstractmethod
    async def infos(self) -> Mapping[str, Mapping[str, object]]:
        """INFO of every server that takes writes, by address."""

    @abstractmethod
    async def listener(self) -> PubSub:
        """Subscriptions on a connection of their own; the caller closes it."""

    @abstractmethod
    async def close(self) -> None:
        """End all connections."""

    @asynccontextmanager
    async def turn(self, server: str) -> AsyncIterator[None]:
        """One of the connections to that server, waited for within the time limit of a command."""
        free = self._free[server]
        try:
            async with asyncio.timeout(self._timeout_s if free.locked() else None):
                await free.acquire()
        except TimeoutError:
            raise exceptions.TimeoutError(f"all {COMMANDS_AT_ONCE} connections are in use") from None
        try:
            yield
        finally:
            free.release()


class SingleClient(RedisClient):
    """One server; behind a Sentinel, whichever is the master when a connection is made."""

    def __init__(self, address: RedisAddress, timeout_s: float) -> None:
        super().__init__(address, timeout_s)
        settings = connection_settings(address, timeout_s)
        settings["db"] = address.database
        self._sentinel: Sentinel | None = None
        if address.kind == "sentinel":
            own = connection_settings(address, timeout_s)
            own["username"], own["password"] = address.sentinel_user, address.sentinel_password
            self._sentinel = Sentinel(list(address.hosts), sentinel_kwargs=own, **settings)
        self.commands = self._connections(settings)
        self.readers = self._connections(settings)

    async def run(self, key: str, command: Command) -> object:
        async with self.turn(""):
            return await self.commands.execute_command(*command)

    async def wait(self, key: str, command: Command) -> object:
        return await self.readers.execute_command(*command)

    async def run_each(self, keys: Sequence[str], commands: Sequence[Command]) -> list[object]:
        async with self.turn(""):
            return await pipelined(self.commands, commands)

    async def infos(self) -> Mapping[str, Mapping[str, object]]:
        return {self.address.shown: await self.commands.info()}

    async def listener(self) -> PubSub:
        return self.readers.pubsub()

    async def close(self) -> None:
        await self.commands.aclose(close_connection_pool=True)
        await self.readers.aclose(close_connection_pool=True)
        if self._sentinel is not None:
            await self._sentinel.aclose()

    def _connections(self, settings: ConnectionSettings) -> Redis:
        if self._sentinel is not None:
            master: Redis = self._sentinel.master_for(self.address.master)
            return master
        if self.address.socket is not None:
            return Redis(unix_socket_path=self.address.socket, **settings)
        [(host, port)] = self.address.hosts
        return Redis(host=host, port=port, **settings)


class Script:
    """A Lua script that servers are sent once and then know by its digest."""

    def __init__(self, client: RedisClient, text: str) -> None:
        self._client = client
        self._text = text
        self._digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, keys: Sequence[str], args: Sequence[str | int | float | bytes]) -> object:
        try:
            return await self._client.run(keys[0], ("EVALSHA", self._digest, len(keys), *keys, *args))
        except exceptions.NoScriptError:
            return await self._client.run(keys[0], ("EVAL", self._text, len(keys), *keys, *args))


def connection_settings(address: RedisAddress, timeout_s: float) -> ConnectionSettings:
    """What redis-py wants to know of every connection."""
    settings: ConnectionSettings = {
        "username": address.user,
        "password": address.password,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    if address.tls is not None:
        settings |= {
            "ssl": True,
            "ssl_ca_certs": address.tls.ca_certs,
            "ssl_certfile": address.tls.certfile,
            "ssl_keyfile": address.tls.keyfile,
            "ssl_check_hostname": address.tls.check_hostname and address.tls.verify,
            "ssl_cert_reqs": "required" if address.tls.verify else "none",
        }
    return settings


async def pipelined(redis: Redis, commands: Sequence[Command]) -> list[object]:
    """Replies to commands in one round trip; what a command fails with is its reply."""
    pipeline = redis.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command, parse_detail=True)  # for XPENDING, whose reply has two forms
    return list(await pipeline.execute(raise_on_error=False))

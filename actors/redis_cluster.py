"""The masters of a Redis Cluster: each command goes to the one that holds its key.

redis-py's own cluster client stops for all keys while it asks a node that is away, and sends ASKING
on any connection. Here a node that is away holds up its own partitions only: the map of slots is read
again when a command to that node fails, from the others first.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.crc import key_slot

from actors.redis_address import RedisAddress
from actors.redis_client import Command, RedisClient, connection_settings, pipelined
from actors.redis_errors import FAILURES, is_away

log = logging.getLogger(__name__)

MOST_REDIRECTIONS = 5

T = TypeVar("T")
Place = tuple[str, int]
SlotRange = tuple[int, int, Sequence[bytes | int]]  # and replicas


class ClusterClient(RedisClient):
    """Connections to all masters, and which slots they hold."""

    def __init__(self, address: RedisAddress, timeout_s: float) -> None:
        super().__init__(address, timeout_s)
        self._settings = connection_settings(address, timeout_s)
        self._nodes: dict[Place, Redis] = {}
        self._slots: dict[int, Place] = {}
        self._doubtful: set[Place] = set()  # nodes that failed since the map was read
        self._reading = asyncio.Lock()

    async def run(self, key: str, command: Command) -> object:
        async def on(redis: Redis, place: Place) -> object:
            async with self.turn(_name(place)):
                return await redis.execute_command(*command)

        return await self._follow(key, command, on)

    async def wait(self, key: str, command: Command) -> object:
        return await self._follow(key, command, lambda redis, _: redis.execute_command(*command))

    async def run_each(self, keys: Sequence[str], commands: Sequence[Command]) -> list[object]:
        groups: dict[Place, list[int]] = defaultdict(list)
        for number, key in enumerate(keys):
            groups[await self._place(key)].append(number)
        replies: list[object] = [None] * len(commands)

        async def ask(place: Place, numbers: list[int]) -> None:
            try:
                async with self.turn(_name(place)):
                    answers = await pipelined(self._redis(place), [commands[number] for number in numbers])
            except Exception as error:
                if not is_away(error):
                    raise
                self._doubtful.add(place)
                answers = [error] * len(numbers)
            for number, answer in zip(numbers, answers, strict=True):
                replies[number] = answer

        await asyncio.gather(*(ask(place, numbers) for place, numbers in groups.items()))
        for number, reply in enumerate(replies):
            if isinstance(reply, exceptions.AskError):
                replies[number] = await self._redirected(keys[number], commands[number], reply)
        return replies

    async def infos(self) -> Mapping[str, Mapping[str, object]]:
        await self._read_map()
        masters = sorted(set(self._slots.values()))
        infos = await asyncio.gather(*(self._redis(place).info() for place in masters))
        return {_name(place): info for place, info in zip(masters, infos, strict=True)}

    async def listener(self) -> PubSub:
        """On any master: a cluster hands every message on to all nodes."""
        if not self._slots or self._doubtful:
            await self._read_map()
        places = sorted(set(self._slots.values()))
        return self._redis(random.choice(places)).pubsub()

    async def close(self) -> None:
        await asyncio.gather(*(redis.aclose(close_connection_pool=True) for redis in self._nodes.values()))

    async def _follow(self, key: str, command: Command, on: Callable[[Redis, Place], Awaitable[T]]) -> T | object:
        """What `on` returns for the master of `key`, wherever the cluster says that it is."""
        for _ in range(MOST_REDIRECTIONS):
            place = await self._place(key)
            try:
                return await on(self._redis(place), place)
            except exceptions.MovedError as error:
                self._note_move(error)
            except exceptions.AskError as error:
                return await self._asking(command, error)
            except FAILURES as error:
                if is_away(error):
                    self._doubtful.add(place)
                raise
        raise exceptions.ClusterError(f"{MOST_REDIRECTIONS} redirections")

    async def _redirected(self, key: str, command: Command, redirection: exceptions.AskError) -> object:
        try:
            if not isinstance(redirection, exceptions.MovedError):
                return await self._asking(command, redirection)
            self._note_move(redirection)
            [reply] = await pipelined(self._redis(await self._place(key)), [command])
        except FAILURES as error:
            return error
        return reply

    async def _asking(self, command: Command, redirection: exceptions.AskError) -> object:
        """The reply of the node that a slot is on its way to; ASKING holds for the next command of a connection."""
        place = redirection.host, redirection.port
        _, reply = await pipelined(self._redis(place), [("ASKING",), command])
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _note_move(self, moved: exceptions.MovedError) -> None:
        self._slots[moved.slot_id] = (moved.host, moved.port)

    async def _place(self, key: str) -> Place:
        slot = key_slot(key.encode())
        place = self._slots.get(slot)
        if place is None or place in self._doubtful:
            await self._read_map()
            place = self._slots.get(slot)
        if place is None:
            raise exceptions.SlotNotCoveredError(f"no node holds slot {slot}")
        return place

    async def _read_map(self) -> None:
        """Which node holds which slot, from the first node that says so. Raises what the last one failed with."""
        before = self._slots
        async with self._reading:
            if self._slots is not before:
                return  # another call has read it meanwhile
            known = [place for place in self._nodes if place not in self._doubtful]
            random.shuffle(known)
            asked = [*known, *self.address.hosts, *self._doubtful]
            last: Exception = exceptions.ClusterDownError("no node is known")
            for place in dict.fromkeys(asked):
                try:
                    ranges = await self._redis(place).execute_command("CLUSTER SLOTS")
                except FAILURES as error:
                    last = error
                    if not is_away(error):
                        break
                    continue
                if found := _slots(place, ranges):
                    self._slots = found
                    self._doubtful.clear()
                    await self._forget(set(found.values()) | set(self.address.hosts))
                    return
                last = exceptions.ClusterDownError("no slots are assigned")
            raise last

    async def _forget(self, needed: set[Place]) -> None:
        """Close connections to nodes that hold nothing any more."""
        for place in self._nodes.keys() - needed:
            log.info("redis=%s is no master any more", _name(place))
            await self._nodes.pop(place).aclose(close_connection_pool=True)

    def _redis(self, place: Place) -> Redis:
        if place not in self._nodes:
            host, port = place
            self._nodes[place] = Redis(host=host, port=port, **self._settings)
        return self._nodes[place]


def _slots(asked: Place, ranges: Sequence[SlotRange]) -> dict[int, Place]:
    """Slot to master; a node that does not know its own address leaves it empty."""
    found: dict[int, Place] = {}
    for first, last, master, *_ in ranges:
        host, port = master[0], int(master[1])
        place = (host.decode() if isinstance(host, bytes) else str(host)) or asked[0], port
        found |= dict.fromkeys(range(first, last + 1), place)
    return found


def _name(place: Place) -> str:
    return f"{place[0]}:{place[1]}"

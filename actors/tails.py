"""Following many session logs with one blocking read per partition.

A gateway process shows hundreds of sessions; a blocked Redis connection for each would be too many.
Every partition has one reader that asks for all followed logs at once and hands the entries on. A
consumer that does not keep up is left out of the read until it has, so its memory is bounded and
the others go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Protocol

from actors.messages import LogEntry
from actors.tasks import end_all

READ_COUNT = 64
QUEUE_ENTRIES = 256
CHECK_S = 5.0


class LogSource(Protocol):
    """The logs of one partition. Failures that concern one session are values, others are raised."""

    async def read(self, after: Mapping[str, int], count: int) -> Mapping[str, list[tuple[int, LogEntry]] | Exception]:
        """Entries behind each session's position, at most `count` of each; waits a while, or until woken."""

    async def check(self, after: Mapping[str, int], onlookers: Set[str]) -> Mapping[str, bool | Exception]:
        """True for a session that has ended and whose log holds nothing behind its position.

        Says that the clients of all but `onlookers` are there.
        """

    async def wake(self) -> None:
        """End a `read` that waits."""


@dataclass(eq=False)
class Tail:
    """One consumer of one log: the position it has been handed, and what it has not fetched yet.

    An `onlooker` is nobody for whom the session would have to go on.
    """

    session_id: str
    after: int
    wake: Callable[[], Awaitable[None]]
    onlooker: bool = False
    queue: asyncio.Queue[tuple[int, LogEntry] | Exception | None] = field(default_factory=asyncio.Queue)
    paused: bool = False
    finished: bool = False

    async def next(self) -> tuple[int, LogEntry] | None:
        """The next entry with its position, None at the end. Raises what went wrong with the log."""
        item = await self.queue.get()
        if self.paused and self.queue.qsize() <= QUEUE_ENTRIES // 2:
            self.paused = False
            await self.wake()
        if isinstance(item, Exception):
            raise item
        return item

    def has_room(self) -> bool:
        self.paused = self.queue.qsize() + READ_COUNT > QUEUE_ENTRIES
        return not self.paused and not self.finished

    def put(self, entries: list[tuple[int, LogEntry]]) -> None:
        for position, entry in entries:
            if position > self.after:
                self.queue.put_nowait((position, entry))
                self.after = position

    def finish(self, error: Exception | None = None) -> None:
        if not self.finished:
            self.finished = True
            self.queue.put_nowait(error)


class PartitionTails:
    """All tails of this process in one partition, and the task that reads for them while there are any.

    Every `check_s` it looks for sessions that have ended, which also says that their clients are there.
    """

    def __init__(self, source: LogSource, check_s: float = CHECK_S) -> None:
        self._source = source
        self._check_s = check_s
        self._tails: set[Tail] = set()
        self._task: asyncio.Task[None] | None = None
        self._waiting = False

    async def add(self, session_id: str, after: int, onlooker: bool = False) -> Tail:
        tail = Tail(session_id, after, self._source.wake, onlooker)
        self._tails.add(tail)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._follow())
        elif self._waiting:
            await self._source.wake()
        return tail

    def remove(self, tail: Tail) -> None:
        self._tails.discard(tail)

    async def close(self) -> None:
        if self._task is not None:
            await end_all([self._task])
        for tail in self._tails:
            tail.finish()

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        next_check = loop.time() + self._check_s
        try:
            while self._tails:
                await self._read()
                if loop.time() >= next_check:
                    await self._check()
                    next_check = loop.time() + self._check_s
        except Exception as error:  # whoever follows a log must hear that nobody reads it any more
            for tail in self._tails:
                tail.finish(error)
            self._tails.clear()

    async def _read(self) -> None:
        reading = [tail for tail in self._tails if tail.has_room()]
        after: dict[str, int] = {}
        for tail in reading:
            after[tail.session_id] = min(tail.after, after.get(tail.session_id, tail.after))
        self._waiting = True
        try:
            found = await self._source.read(after, READ_COUNT)
        finally:
            self._waiting = False
        for tail in reading:
            entries = found.get(tail.session_id, [])
            if isinstance(entries, Exception):
                # What is gone for the one that is behind may be there for the others, which are read for next.
                if tail.after == after[tail.session_id]:
                    tail.finish(entries)
            else:
                tail.put(entries)

    async def _check(self) -> None:
        following = [tail for tail in self._tails if not tail.finished]
        after: dict[str, int] = {}
        for tail in following:
            after[tail.session_id] = max(tail.after, after.get(tail.session_id, tail.after))
        onlookers = after.keys() - {tail.session_id for tail in following if not tail.onlooker}
        for session_id, ended in (await self._source.check(after, onlookers)).items():
            for tail in following:
                if tail.session_id != session_id:
                    continue
                if isinstance(ended, Exception):
                    tail.finish(ended)
                elif ended and tail.after == after[session_id]:
                    tail.finish()

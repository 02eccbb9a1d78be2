"""What a client is still to be told: a bounded queue in front of its socket.

A client that reads slowly holds back its own session's events, which wait in the log; what cannot wait
there (refusals, states of the video) fills the queue, and a full queue or a socket that takes nothing
for a while ends the connection, never the session. Events that come fast, as those of whoever speaks all the time,
go out several together.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from serve.limits import BUNDLE_S, SINGLE_BURST, SINGLE_PER_S, LimitsConfig, TokenBucket
from serve.server_events import ServerEvent


class SlowReader(Exception):
    """The client does not read."""


class Outgoing:
    """Events in order; `run` sends them with `send`."""

    def __init__(self, send: Callable[[str], Awaitable[None]], limits: LimitsConfig) -> None:
        self._send = send
        self._limits = limits
        self._queue: deque[str] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()
        self._told = 0

    def put(self, event: ServerEvent) -> None:
        """Send an event after those before it. Raises SlowReader when too many wait."""
        if not event.event_id:
            self._told += 1
            event = event.model_copy(update={"event_id": f"event_local_{self._told}"})
        text = event.json_text()
        if len(self._queue) >= self._limits.outgoing_events or self._bytes > self._limits.outgoing_bytes:
            raise SlowReader(f"{len(self._queue)} events of {self._bytes} bytes wait for a client that does not read")
        self._queue.append(text)
        self._bytes += len(text)
        self._changed.set()

    async def put_when_few_wait(self, event: ServerEvent) -> None:
        """Send an event that can wait where it comes from."""
        while len(self._queue) > self._limits.outgoing_events // 2 or self._bytes > self._limits.outgoing_bytes // 2:
            self._changed.clear()
            await self._changed.wait()
        self.put(event)

    async def run(self) -> None:
        """Raises SlowReader when an event cannot be sent in time."""
        singles = TokenBucket(SINGLE_PER_S, SINGLE_BURST)
        while True:
            while not self._queue:
                self._changed.clear()
                await self._changed.wait()
            if not singles.take():
                await asyncio.sleep(BUNDLE_S)
            await self.flush()

    async def flush(self) -> None:
        """Send what still waits."""
        while self._queue:
            await self._send_first()

    async def _send_first(self) -> None:
        text = self._queue[0]
        try:
            async with asyncio.timeout(self._limits.send_s):
                await self._send(text)
        except TimeoutError:
            raise SlowReader(f"an event could not be sent for {self._limits.send_s:g} s") from None
        self._queue.popleft()
        self._bytes -= len(text)
        self._changed.set()

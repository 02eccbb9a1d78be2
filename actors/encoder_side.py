"""The encoders' side of the session log: take frames as a consumer group, publish tokens exactly once in effect.

An encoder takes no more frames than it asks for. It waits on one pub/sub channel that says which
frames stream has something new, and then reads just that stream, so waiting costs neither latency
nor commands and an idle encoder never holds what a busy one has not begun.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal, cast

from pydantic import ValidationError

from actors.messages import Frame, FrameSkipped, FrameTokens, MessageError, encode
from actors.scripts import GROUP, SESSION_ID
from actors.session_log import BusConfig, BusError, Entry, LogConnection, PendingFrame, checked
from actors.tasks import end_all

log = logging.getLogger(__name__)

POLL_S = 2.0  # look everywhere this often, should an announcement have been lost
FORGET_S = 600.0


class EncoderSide(LogConnection):
    """What an encoder replica does."""

    def __init__(self, config: BusConfig) -> None:
        super().__init__(config)
        self._ready: dict[bool, set[int]] = {False: set(), True: set()}  # bulk or not -> partitions
        self._news = asyncio.Event()
        self._listener: asyncio.Task[None] | None = None
        self._turn = random.randrange(config.partitions)
        self._next_poll = self._next_reclaim = 0.0
        self._next_forget = asyncio.get_running_loop().time() + FORGET_S

    async def read_frames(self, consumer: str, count: int, block_ms: int) -> list[PendingFrame]:
        """Up to `count` frames for this consumer, live before bulk; waits up to `block_ms` for the first.

        Frames that another consumer took and neither published nor held come back here; after `max_deliveries`, and
        when the message cannot be read, the session gets FrameSkipped instead.
        """
        if self._listener is None or self._listener.done():
            self._listener = asyncio.create_task(self._listen())
        loop = asyncio.get_running_loop()
        deadline = loop.time() + block_ms / 1000
        while True:
            if loop.time() >= self._next_poll:
                self._look_everywhere()
            self._news.clear()
            frames = await self._reclaim(consumer, count) if loop.time() >= self._next_reclaim else []
            frames += await self._take(consumer, count - len(frames), bulk=False)
            if not frames:
                frames = await self._take(consumer, count, bulk=True)
            wait_s = min(deadline, self._next_poll, self._next_reclaim) - loop.time()
            if frames or loop.time() >= deadline:
                return frames
            with suppress(TimeoutError):
                async with asyncio.timeout(max(wait_s, 0)):
                    await self._news.wait()

    async def publish(
        self, pending: PendingFrame, message: FrameTokens | FrameSkipped
    ) -> Literal["ok", "duplicate", "gone"]:
        """Hand the result to the session and acknowledge the frame, at once.

        `duplicate`: somebody published it before. `gone`: the session has ended; only acknowledged.
        """
        if message.seq != pending.frame.seq:
            raise ValueError(f"the result of frame {message.seq} was published for frame {pending.frame.seq}")
        return await self._publish(pending.stream, pending.entry_id, pending.frame.session_id, message)

    async def hold(self, consumer: str, frames: Sequence[PendingFrame]) -> int:
        """Say that these frames are worked on, before `reclaim_idle_ms` are over; how many are still this one's."""
        by_stream: dict[str, list[str]] = defaultdict(list)
        for pending in frames:
            by_stream[pending.stream].append(pending.entry_id)
        calls = (self.script("HOLD", [stream], [GROUP, consumer, *ids]) for stream, ids in by_stream.items())
        return sum(int(str(kept)) for kept in await asyncio.gather(*calls))

    async def close_listener(self) -> None:
        if self._listener is not None:
            await end_all([self._listener])

    async def _listen(self) -> None:
        async for announced in self.announcements():
            kind, _, partition = (announced or "").partition(":")
            if kind in ("live", "bulk") and partition.isdigit() and int(partition) < self.config.partitions:
                self._ready[kind == "bulk"].add(int(partition))
            else:
                self._look_everywhere()
            self._news.set()

    def _look_everywhere(self) -> None:
        for ready in self._ready.values():
            ready.update(range(self.config.partitions))
        self._next_poll = asyncio.get_running_loop().time() + POLL_S * random.uniform(0.75, 1.25)

    async def _take(self, consumer: str, count: int, bulk: bool) -> list[PendingFrame]:
        """New frames of the partitions that have some, an equal share of each, beginning with another each time."""
        ready, taken = self._ready[bulk], list[PendingFrame]()
        while ready and len(taken) < count:
            free = count - len(taken)
            chosen = sorted(ready, key=lambda partition: (partition - self._turn) % self.config.partitions)[:free]
            self._turn = (chosen[-1] + 1) % self.config.partitions
            share = free // len(chosen)
            ready.difference_update(chosen)
            streams = [self.keys.frames(partition, bulk) for partition in chosen]
            try:
                replies = await self.read_group(consumer, streams, share)
            except BaseException:
                ready.update(chosen)
                raise
            for partition, stream, entries in zip(chosen, streams, replies, strict=True):
                if len(entries) == share:
                    ready.add(partition)
                taken += [frame for entry in entries if (frame := await self._pending(partition, stream, 1, entry))]
        return taken

    async def _reclaim(self, consumer: str, count: int) -> list[PendingFrame]:
        idle_ms = self.config.reclaim_idle_ms
        now = asyncio.get_running_loop().time()
        self._next_reclaim = now + idle_ms / 2000 * random.uniform(0.75, 1.25)
        places = [(partition, bulk) for bulk in (False, True) for partition in range(self.config.partitions)]
        streams = [self.keys.frames(*place) for place in places]
        found = await self.stale(streams, idle_ms, count)
        taken: list[PendingFrame] = []
        for (partition, _), stream, stale in zip(places, streams, found, strict=True):
            deliveries = dict(stale[: count - len(taken)])
            if not deliveries:
                continue
            for entry in await self.take_over(consumer, stream, idle_ms, list(deliveries)):
                frame = await self._pending(partition, stream, deliveries[entry[0]] + 1, entry)
                taken += [frame] if frame else []
        if now >= self._next_forget:
            self._next_forget = now + FORGET_S
            for stream in streams:
                await self.script("FORGET", [stream], [GROUP, int(FORGET_S * 1000)])
        return taken

    async def _pending(self, partition: int, stream: str, deliveries: int, entry: Entry) -> PendingFrame | None:
        """The frame in an entry, or None after saying FrameSkipped to the session it belongs to."""
        entry_id, fields = entry
        session_id = fields.get(b"s", b"").decode(errors="replace")
        try:
            skipped = FrameSkipped(seq=fields.get(b"n"), time=fields.get(b"t"), reason="unknown")
        except ValidationError:
            skipped = None
        if skipped is None or not SESSION_ID.fullmatch(session_id) or self.partition(session_id) != partition:
            log.error("frames entry %s of %s names no session and frame: dropped", entry_id, stream)
            await self.drop(stream, entry_id)
            return None
        try:
            frame = cast(Frame, checked(fields.get(b"m", b""), (Frame,)))
            if deliveries <= self.config.max_deliveries:
                return PendingFrame(entry_id, stream, deliveries, frame.model_copy(update={"seq": skipped.seq}))
            reason = f"{self.config.max_deliveries} deliveries to encoders brought no result"
        except MessageError as error:
            reason = str(error)
        log.warning("session=%s frame=%d skipped: %s", session_id, skipped.seq, reason)
        await self._publish(stream, entry_id, session_id, skipped.model_copy(update={"reason": reason}))
        return None

    async def _publish(
        self, stream: str, entry_id: str, session_id: str, message: FrameTokens | FrameSkipped
    ) -> Literal["ok", "duplicate", "gone"]:
        answer = await self.script(
            "PUBLISH",
            [*self.session_keys(session_id), stream],
            [GROUP, entry_id, encode(message), self.config.session_ttl_ms],
        )
        match answer:
            case b"ok":
                return "ok"
            case b"duplicate":
                return "duplicate"
            case b"gone":
                return "gone"
        raise BusError("redis_error", f"publishing answered {answer!r:.80}")

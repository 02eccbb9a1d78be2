"""Frames of one session between their arrival and their number: what waits, and what is dropped.

Dropping happens here and only here: with `latest` the newest frame wins while there is no credit, with
`block` frames wait in order, up to a bound. Frames leave in the order of their times, so one time says
up to where the server answers for them (`through`).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from serve.client_events import ClientError, DropPolicy, check_time

CREDIT_POLL_S = 0.2


@dataclass(frozen=True)
class WaitingFrame:
    """A frame without a number yet. `received` is the monotonic moment of its arrival."""

    time: float
    image: bytes
    received: float


def check_frame_time(video_time: float, last_time: float) -> None:
    """Raises ClientError for a time that no frame may have after one of `last_time`."""
    check_time(video_time)
    if video_time <= last_time:
        raise ClientError(
            "bad_time",
            f"video_time is {video_time}, expected more than the {last_time} of the frame before",
            "video_time",
        )


class FrameBuffer:
    """`on_drop` is told the reason of every frame that is dropped."""

    def __init__(self, policy: DropPolicy, max_waiting: int, on_drop: Callable[[str], None]) -> None:
        self.policy = policy
        self.max_waiting = max_waiting
        self.last_time = -1.0
        self.through = -1.0
        self._on_drop = on_drop
        self._waiting: deque[WaitingFrame] = deque()
        self._starved = False
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, video_time: float, image: bytes) -> None:
        """Let a frame wait. Raises ClientError when too many do."""
        if self.policy == "block" and len(self._waiting) >= self.max_waiting:
            self._on_drop("buffer_full")
            raise ClientError(
                "buffer_full",
                f"{len(self._waiting)} frames wait already and the frame at {video_time} s was dropped: "
                "send no faster than input_video_buffer.status shows frames decided",
            )
        self.last_time = video_time
        self._waiting.append(WaitingFrame(video_time, image, time.monotonic()))
        self._keep_newest()
        self.note_change()

    def take(self) -> WaitingFrame:
        """The frame that has waited longest: to be given back or admitted."""
        return self._waiting.popleft()

    def give_back(self, frame: WaitingFrame) -> None:
        """There was no credit for it."""
        self._starved = True
        self._waiting.appendleft(frame)
        self._keep_newest()

    def admitted(self, frame: WaitingFrame) -> None:
        """It has its number."""
        self._starved = False
        self.through = max(self.through, frame.time)  # a later one may have been dropped meanwhile

    def continue_after(self, video_time: float) -> None:
        """Go on where another gateway left off: frames up to that time are answered for."""
        self.last_time = self.through = video_time

    def clear(self) -> None:
        self._waiting.clear()

    def note_change(self) -> None:
        """Something happened that those who wait for a change should look at."""
        self._changed.set()

    async def change(self) -> None:
        """Sleep until `note_change`; with frames waiting, look again for a credit now and then."""
        try:
            async with asyncio.timeout(CREDIT_POLL_S if self._waiting else None):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    def _keep_newest(self) -> None:
        """With `latest`, drop all but the newest waiting frame while there is no credit."""
        keep = 1 if self._starved else self.max_waiting
        while self.policy == "latest" and len(self._waiting) > keep:
            self.through = max(self.through, self._waiting.popleft().time)
            self._on_drop("replaced")

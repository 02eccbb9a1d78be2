"""How programs that start everything end: Ctrl-C and SIGTERM, at any moment, without leftovers.

An exception out of a signal handler is no way to end: inside Ray's code it may be swallowed, or leave
a lock held for ever. Therefore the process ends at once wherever it is, which is safe, since the
processes of Ray and Redis end with it; only while `interruptible` work runs is there an orderly way.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from types import FrameType
from typing import TypeVar

SIGNALS = (signal.SIGINT, signal.SIGTERM)

T = TypeVar("T")


class Stopped(Exception):
    """Somebody wants the program to end; `status` is the exit status that says by which signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


def end_at_once_on_signal() -> None:
    """Ctrl-C and SIGTERM end the process here and now. To be said again after code that sets handlers of its own."""
    for number in SIGNALS:
        signal.signal(number, _end)


async def interruptible(work: Coroutine[object, object, T]) -> T:
    """The result of `work`; Ctrl-C and SIGTERM cancel it. Raises Stopped when it was cancelled so."""
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        task.cancel()

    for number in SIGNALS:
        loop.add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if received:
            raise Stopped(received[0]) from None
        raise
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
        end_at_once_on_signal()


def _end(number: int, _: FrameType | None) -> None:
    os.write(2, b"stopped while starting or ending\n")
    os._exit(128 + number)

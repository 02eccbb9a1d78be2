"""How programs that start everything end: Ctrl-C and SIGTERM, at any moment, without leftovers.

An exception out of a signal handler is no way to end: inside Ray's code it may be swallowed, or leave
a lock held for ever. Therefore the process ends at once wherever it is, and takes with it what it has
started; only while `interruptible` work runs is there an orderly way.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TypeVar

GRACE_S = 3.0
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
    signal.alarm(0)  # Ray's native handler, where it came first, has set one to abort after 3 s
    os.write(2, b"stopped while starting or ending\n")
    started: set[int] = set()
    for how in (signal.SIGTERM, signal.SIGKILL):
        started.update(_descendants(os.getpid()))
        for pid in started:
            with suppress(ProcessLookupError):
                os.kill(pid, how)
        deadline = time.monotonic() + GRACE_S
        while any(Path(f"/proc/{pid}").exists() for pid in started) and time.monotonic() < deadline:
            _reap()
            time.sleep(0.05)
    os._exit(128 + number)


def _descendants(ancestor: int) -> list[int]:
    """Processes that this one has started, and those they have; none where there is no /proc to tell.

    Ray's processes notice by themselves that their program is gone, but some take a minute.
    """
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = list(children.get(ancestor, []))
    for pid in found:
        found += children.get(pid, [])
    return found


def _reap() -> None:
    """Let children that have ended go, or they would look alive."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass

"""Ending tasks for sure."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

AGAIN_S = 3.0


@contextmanager
def cancellable() -> Iterator[None]:
    """A block after which the task is surely cancelled if somebody asked for that meanwhile.

    redis-py sends with `asyncio.wait_for`, which in Python 3.11 forgets a cancellation that comes as the
    sending ends. A cancellation by `asyncio.timeout` counts like any other: it makes a TimeoutError of it.
    """
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        yield
    except asyncio.CancelledError:
        raise
    except BaseException:
        if task.cancelling() > before:
            raise asyncio.CancelledError from None
        raise
    if task.cancelling() > before:
        raise asyncio.CancelledError


async def end_all(tasks: Iterable[asyncio.Task[object]]) -> None:
    """Cancel tasks and wait until they have ended, whatever they end with.

    One that goes on is cancelled again after `AGAIN_S`, time enough to clean up: libraries may swallow
    a cancellation.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        ended, pending = await asyncio.wait(pending, timeout=AGAIN_S)
        for task in ended:
            if not task.cancelled():
                task.exception()

"""Ending tasks for sure."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

AGAIN_S = 3.0


async def end_all(tasks: Iterable[asyncio.Task[object]]) -> None:
    """Cancel tasks and wait until they have ended, whatever they end with.

    One that goes on is cancelled again after `AGAIN_S`, time enough to clean up: a Redis connection that is
    being read, and `asyncio.timeout` at its very end, may swallow a cancellation.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        ended, pending = await asyncio.wait(pending, timeout=AGAIN_S)
        for task in ended:
            if not task.cancelled():
                task.exception()

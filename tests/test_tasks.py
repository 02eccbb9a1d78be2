"""Tasks that are told to end."""

from __future__ import annotations

import asyncio

import pytest

from actors import tasks

pytestmark = pytest.mark.anyio


async def test_a_task_that_swallows_a_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "AGAIN_S", 0.01)
    swallowed = []

    async def deaf() -> None:
        for _ in range(3):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed.append(1)
        await asyncio.Event().wait()

    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)
    await tasks.end_all([task])
    assert task.cancelled()
    assert len(swallowed) == 3


async def test_how_tasks_end_is_nobodys_trouble() -> None:
    async def failing() -> None:
        raise ValueError("broken")

    async def done() -> int:
        return 3

    ended: list[asyncio.Task[object]] = [asyncio.create_task(failing()), asyncio.create_task(done())]
    await asyncio.sleep(0)
    await tasks.end_all(ended)
    assert all(task.done() for task in ended)
    await tasks.end_all([])

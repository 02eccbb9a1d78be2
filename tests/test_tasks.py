"""Tasks that are told to end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress

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


async def _forgetful(after: asyncio.Event) -> str:
    """Like `asyncio.wait_for` of Python 3.11 at the moment its work is done."""
    with suppress(asyncio.CancelledError):
        await after.wait()
    return "done"


async def _broken(after: asyncio.Event) -> None:
    await _forgetful(after)
    raise ConnectionError("gone")


@pytest.mark.parametrize("work", [_forgetful, _broken])
async def test_a_swallowed_cancellation_is_noticed_at_once(
    work: Callable[[asyncio.Event], Coroutine[object, object, object]],
) -> None:
    async def guarded() -> None:
        with tasks.cancellable():
            await work(asyncio.Event())

    task = asyncio.create_task(guarded())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_a_swallowed_time_limit_is_one_still() -> None:
    async def limited() -> None:
        async with asyncio.timeout(0.01):
            with tasks.cancellable():
                await _forgetful(asyncio.Event())

    with pytest.raises(TimeoutError):
        await limited()


async def test_what_was_not_cancelled_ends_as_it_does() -> None:
    ready = asyncio.Event()
    ready.set()
    with tasks.cancellable():
        assert await _forgetful(ready) == "done"
    with pytest.raises(ConnectionError), tasks.cancellable():
        await _broken(ready)


async def test_who_cleans_up_after_a_cancellation_may_finish() -> None:
    said = []

    async def cleaning() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            with tasks.cancellable():
                await asyncio.sleep(0)
            said.append("clean")

    task = asyncio.create_task(cleaning())
    await asyncio.sleep(0)
    await tasks.end_all([task])
    assert said == ["clean"]

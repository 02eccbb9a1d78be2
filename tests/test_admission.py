"""How long a session waits for an LLM replica."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import cast

import httpx
import pytest
from application import running
from live_client import live, picture

from actors.bus import Bus
from actors.replicas import ReplicaReport
from serve import admission
from serve.admission import NoCapacity, admitted
from serve.conversation import Conversation
from serve.gateway import Gateway, ServeConfig
from serve.server_events import ErrorEvent, SessionEnded

MODEL = "model-a"
SHORT_S = 0.02


@asynccontextmanager
async def opened(bus: Bus, **settings: float) -> AsyncIterator[tuple[Conversation, Gateway]]:
    """A session that nobody has taken, at a gateway that refuses soon."""
    gateway = Gateway(bus, MODEL, "pad", ServeConfig.model_validate({"admission_timeout_s": SHORT_S, **settings}))
    async with gateway.conversation() as conversation:
        await conversation.open()
        yield conversation, gateway


async def report(bus: Bus, *names: str, model: str = MODEL) -> None:
    for name in names:
        told = ReplicaReport(role="llm", name=name, pid=1, at=time.time(), model=model, stats={}, metrics="")
        await bus.report(told)


@pytest.mark.anyio
async def test_a_session_is_refused_soon_where_no_replica_is_to_come(bus: Bus) -> None:
    async with opened(bus) as (conversation, gateway):
        with pytest.raises(NoCapacity, match="all are full or down"):
            await admitted(conversation, gateway)
    await report(bus, "one", "two")
    async with opened(bus, max_llms=2) as (conversation, gateway):
        with pytest.raises(NoCapacity):
            await admitted(conversation, gateway)


@pytest.mark.anyio
async def test_a_session_waits_for_a_replica_that_may_still_start(bus: Bus) -> None:
    await report(bus, "one")
    await report(bus, "another model's", model="model-b")
    async with opened(bus, max_llms=2) as (conversation, gateway):
        begun = time.monotonic()
        waiting = asyncio.create_task(admitted(conversation, gateway))
        while time.monotonic() < begun + 10 * SHORT_S:
            assert not waiting.done()
            await asyncio.sleep(SHORT_S)
        await bus.claim("two", MODEL, bus.partition(conversation.id), 1)
        await waiting


@pytest.mark.anyio
async def test_the_wait_for_a_replica_that_never_starts_has_an_end(bus: Bus) -> None:
    async with opened(bus, max_llms=2, start_timeout_s=0.3) as (conversation, gateway):
        with pytest.raises(NoCapacity):
            await admitted(conversation, gateway)


@pytest.mark.anyio
async def test_a_session_gets_the_usual_time_from_when_the_last_replica_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has to find out that there is one, and to rebuild the sessions that came before."""
    now, coming = 0.0, iter([True] * 5 + [False] * 1000)  # one is still to come at the first five looks, a second apart

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    async def more_to_come(_: object) -> bool:
        return next(coming)

    async def placed() -> bool:
        return False

    monkeypatch.setattr(admission, "asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(admission, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(admission, "_more_to_come", more_to_come)
    config = SimpleNamespace(admission_timeout_s=3.0, start_timeout_s=120.0)
    with pytest.raises(NoCapacity):
        await admitted(
            cast(Conversation, SimpleNamespace(placed=placed)), cast(Gateway, SimpleNamespace(config=config))
        )
    assert 8 <= now < 8.5


def test_sessions_are_served_by_a_replica_that_comes_late(tiny: dict[str, object], redis_url: str) -> None:
    """Later than a session may be idle, and than one is kept where no more replicas can come."""
    settings = {"admission_timeout_s": SHORT_S, "idle_s": 1.0, "max_llms": 2}
    with running(tiny, redis_url, workers=False, **settings) as app, live(app.url) as client:
        client.configure(video={"drop_policy": "block"})
        client.frame(0)
        client.say({"type": "input_video_buffer.end"})
        with pytest.raises(TimeoutError):
            client.until(ErrorEvent, within_s=1.2)
        app.call(app.work())
        client.until(SessionEnded)
    assert client.decided() == [(0, 0.0)]


def test_recorded_video_waits_for_a_replica_that_comes_late(tiny: dict[str, object], redis_url: str) -> None:
    settings = {"admission_timeout_s": SHORT_S, "idle_s": 2.0, "max_llms": 2}
    image = f"data:image/jpeg;base64,{base64.b64encode(picture()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "What is it?"}]
    body = {"model": "videollm-online", "messages": [{"role": "user", "content": content}], "max_tokens": 2}
    with running(tiny, redis_url, workers=False, **settings) as app, ThreadPoolExecutor() as pool:
        asked = pool.submit(httpx.post, f"{app.url}/v1/chat/completions", json=body, timeout=60)
        with pytest.raises(TimeoutError):
            asked.result(timeout=2.5)
        app.call(app.work())
        answer = asked.result(timeout=60)
    assert answer.status_code == 200, answer.text

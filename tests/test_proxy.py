"""Connections whose requests never become whole, and messages that come faster than they are passed on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.types import Message, Receive

from serve import proxy
from serve.limits import SINGLE_BURST
from serve.proxy import Bundles, PromptHeaders

WHOLE = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
PART = b"GET / HTTP/1.1\r\nHost: here\r\nX-Slow: "

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Prompt(PromptHeaders):
    headers_s = 0.5


@asynccontextmanager
async def connected(answer: asyncio.Event) -> AsyncIterator[Streams]:
    """A connection to a server that answers once it may."""

    async def application(scope: object, receive: object, send: object) -> None:
        await answer.wait()
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b"ok"})  # type: ignore[operator]

    server = uvicorn.Server(uvicorn.Config(application, port=0, http=Prompt, lifespan="off", log_level="error"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname())
    try:
        yield reader, writer
    finally:
        writer.close()
        server.should_exit = True
        await serving


async def refused(reader: asyncio.StreamReader) -> None:
    """The connection ends with a typed error, and nothing else comes before."""
    async with asyncio.timeout(30):
        head, body = (await reader.read()).split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    error = json.loads(body)["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "too_slow", None)


async def answered(reader: asyncio.StreamReader) -> None:
    async with asyncio.timeout(30):
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 ")


@pytest.fixture
def at_once() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@pytest.mark.anyio
async def test_a_connection_without_a_word_is_ended(at_once: asyncio.Event) -> None:
    async with connected(at_once) as (reader, _):
        await refused(reader)


@pytest.mark.anyio
async def test_headers_that_drip_are_given_up(at_once: asyncio.Event) -> None:
    async with connected(at_once) as (reader, writer):
        ended = asyncio.create_task(refused(reader))
        writer.write(PART)
        while not ended.done():
            writer.write(b"x")
            await asyncio.sleep(0.02)
        await ended


@pytest.mark.anyio
async def test_the_next_request_of_a_connection_has_the_same_time(at_once: asyncio.Event) -> None:
    async with connected(at_once) as (reader, writer):
        writer.write(WHOLE)
        await answered(reader)
        writer.write(PART)
        await refused(reader)


@pytest.mark.anyio
async def test_an_answer_may_take_longer_than_headers_may() -> None:
    """Also where the next request has begun already."""
    answer = asyncio.Event()
    async with connected(answer) as (reader, writer):
        writer.write(WHOLE + PART)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3 * Prompt.headers_s):
                await reader.read(1)
        answer.set()
        await answered(reader)
        await refused(reader)


@pytest.mark.anyio
async def test_messages_faster_than_any_video_are_passed_on_in_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: asyncio.Queue[Message] = asyncio.Queue()
    passed: list[Message] = []
    monkeypatch.setattr(proxy, "SINGLE_PER_S", 1e-6)
    monkeypatch.setattr(proxy, "RELEASE_S", 0.0)
    monkeypatch.setattr(proxy, "BUNDLE_S", 0.05)

    async def application(scope: object, receive: Receive, send: object) -> None:
        while (message := await receive())["type"] != "websocket.disconnect":
            passed.append(message)

    connection = asyncio.create_task(Bundles(application)({"type": "websocket"}, waiting.get, unheard))  # type: ignore[arg-type]
    sent: list[Message] = []

    def say(count: int) -> None:
        for _ in range(count):
            sent.append({"type": "websocket.receive", "text": str(len(sent))})
            waiting.put_nowait(sent[-1])

    for _ in range(SINGLE_BURST):
        say(1)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert passed == sent  # each at once
    monkeypatch.setattr(proxy, "RELEASE_S", 60.0)
    say(20)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    say(30)
    while not passed[SINGLE_BURST:]:
        await asyncio.sleep(0)
    assert passed == sent  # all of them together
    waiting.put_nowait({"type": "websocket.disconnect"})
    await connection


async def unheard(message: Message) -> None:
    raise AssertionError(message)

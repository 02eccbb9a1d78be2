"""Server-sent events: how an event is written, and a response of them that a slow or absent client ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from serve.server_events import ServerEvent

log = logging.getLogger(__name__)

MEDIA_TYPE = "text/event-stream"


def as_sse(event: ServerEvent) -> str:
    """One event, its log position as id."""
    lines = [f"event: {event.type}", f"data: {event.json_text()}"]
    if event.position is not None:
        lines.insert(0, f"id: {event.position}")
    return "\n".join(lines) + "\n\n"


def as_data(text: str) -> str:
    """An event of data alone, as the OpenAI API streams."""
    return f"data: {text}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events; what `stack` holds is let go when they are over or the client is.

    A client that takes nothing for `send_s` is treated as one that has left.
    """

    def __init__(self, texts: AsyncGenerator[str], stack: AsyncExitStack, send_s: float) -> None:
        self._texts = texts
        self._stack = stack
        self._send_s = send_s
        super().__init__(texts, media_type=MEDIA_TYPE, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._send_s):
                await send(message)

        async with self._stack, aclosing(self._texts):
            try:
                await super().__call__(scope, receive, send_in_time)
            except TimeoutError:
                log.warning("a client of %s took no event for %g s and was left", scope["path"], self._send_s)

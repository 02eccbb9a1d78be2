"""What is put into Ray Serve's HTTP proxy: clients that do not read, or never finish asking, are let go.

A gateway sees neither: what it sends goes into the proxy's memory without end, and a request whose headers
drip never comes to it. The proxy knows, for it has the sockets. Messages that come faster than any live video
does are handed over in bundles. Named to Serve by an environment variable of the cluster (`IMPORT_PATH`);
programs that start a cluster themselves set it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time

import uvicorn.protocols.http.auto
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.limits import BUNDLE_S, SINGLE_BURST, SINGLE_PER_S, TokenBucket

log = logging.getLogger(__name__)

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
IMPORT_PATH = "serve.proxy:middlewares"
SEND_S_VARIABLE = "VIDEOLLM_PROXY_SEND_S"
SEND_S = 20.0
HEADERS_S_VARIABLE = "VIDEOLLM_PROXY_HEADERS_S"
HEADERS_S = 20.0
RELEASE_S = 0.005


class SlowClient(Exception):
    """A client took nothing for as long as it may."""


class SlowClients:
    """Ends a request or WebSocket whose client takes nothing of what it is sent for `send_s`."""

    def __init__(self, app: ASGIApp, send_s: float) -> None:
        self.app = app
        self.send_s = send_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def bounded(message: Message) -> None:
            try:
                async with asyncio.timeout(self.send_s):
                    await send(message)
            except TimeoutError:
                raise SlowClient(f"{scope.get('client')} read nothing for {self.send_s:g} s") from None

        try:
            await self.app(scope, receive, bounded)
        except SlowClient as error:
            log.warning("connection ended: %s", error)


class Bundles:
    """Hands over the messages of a WebSocket one by one as they come, or, faster than that, every `BUNDLE_S`.

    Serve's proxy passes on together what it can receive without waiting. A message waits `BUNDLE_S` at most.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket":
            await self.app(scope, receive, send)
            return
        singles = TokenBucket(SINGLE_PER_S, SINGLE_BURST)
        released = 0.0

        async def bundled() -> Message:
            nonlocal released
            message = await receive()
            if not singles.take() and time.monotonic() > released:
                await asyncio.sleep(BUNDLE_S)
                released = time.monotonic() + RELEASE_S  # for what has come since
            return message

        await self.app(scope, bundled, send)


class PromptHeaders(HttpToolsProtocol):
    """uvicorn's connection, for which a request's headers must be whole within `headers_s`.

    uvicorn itself bounds only the pause between two requests. The answer to one that is too slow is 408.
    """

    headers_s = HEADERS_S
    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._overdue is None:
            self._expect()

    def on_headers_complete(self) -> None:
        self._forget()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _expect(self) -> None:
        self._overdue = self.loop.call_later(self.headers_s, self._give_up)

    def _forget(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _give_up(self) -> None:
        self._overdue = None
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:  # of the request before, which goes on
            self._expect()
            return
        log.warning("connection ended: %s sent no whole headers within %g s", self.client, self.headers_s)
        message = f"the request's headers were not there within {self.headers_s:g} s"
        error = {"message": message, "type": "invalid_request_error", "code": "too_slow", "param": None}
        body = json.dumps({"error": error}).encode()
        head = f"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.transport.close()


def middlewares() -> list[Middleware]:
    """What Serve's proxy puts around the application. Called in its process, before it listens."""
    PromptHeaders.headers_s = float(os.environ.get(HEADERS_S_VARIABLE, HEADERS_S))
    uvicorn.protocols.http.auto.AutoHTTPProtocol = PromptHeaders
    return [Middleware(Bundles), Middleware(SlowClients, send_s=float(os.environ.get(SEND_S_VARIABLE, SEND_S)))]

"""A middleware for Ray Serve's HTTP proxy: clients that do not read are let go.

A gateway cannot see them: what it sends goes into the proxy's memory without end. The proxy knows, for
its socket takes nothing more. Named to Serve by an environment variable of the cluster (`IMPORT_PATH`);
programs that start a cluster themselves set it.
"""

from __future__ import annotations

import asyncio
import logging
import os

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
IMPORT_PATH = "serve.proxy:middlewares"
SEND_S_VARIABLE = "VIDEOLLM_PROXY_SEND_S"
SEND_S = 20.0


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


def middlewares() -> list[Middleware]:
    """What Serve's proxy puts around the application."""
    return [Middleware(SlowClients, send_s=float(os.environ.get(SEND_S_VARIABLE, SEND_S)))]

"""Request bodies as they come in: bounded in size and in time, before anybody reads what is in them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.client_events import is_number
from serve.errors import ApiError, error_response
from serve.gateway import Gateway
from serve.keys import ApiKeys, Refused
from serve.limits import LimitsConfig

UPLOAD = "multipart/form-data"
INLINE = "/v1/chat/completions"
SMALL = 1 << 20  # bytes of the JSON of any other request
STRANGERS = ""
BODILESS = ("GET", "HEAD", "OPTIONS")


class RequestGuard:
    """Refuses bodies that are too large (413) or come too slowly (408), and requests beyond the bounds (429).

    A body of somebody without a valid key is not read at all (401). No key can take all requests from the others, and
    nobody can without one. Counts every answer for the metrics by the route it matched.
    """

    def __init__(self, app: ASGIApp, gateway: Gateway, keys: ApiKeys) -> None:
        self.app = app
        self.keys = keys
        self.gateway = gateway
        self.limits = gateway.limits
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self.gateway.meters.request(getattr(route, "path", "none"), message["status"])
            await send(message)

        client, refusal = self._client(scope)
        if refusal and scope["method"] not in BODILESS:  # before anything of the body is kept
            await self._refuse(401, "unauthorized", refusal)(scope, receive, counted)
            return
        if text := self._too_many(client):
            await self._refuse(429, "too_many_requests", text)(scope, receive, counted)
            return
        body = Body(scope, receive, self.limits)
        if body.announced > body.most:
            await self._refuse(413, "too_big", body.too_big(body.announced))(scope, receive, counted)
            return
        self._open[client] += 1
        try:
            await self.app(scope, body.receive, counted)
        finally:
            self._open[client] -= 1
            self._open += Counter()  # forgets those with none

    def _client(self, scope: Scope) -> tuple[str, str]:
        """The name to count a request under, and why it is a stranger's, if it is."""
        try:
            return self.keys.client(HTTPConnection(scope)), ""
        except Refused as error:
            return STRANGERS, str(error)

    def _too_many(self, client: str) -> str | None:
        """Why this client may not ask one thing more now."""
        if (total := self._open.total()) >= self.limits.connections:
            return f"{total} requests are open, the most this gateway takes: try later"
        if self._open[client] >= self.limits.requests_per_key:
            whose = "without a valid key" if client == STRANGERS else "of this key"
            return f"{self._open[client]} requests {whose} are open, the most this gateway takes: try later"
        return None

    def _refuse(self, status: int, code: str, message: str) -> ASGIApp:
        self.gateway.meters.error(code)
        return error_response(status, code, message, headers={"Retry-After": "5"} if status == 429 else None)


class Body:
    """One request's body on its way in."""

    def __init__(self, scope: Scope, receive: Receive, limits: LimitsConfig) -> None:
        headers = HTTPConnection(scope).headers
        announced = headers.get("content-length", "0")
        upload = headers.get("content-type", "").startswith(UPLOAD)
        self.announced = int(announced) if is_number(announced) else 0
        inline = scope["path"].endswith(INLINE)  # pictures and videos may be within the JSON there, nowhere else
        self.most = limits.upload_bytes if upload else limits.body_bytes if inline else min(SMALL, limits.body_bytes)
        self._receive = receive
        self._limits = limits
        self._seen = 0
        self._deadline = time.monotonic() + limits.body_s
        self._whole = False

    async def receive(self) -> Message:
        """The next piece. Raises ApiError when it is one too many, or does not come in time."""
        if self._whole:
            return await self._receive()  # waits for the client to leave, which may take as long as the answer
        wait_s = min(self._limits.send_s, self._deadline - time.monotonic())
        try:
            async with asyncio.timeout(max(0.0, wait_s)):
                message = await self._receive()
        except TimeoutError:
            limits = f"{self._limits.send_s:g} s without a byte and {self._limits.body_s:g} s in all are the limits"
            raise ApiError(408, "too_slow", f"the request body came too slowly: {limits}") from None
        self._seen += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._seen > self.most:
            raise ApiError(413, "too_big", self.too_big(self._seen))
        return message

    def too_big(self, size: int) -> str:
        return f"request body of {size} bytes or more, at most {self.most} are allowed"

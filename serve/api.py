"""The HTTP face of a gateway: a WebSocket for live video, a POST for recorded video, health, statistics.

Without an API key only this machine is served; with one every request must bring it.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, File, Form, Request, UploadFile, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException, WebSocketException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.video import VideoError, probe
from serve.client_events import ClientError, check_time, parse_patch
from serve.gateway import Full, Gateway
from serve.keys import ApiKeys, Refused
from serve.realtime import POLICY, serve_realtime
from serve.recorded import Recording, as_sse, watch
from serve.server_events import ServerEvent, SessionCreated

log = logging.getLogger(__name__)

ERROR_CODES = {401: "unauthorized", 404: "not_found", 405: "bad_method", 413: "too_big", 422: "bad_value"}


class ApiError(HTTPException):
    """A refused request: HTTP status, `code` for programs, a message for people."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(status, message)
        self.code = code
        self.param = param


def build_api(gateway: Gateway, resolution_px: int, keys: ApiKeys) -> FastAPI:
    """The application around one gateway. Recorded frames are scaled to `resolution_px` as the model sees them."""
    api = FastAPI(
        title="videollm-online", version="1", summary="A language model that watches video and talks about it"
    )
    api.add_middleware(BodyLimit, max_bytes=gateway.limits.upload_bytes)
    api.add_exception_handler(HTTPException, _on_http_error)
    api.add_exception_handler(ClientError, _on_client_error)
    api.add_exception_handler(RequestValidationError, _on_invalid)

    def authorized(connection: HTTPConnection) -> None:
        """Only known clients; `state.client` is the client's name."""
        try:
            connection.state.client = keys.client(connection)
        except Refused as error:
            if connection.scope["type"] == "websocket":
                raise WebSocketException(POLICY, str(error)) from None
            raise ApiError(401, "unauthorized", str(error)) from None

    @api.get("/healthz")
    async def health() -> dict[str, str]:
        """Answers once the models are loaded and Redis is connected."""
        return {"status": "ok"}

    @api.get("/v1/stats", dependencies=[Depends(authorized)])
    async def stats(timeline: bool = False) -> dict[str, dict[str, object]]:
        """Frames by what became of them, lags, and the rates of encoder and LLM."""
        return await gateway.stats(timeline)

    @api.websocket("/v1/realtime", dependencies=[Depends(authorized)])
    async def realtime(websocket: WebSocket) -> None:
        await serve_realtime(websocket, gateway, websocket.state.client)

    @api.post("/v1/videos", dependencies=[Depends(authorized)], response_class=StreamingResponse)
    async def videos(
        request: Request,
        video: Annotated[UploadFile, File(description="a video file")],
        question: Annotated[list[str], Form(description="asked at its question_time")] = [],  # noqa: B006
        question_time: Annotated[list[float], Form(description="seconds, one per question; 0 where absent")] = [],  # noqa: B006
        fps: Annotated[float, Form(gt=0, le=60)] = 2.0,
        threshold: Annotated[float | None, Form(ge=0)] = None,
        max_output_tokens: Annotated[int | None, Form(description="longest response")] = None,
        include: Annotated[list[str], Form(description="frame_decided for every decision")] = [],  # noqa: B006
    ) -> StreamingResponse:
        """Watch a recorded video; events come as they happen, as server-sent events with video times."""
        for text in question:
            gateway.check_question(text)
        if len(question_time) > len(question):
            raise ClientError("bad_value", f"{len(question_time)} times for {len(question)} questions", "question_time")
        times = [check_time(at) for at in question_time] + [0.0] * (len(question) - len(question_time))
        settings = {"max_output_tokens": max_output_tokens, "video": {"fps": fps, "threshold": threshold}}
        patch = parse_patch({"include": include, **settings})
        name = Path(video.filename or "video").name
        async with AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="videollm-")))
            path = folder / f"upload{Path(name).suffix[:8]}"
            await asyncio.to_thread(_store, video, path)
            try:
                await asyncio.to_thread(probe, path)
            except VideoError as error:
                raise ApiError(422, "bad_video", str(error).replace(str(path), name), "video") from None
            try:
                conversation = await stack.enter_async_context(gateway.conversation(bulk=True, client=request.state.client))
            except Full as error:
                raise ApiError(429, "sessions_full", str(error)) from None
            await conversation.update(patch)
            await conversation.open()
            recording = Recording(path, fps, resolution_px, tuple(zip(times, question, strict=True)))
            events = watch(recording, conversation, gateway.config, gateway.limits.idle_s)
            return EventStream(events, SessionCreated(session=conversation.info), stack.pop_all())

    return api


class EventStream(StreamingResponse):
    """Server-sent events; what `stack` holds is let go when they are over or the client is."""

    def __init__(self, events: AsyncGenerator[ServerEvent], created: SessionCreated, stack: AsyncExitStack) -> None:
        self._events = events
        self._stack = stack
        super().__init__(self._lines(created), media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack, aclosing(self._events):
            await super().__call__(scope, receive, send)

    async def _lines(self, created: SessionCreated) -> AsyncIterator[str]:
        yield as_sse(created)
        async for event in self._events:
            yield as_sse(event)


class BodyLimit:
    """Refuses a request body of more than `max_bytes`, announced or sent, with 413."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = HTTPConnection(scope).headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > self.max_bytes:
            await _error(413, "too_big", self._message(int(announced)))(scope, receive, send)
            return
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_bytes:
                raise ApiError(413, "too_big", self._message(seen))
            return message

        await self.app(scope, limited, send)

    def _message(self, size: int) -> str:
        return f"request body of {size} bytes or more, at most {self.max_bytes} are allowed"


def _store(video: UploadFile, path: Path) -> None:
    with path.open("wb") as file:
        shutil.copyfileobj(video.file, file, 1 << 20)


def _error(status: int, code: str, message: str, param: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": code, "param": param}}, status)


async def _on_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = error.code if isinstance(error, ApiError) else ERROR_CODES.get(error.status_code, "error")
    return _error(error.status_code, code, str(error.detail), getattr(error, "param", None))


async def _on_client_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ClientError)
    return _error(422, error.code, str(error), error.param)


async def _on_invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    param = ".".join(str(part) for part in problem["loc"][1:]) or None
    return _error(422, "bad_value", f"{param or 'request'} is {problem.get('input')!r:.80}: {problem['msg']}", param)

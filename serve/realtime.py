"""The WebSocket of one client: messages in, events out, until either side is done.

Ray Serve's proxy reads the socket into an unbounded queue, so TCP cannot slow a client down: this
side reads at once and the conversation bounds what waits. A client's mistake is answered with an
`error` event and changes nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from actors.bus import BusError
from serve.client_events import (
    ClientError,
    ConversationItemCreate,
    InputText,
    Item,
    ResponseCancel,
    SessionUpdate,
    VideoAppend,
    VideoEnd,
    parse_binary,
    parse_text,
    picture_bytes,
)
from serve.conversation import Conversation, NoCapacity
from serve.gateway import Full, Gateway
from serve.keys import subprotocol
from serve.server_events import ServerEvent, SessionCreated, SessionUpdated, VideoStatus, failure, refusal

log = logging.getLogger(__name__)

NORMAL, POLICY, INTERNAL, FULL = 1000, 1008, 1011, 1013


class Closing(Exception):
    """The server ends the connection, with a WebSocket close code."""

    def __init__(self, close_code: int, code: str, message: str) -> None:
        super().__init__(message)
        self.close_code = close_code
        self.code = code


async def serve_realtime(websocket: WebSocket, gateway: Gateway, client: str) -> None:
    """Accept a client and stay until its session has ended or it is gone."""
    await websocket.accept(subprotocol(websocket))
    try:
        async with gateway.conversation(client=client) as conversation:
            await Connection(websocket, gateway, conversation).run()
    except Full as error:
        await _close(websocket, FULL, "sessions_full", str(error))
    except Closing as error:
        await _close(websocket, error.close_code, error.code, str(error))
    except BusError as error:
        log.error("connection closed: %s", error)
        await _close(websocket, INTERNAL, error.code, str(error))
    except WebSocketDisconnect:
        pass
    except Exception as error:
        log.exception("connection failed")
        await _close(websocket, INTERNAL, "internal", f"{type(error).__name__}: {error}")


class Connection:
    """The tasks around one conversation: receiving, admitting frames, sending events, keeping watch."""

    def __init__(self, websocket: WebSocket, gateway: Gateway, conversation: Conversation) -> None:
        self.websocket = websocket
        self.gateway = gateway
        self.conversation = conversation
        self._opened = asyncio.Event()
        self._sending = asyncio.Lock()
        self._active = time.monotonic()

    async def run(self) -> None:
        """Raises Closing when the server ends the connection, WebSocketDisconnect when the client does."""
        await self._send(SessionCreated(session=self.conversation.info))
        tasks = [
            asyncio.create_task(work, name=f"{self.conversation.id} {name}")
            for name, work in {
                "receive": self._receive(),
                "feed": self._feed(),
                "events": self._events(),
                "owner": self._watch_owner(),
                "status": self._report(),
                "idle": self._watch_idle(),
            }.items()
        ]
        events = tasks[2]
        try:
            waiting = set(tasks)
            while not events.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._close_normally()

    async def _receive(self) -> None:
        while True:
            message = await self.websocket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code") or 1005)
            self._active = time.monotonic()
            try:
                await self._handle(message.get("text"), message.get("bytes"))
            except ClientError as error:
                await self._send(refusal(error))

    async def _handle(self, text: str | None, data: bytes | None) -> None:
        """One message of the client. Raises ClientError."""
        size = len(text) if text is not None else len(data or b"")
        if size > self.gateway.limits.message_bytes:
            limit = self.gateway.limits.message_bytes
            raise ClientError("too_big", f"message of {size} bytes, at most {limit} are allowed")
        if text is None:
            video_time, image = parse_binary(data or b"")
            await self._open()
            self.conversation.offer(video_time, image)
            return
        match parse_text(text):
            case SessionUpdate(session=patch):
                if not await self.conversation.update(patch):
                    await self._send(SessionUpdated(session=self.conversation.info))
                await self._open()
            case VideoAppend(video_time=video_time, image=image_text):
                await self._open()
                self.conversation.offer(video_time, picture_bytes(image_text, "image"))
            case ConversationItemCreate(item=item):
                await self._open()
                await self._take(item)
            case ResponseCancel():
                await self._open()
                await self.conversation.interrupt()
            case VideoEnd():
                await self._open()
                self.conversation.finish()

    async def _take(self, item: Item) -> None:
        """The questions and frames of one item, in order."""
        for index, part in enumerate(item.content):
            if isinstance(part, InputText):
                text = self.gateway.check_question(part.text)
                item_id = f"{item.id}.{index}" if item.id and index else item.id
                await self.conversation.ask(text, part.video_time, item_id)
            else:
                self.conversation.offer(part.video_time, picture_bytes(part.image_url, "image_url"))

    async def _open(self) -> None:
        """The session's log begins with the first message, so that first settings are those it starts with."""
        if not self.conversation.opened:
            await self.conversation.open()
            self._opened.set()

    async def _feed(self) -> None:
        await self._opened.wait()
        await self.conversation.feed()

    async def _events(self) -> None:
        await self._opened.wait()
        async for event in self.conversation.events():
            self._active = time.monotonic()
            await self._send(event)

    async def _watch_owner(self) -> None:
        await self._opened.wait()
        try:
            await self.conversation.owned(self.gateway.config.admission_timeout_s)
        except NoCapacity as error:
            raise Closing(FULL, "no_capacity", str(error)) from None

    async def _report(self) -> None:
        """Tell the state of the video while it changes."""
        told = self.conversation.statistics
        while True:
            await asyncio.sleep(self.gateway.config.status_interval_s)
            now = self.conversation.statistics
            if now != told:
                await self._send(VideoStatus(frames=now))
                told = now

    async def _watch_idle(self) -> None:
        limit = self.gateway.limits.idle_s
        while (idle := time.monotonic() - self._active) < limit:
            await asyncio.sleep(limit - idle)
        raise Closing(POLICY, "idle_timeout", f"nothing was said for {limit:g} s, the longest a session may be idle")

    async def _send(self, event: ServerEvent) -> None:
        """One event at a time. Raises Closing when the client does not read."""
        limit = self.gateway.limits.send_s
        try:
            async with self._sending, asyncio.timeout(limit):
                await self.websocket.send_text(event.json_text())
        except TimeoutError:
            raise Closing(POLICY, "slow_reader", f"an event could not be sent for {limit:g} s") from None

    async def _close_normally(self) -> None:
        if self.websocket.application_state is WebSocketState.CONNECTED:
            await self.websocket.close(NORMAL)


async def _close(websocket: WebSocket, close_code: int, code: str, message: str) -> None:
    """Tell the client why, as far as it still listens, and close."""
    try:
        await websocket.send_text(failure(code, message).json_text())
        await websocket.close(close_code)
    except (RuntimeError, WebSocketDisconnect):
        log.info("client left before it was told %s: %s", code, message)

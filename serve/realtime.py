"""The WebSocket of one client: messages in, events out, until either side is done.

Ray Serve's proxy reads the socket into an unbounded queue, so TCP cannot slow a client down: this
side reads at once and the conversation bounds what waits. A client's mistake is answered with an
`error` event and changes nothing else. A connection that ends leaves its session for its client to
resume, at any gateway, until `bus.resume_s` are over.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from actors.bus import BusError
from actors.image import check_image
from actors.tasks import end_all
from serve.admission import NoCapacity, owned
from serve.client_events import (
    ClientError,
    ConversationItemCreate,
    InputImage,
    InputText,
    Item,
    ResponseCancel,
    ResponseCreate,
    SessionUpdate,
    VideoAppend,
    VideoEnd,
    is_number,
    parse_binary,
    parse_text,
    picture_bytes,
)
from serve.conversation import Conversation
from serve.gateway import Full, Gateway, Resume
from serve.keys import subprotocol
from serve.limits import TokenBucket
from serve.outgoing import Outgoing, SlowReader
from serve.server_events import (
    ErrorEvent,
    GoingAway,
    ServerEvent,
    SessionCreated,
    SessionEnded,
    SessionUpdated,
    VideoStatus,
    failure,
    refusal,
)

log = logging.getLogger(__name__)

NORMAL, POLICY, TOO_BIG, INTERNAL, RESTART, FULL = 1000, 1008, 1009, 1011, 1012, 1013
NOT_RESUMED = ("session_expired", "session_id", "bad_position", "resume_too_late", "session_taken")


class Closing(Exception):
    """The server ends the connection, with a WebSocket close code; `ends` says that the session ends, too."""

    def __init__(self, close_code: int, code: str, message: str, ends: bool = False) -> None:
        super().__init__(message)
        self.close_code = close_code
        self.code = code
        self.ends = ends


async def serve_realtime(websocket: WebSocket, gateway: Gateway, client: str) -> None:
    """Accept a client and stay until its session has ended or either side is gone."""
    await websocket.accept(subprotocol(websocket))
    try:
        if gateway.closes_in == 0:
            raise Closing(RESTART, "going_away", "this gateway is about to end: connect again")
        async with gateway.conversation(client=client, resume=_wanted(websocket)) as conversation:
            await Connection(websocket, gateway, conversation).run()
    except ClientError as error:
        await _close(websocket, gateway, POLICY, refusal(error))
    except Full as error:
        await _close(websocket, gateway, FULL, failure(error.code, str(error)))
    except Closing as error:
        await _close(websocket, gateway, error.close_code, failure(error.code, str(error)))
    except BusError as error:
        if error.code in NOT_RESUMED:
            await _close(websocket, gateway, POLICY, refusal(ClientError(error.code, str(error), "session_id")))
        else:
            log.error("connection closed: %s", error)
            await _close(websocket, gateway, INTERNAL, failure(error.code, str(error)))
    except WebSocketDisconnect:
        pass
    except Exception as error:
        log.exception("connection failed")
        await _close(websocket, gateway, INTERNAL, failure("internal", f"{type(error).__name__}: {error}"))


class Connection:
    """The tasks around one conversation: receiving, admitting frames, sending events, keeping watch."""

    def __init__(self, websocket: WebSocket, gateway: Gateway, conversation: Conversation) -> None:
        self.websocket = websocket
        self.gateway = gateway
        self.conversation = conversation
        limits = gateway.limits
        self._outgoing = Outgoing(websocket.send_text, limits)
        self._frames = TokenBucket(limits.frames_per_s, limits.frames_burst)
        self._messages = TokenBucket(limits.messages_per_s, limits.messages_burst)
        self._refusals = TokenBucket(per_s=1, burst=1)
        self._opened = asyncio.Event()
        self._active = time.monotonic()
        self._placed = True

    async def run(self) -> None:
        """Raises Closing when the server ends the connection, WebSocketDisconnect when the client does."""
        try:
            await self._run()
        except SlowReader as error:
            raise Closing(POLICY, "slow_reader", str(error)) from None
        except Closing as error:
            if error.ends:
                self.conversation.resumable = False
            raise

    async def _run(self) -> None:
        resumed = self.conversation.opened
        self._tell(SessionCreated(session=self.conversation.info, resumed=resumed))
        if resumed:
            self._tell(VideoStatus(frames=self.conversation.statistics))
            self._opened.set()
        events = asyncio.create_task(self._events())
        tasks = [events, *(asyncio.create_task(work) for work in self._work())]
        try:
            waiting = set(tasks)
            while not events.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            await end_all(tasks)
        await self._outgoing.flush()
        if self.websocket.application_state is WebSocketState.CONNECTED:
            await self.websocket.close(NORMAL)

    def _work(self) -> list[Coroutine[object, object, None]]:
        """All that goes on beside the events."""
        return [
            self._outgoing.run(),
            self._receive(),
            self._feed(),
            self._watch_owner(),
            self._watch_taken(),
            self._watch_drain(),
            self._watch_time(),
            self._report(),
        ]

    async def _receive(self) -> None:
        while True:
            message = await self.websocket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code") or 1005)
            self._active = time.monotonic()
            try:
                await self._handle(message.get("text"), message.get("bytes"))
            except ClientError as error:
                self.gateway.meters.error(error.code)
                if error.code != "rate_limited" or self._refusals.take():
                    self._tell(refusal(error))

    async def _handle(self, text: str | None, data: bytes | None) -> None:
        """One message of the client. Raises ClientError."""
        limits = self.gateway.limits
        if text is not None and not self._messages.take():
            raise ClientError(
                "rate_limited", f"more than {limits.messages_per_s:g} messages a second: some were dropped"
            )
        size = len(text.encode(errors="surrogatepass")) if text is not None else len(data or b"")
        if size > limits.message_bytes:
            raise ClientError("too_big", f"message of {size} bytes, at most {limits.message_bytes} are allowed")
        if text is None:
            video_time, image = parse_binary(data or b"")
            await self._open()
            self._offer(video_time, image)
            return
        event = parse_text(text)
        try:
            await self._take(event)
        except ClientError as error:
            error.event_id = error.event_id or event.event_id
            raise

    async def _take(self, event: object) -> None:
        """One message that could be read. Raises ClientError."""
        conversation = self.conversation
        if isinstance(event, SessionUpdate):
            if not await conversation.update(event.session):
                self._tell(SessionUpdated(session=conversation.info))
            await self._open()
            return
        await self._open()
        match event:
            case VideoAppend(video_time=video_time, image=image_text):
                self._offer(video_time, picture_bytes(image_text, "image"))
            case ConversationItemCreate(item=item):
                await self._take_item(item)
            case ResponseCreate(response=wish):
                text = wish.instructions if wish else None
                question = text if text is None else self.gateway.check_question(text)
                await conversation.respond(question, self.gateway.config.prompt)
            case ResponseCancel(response_id=response_id):
                await conversation.interrupt(response_id)
            case VideoEnd():
                conversation.finish()

    async def _take_item(self, item: Item) -> None:
        """The questions and frames of one item, in order; of an item with a part that is wrong nothing is taken.

        Raises ClientError.
        """
        shown = [part for part in item.content if isinstance(part, InputImage)]
        images = [picture_bytes(part.image_url, "image_url") for part in shown]
        self.conversation.times_of([(part.video_time, image) for part, image in zip(shown, images, strict=True)])
        for image in images:
            self._check_picture(image)
        for part in item.content:
            if isinstance(part, InputText):
                self.gateway.check_question(part.text)
        waiting = iter(images)
        for index, part in enumerate(item.content):
            if isinstance(part, InputText):
                item_id = f"{item.id}_{index}" if item.id and index else item.id
                await self.conversation.ask(part.text, part.video_time, item_id)
            else:
                self._take_rate()
                self.conversation.offer(part.video_time, next(waiting))

    def _offer(self, video_time: float | None, image: bytes) -> None:
        """Look at a frame's rate and header before it may wait. Raises ClientError."""
        self._take_rate()
        self.conversation.times_of([(video_time, image)])
        self._check_picture(image)
        self.conversation.offer(video_time, image)

    def _take_rate(self) -> None:
        """Count a frame. Raises ClientError for one beyond the rate."""
        limits = self.gateway.limits
        if not self._frames.take():
            self.conversation.refuse("rate")
            raise ClientError("rate_limited", f"more than {limits.frames_per_s:g} frames a second: some were dropped")

    def _check_picture(self, image: bytes) -> None:
        """Look at a picture's header. Raises ClientError."""
        try:
            check_image(image, self.gateway.limits.frame_pixels)
        except ValueError as error:
            raise ClientError("bad_frame", str(error), "image") from None

    async def _open(self) -> None:
        """The session's log begins with the first message, so that first settings are those it starts with."""
        if not self.conversation.opened:
            await self.conversation.open()
            self.conversation.resumable = True
            self._opened.set()

    async def _feed(self) -> None:
        await self._opened.wait()
        await self.conversation.feed()

    async def _events(self) -> None:
        await self._opened.wait()
        async for event in self.conversation.events():
            self._active = time.monotonic()
            if isinstance(event, SessionEnded):
                await self.gateway.free_place(self.conversation)  # before the client hears it and opens the next
            await self._outgoing.put_when_few_wait(event)

    async def _watch_owner(self) -> None:
        await self._opened.wait()
        try:
            await owned(self.conversation, self.gateway, self._note_waiting)
        except NoCapacity as error:
            raise Closing(FULL, "no_capacity", str(error), ends=True) from None

    def _note_waiting(self, waits: bool) -> None:
        """To wait for a replica is not to be idle."""
        self._active = time.monotonic()
        self._placed = not waits

    async def _watch_taken(self) -> None:
        await self.conversation.taken.wait()
        raise Closing(POLICY, "session_taken", "the session goes on at a newer connection")

    async def _watch_drain(self) -> None:
        """Tell the client ahead of time that this gateway ends; a drain may be called off."""
        while True:
            await self.gateway.closing.wait()
            seconds = self.gateway.closes_in or 0.0
            self._tell(GoingAway(seconds=round(seconds, 1)))
            await asyncio.sleep(seconds)
            if self.gateway.closing.is_set():
                raise Closing(RESTART, "going_away", "this gateway ends: connect again and resume")

    async def _watch_time(self) -> None:
        """End sessions that are idle or too long. To wait for one more replica is not to be idle."""
        limits = self.gateway.limits
        while True:
            idle = limits.idle_s - (time.monotonic() - self._active if self._placed else 0.0)
            total = limits.total_s - (time.time() - self.conversation.opened_at)
            if idle <= 0:
                text = f"nothing was said for {limits.idle_s:g} s, the longest a session may be idle"
                raise Closing(POLICY, "idle_timeout", text, ends=True)
            if total <= 0:
                text = f"the session is {limits.total_s:g} s old, the longest one may last"
                raise Closing(POLICY, "session_too_long", text, ends=True)
            await asyncio.sleep(min(idle, total))

    async def _report(self) -> None:
        """Tell the state of the video while it changes, once it is noted for the next gateway."""
        told = self.conversation.statistics
        while True:
            await asyncio.sleep(self.gateway.config.status_interval_s)
            now = self.conversation.statistics
            if now != told:
                await self.conversation.note_counts()
                self._tell(VideoStatus(frames=now))
                told = now

    def _tell(self, event: ServerEvent) -> None:
        self._outgoing.put(event)


def _wanted(websocket: WebSocket) -> Resume | None:
    """The session that the address names. Raises ClientError."""
    session_id, after = (websocket.query_params.get(name) for name in ("session_id", "after"))
    if session_id is None:
        if after is not None:
            raise ClientError("bad_value", "after is given without session_id, expected both", "session_id")
        return None
    if after is not None and not is_number(after.removeprefix("-")):
        raise ClientError("bad_value", f"after is {after!r:.60}, expected a log position", "after")
    return Resume(session_id, None if after is None else max(-1, int(after)))


async def _close(websocket: WebSocket, gateway: Gateway, close_code: int, event: ErrorEvent) -> None:
    """Tell the client why, as far as it still listens, and close."""
    code = event.error.code
    gateway.meters.error(code)
    try:
        async with asyncio.timeout(gateway.limits.send_s):
            await websocket.send_text(event.json_text())
            await websocket.close(close_code)
    except (RuntimeError, WebSocketDisconnect, TimeoutError):
        log.info("client left before it was told %s", code)

"""`/v1/streams`: sources that the server reads itself (ingest.py), each a live session that clients look at.

A stream's id is its session's: its events come from the session log, so that any gateway shows them and
takes questions and its end; which gateway reads a source is in that gateway's report. A stream ends with
the gateway that reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter

from actors.bus import BusError, SessionMeta
from actors.config import FrameConfig
from actors.messages import Query
from actors.messages import SessionEnded as SessionEndedEntry
from actors.tasks import end_all
from serve.access import Client, TheGateway
from serve.admission import NoCapacity, owned
from serve.client_events import ClientError, SessionPatch, VideoTime, check_time, is_number
from serve.conversation import Conversation, end_at_once, open_response
from serve.errors import ApiError, described
from serve.gateway import Gateway
from serve.ingest import Ingest, Source, SourceError
from serve.server_events import ServerEvent, SessionEnded, SessionInfo, Statistics, Usage, failure
from serve.sse import EventStream, as_sse
from serve.translation import Translator
from serve.url_guard import UrlGuard

log = logging.getLogger(__name__)

router = APIRouter(tags=["server-side streams"])

Status = Literal["running", "ended", "failed"]
ENDED_KEPT = 64
SETTLED_S = 5.0


class StreamRequest(BaseModel):
    """A source: a file of the server, or an http(s) or rtsp URL. `live` plays what has an end at its own pace."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", json_schema_extra={"examples": [{"source": "rtsp://camera.example/door"}]}
    )

    source: str = Field(min_length=1, max_length=4096)
    live: bool = True
    session: SessionPatch = SessionPatch()


class Stream(BaseModel):
    """A source that is read, or was."""

    id: str
    object: Literal["stream"] = "stream"
    source: str
    status: Status
    created: int
    error: str | None = None
    frames: Statistics
    session: SessionInfo


class StreamList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Stream]


class QueryRequest(BaseModel):
    """A question about now, or at `video_time`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = Field(min_length=1)
    video_time: VideoTime | None = None


class QueryAccepted(BaseModel):
    """`id` is the item's in the events."""

    id: str
    object: Literal["stream.query"] = "stream.query"


class Deleted(BaseModel):
    id: str
    object: Literal["stream.deleted"] = "stream.deleted"
    deleted: Literal[True] = True


_streams: TypeAdapter[list[dict[str, JsonValue]]] = TypeAdapter(list[dict[str, JsonValue]])


@dataclass
class Running:
    """One source of this gateway and the task that reads it."""

    ingest: Ingest
    conversation: Conversation
    created: int
    task: asyncio.Task[None] | None = None
    status: Status = "running"
    error: str | None = None

    @property
    def told(self) -> Stream:
        return Stream(
            id=self.conversation.id,
            source=self.ingest.source.shown,
            status=self.status,
            created=self.created,
            error=self.error,
            frames=self.conversation.statistics,
            session=self.conversation.info,
        )


class Streams:
    """The sources that one gateway reads; the latest that have ended are remembered."""

    def __init__(self, gateway: Gateway, guard: UrlGuard, frames: FrameConfig) -> None:
        self.gateway = gateway
        self.guard = guard
        self._frames = frames
        self._known: dict[str, Running] = {}
        self._starting = 0
        gateway.streams = lambda: [
            {"client": running.conversation.client, **running.told.model_dump(mode="json")}
            for running in self._known.values()
        ]

    async def start(self, client: str, request: StreamRequest) -> Stream:
        """Begin to read a source. Raises ClientError, Full and ApiError."""
        source = await asyncio.to_thread(Source.of, request.source, self.guard)
        running = self._starting + sum(known.status == "running" for known in self._known.values())
        if running >= self.guard.config.streams:
            raise ApiError(429, "too_many_streams", f"{running} streams are read, the most this gateway reads")
        self._starting += 1
        try:
            made = await self._begin(client, request, source)
        finally:
            self._starting -= 1
        for old in [key for key, known in self._known.items() if known.status != "running"][:-ENDED_KEPT]:
            del self._known[old]
        with contextlib.suppress(BusError):  # the other gateways hear of it now, or with the next report
            await self.gateway.reporter.once()
        return made.told

    async def _begin(self, client: str, request: StreamRequest, source: Source) -> Running:
        async with AsyncExitStack() as stack:
            recorded = not request.live
            conversation = await stack.enter_async_context(self.gateway.conversation(bulk=recorded, client=client))
            await conversation.update(request.session)
            await conversation.open()
            fps = conversation.settings.fps
            ingest = Ingest(source, fps, self._frames, request.live, self.gateway.meters.reconnect)
            made = Running(ingest, conversation, int(time.time()))
            made.task = asyncio.create_task(self._read(made, stack.pop_all()))
        self._known[conversation.id] = made
        return made

    async def close(self) -> None:
        """Stop reading."""
        await end_all([running.task for running in self._known.values() if running.task is not None])

    async def _read(self, running: Running, stack: AsyncExitStack) -> None:
        """From the first picture to the session's end, however it comes."""
        conversation = running.conversation
        async with stack:
            work = [
                asyncio.create_task(_supply(running.ingest, conversation)),
                asyncio.create_task(conversation.feed()),
                asyncio.create_task(owned(conversation, self.gateway)),
            ]
            end = asyncio.create_task(_to_the_end(conversation))
            try:
                async with asyncio.timeout(self.guard.config.stream_s):
                    await _until(end, work)
                running.status = "ended"
            except TimeoutError:
                running.status, running.error = "ended", "the longest time of a stream is over"
            except asyncio.CancelledError:
                running.status = "ended"
                raise
            except (SourceError, NoCapacity, BusError, ClientError) as error:
                running.status, running.error = "failed", str(error)
                log.warning("stream=%s source=%s failed: %s", conversation.id, running.ingest.source.shown, error)
            except Exception as error:  # a stream that nobody reads any more must not count as one that is read
                running.status, running.error = "failed", f"internal: {type(error).__name__}"
                log.exception("stream=%s source=%s failed", conversation.id, running.ingest.source.shown)
            finally:
                running.ingest.stopped.set()
                await end_all((*work, end))


async def _until(end: asyncio.Task[None], work: list[asyncio.Task[None]]) -> None:
    """Wait for the end. Raises what breaks before."""
    waiting = {end, *work}
    while not end.done():
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()


async def _supply(ingest: Ingest, conversation: Conversation) -> None:
    """Offer pictures as they come, then say that there are no more."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="ingest")
    loop = asyncio.get_running_loop()
    pictures = ingest.pictures()
    try:
        while (picture := await loop.run_in_executor(thread, next, pictures, None)) is not None:
            if not ingest.live:
                await conversation.room()
            conversation.offer(*picture)
    finally:
        ingest.stopped.set()
        thread.submit(_close, pictures)
        thread.shutdown(wait=False)
    conversation.finish()


def _close(pictures: Iterator[object]) -> None:
    close = getattr(pictures, "close", None)
    if close is not None:
        close()


async def _to_the_end(conversation: Conversation) -> None:
    """Follow the session's log, which settles its frames."""
    async for _ in conversation.events():
        pass


def the_streams(request: Request) -> Streams:
    streams = request.app.state.streams
    assert isinstance(streams, Streams)
    return streams


@router.post("/v1/streams", status_code=201, responses=described(413, 422, 429, 503))
async def create_stream(request: Request, client: Client, wanted: StreamRequest) -> Stream:
    """Read a source on the server. Refused unless the settings list it (section `sources`)."""
    return await the_streams(request).start(client, wanted)


@router.get("/v1/streams", responses=described(503))
async def list_streams(gateway: TheGateway, client: Client) -> StreamList:
    """The client's streams at all gateways, those that ended lately included."""
    return StreamList(data=await _of(gateway, client))


@router.get("/v1/streams/{stream_id}", responses=described(404, 503))
async def get_stream(gateway: TheGateway, client: Client, stream_id: str) -> Stream:
    """One stream."""
    return await _one(gateway, client, stream_id)


@router.delete("/v1/streams/{stream_id}", responses=described(404, 503))
async def delete_stream(gateway: TheGateway, client: Client, stream_id: str) -> Deleted:
    """End a stream, at whatever gateway it is read."""
    await _one(gateway, client, stream_id)
    meta = await _meta(gateway, client, stream_id)
    if meta.state != "ended" and not await gateway.bus.abandon(stream_id, "stream deleted"):
        started = await open_response(gateway.bus, stream_id, meta.first_position, meta.position)
        await end_at_once(gateway.bus, stream_id, meta.admitted - 1, started and started[1].response_id)
    return Deleted(id=stream_id)


@router.post("/v1/streams/{stream_id}/queries", status_code=202, responses=described(404, 413, 422, 503))
async def ask_stream(gateway: TheGateway, client: Client, stream_id: str, query: QueryRequest) -> QueryAccepted:
    """Ask about the video; the answer is among the events."""
    gateway.check_question(query.text)
    meta = await _meta(gateway, client, stream_id)
    at = None if query.video_time is None else check_time(query.video_time)
    item_id = f"item_{uuid.uuid4().hex}"
    try:
        message = Query(query_id=item_id, text=query.text, after_seq=meta.admitted - 1, time=at)
        await gateway.bus.send(stream_id, message)
    except BusError as error:
        if error.code in ("too_many_inputs", "message_too_large", "session_ended"):
            raise ClientError(error.code, str(error)) from None
        raise
    return QueryAccepted(id=item_id)


@router.get(
    "/v1/streams/{stream_id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}, **described(404, 422, 503)},
)
async def stream_events(
    gateway: TheGateway,
    client: Client,
    stream_id: str,
    last_event_id: Annotated[str | None, Header(description="go on behind this event")] = None,
) -> StreamingResponse:
    """The session's events as server-sent events: all that are kept, or those behind Last-Event-ID."""
    meta = await _meta(gateway, client, stream_id)
    after = meta.first_position - 1
    if last_event_id:
        if not is_number(last_event_id) or int(last_event_id) >= meta.position:
            text = f"Last-Event-ID is {last_event_id!r:.40}, expected the id of an event, below {meta.position}"
            raise ClientError("bad_position", text, "Last-Event-ID")
        after = int(last_event_id)
        if after + 1 < meta.first_position:
            text = (
                f"Last-Event-ID is {after}, the log begins at {meta.first_position}: leave it out for all that is kept"
            )
            raise ClientError("resume_too_late", text, "Last-Event-ID")
    stream = await _one(gateway, client, stream_id)
    texts = _told(gateway, client, stream, meta, after)
    return EventStream(texts, AsyncExitStack(), gateway.limits.send_s)


async def _told(gateway: Gateway, client: str, stream: Stream, meta: SessionMeta, after: int) -> AsyncGenerator[str]:
    """Events of entries behind `after`. Only the last event of an entry has an id, so that none is ever lost."""
    translator, include = Translator(), frozenset(stream.session.include)
    begin = max(meta.first_position, 0) - 1
    try:
        async for position, entry in gateway.bus.tail(stream.id, begin, onlooker=True):
            events: list[ServerEvent] = list(
                translator.events(position, entry, include, lambda _: stream.session, meta.settings.suppress_duplicates)
            )
            if isinstance(entry, SessionEndedEntry):
                try:
                    now = await _ended(gateway, client, stream.id)
                except ApiError:  # the gateway that read it has died: what was known at first has to do
                    now = stream
                if now.error:
                    yield as_sse(failure("source_failed", now.error))
                usage = Usage(input_tokens=entry.positions - entry.spoken, output_tokens=entry.spoken)
                ended = SessionEnded(position=position, reason=entry.reason, frames=now.frames, usage=usage)
                events.append(ended)
            if position > after:
                for index, event in enumerate(events):
                    last = index == len(events) - 1
                    yield as_sse(event if last else event.model_copy(update={"position": None}))
    except BusError as error:
        yield as_sse(failure(error.code, str(error)))


async def _of(gateway: Gateway, client: str) -> list[Stream]:
    told = [_streams.validate_python(report.stats.get("streams", [])) for report in await gateway.reports()]
    found = [Stream.model_validate(each) for some in told for each in some if each.pop("client", None) == client]
    return sorted(found, key=lambda stream: (stream.created, stream.id))


async def _one(gateway: Gateway, client: str, stream_id: str) -> Stream:
    """Raises ApiError (404) for a stream that is not there or not this client's."""
    for stream in await _of(gateway, client):
        if stream.id == stream_id:
            return stream
    raise ApiError(404, "not_found", f"stream {stream_id!r:.80} is not there (any more)", "stream_id")


async def _ended(gateway: Gateway, client: str, stream_id: str) -> Stream:
    """The stream once the gateway that reads it knows the end of its log, too, and has counted all frames before it.

    As far as that is known after `SETTLED_S`.
    """
    deadline = time.monotonic() + SETTLED_S
    while (stream := await _one(gateway, client, stream_id)).status == "running" and time.monotonic() < deadline:
        await asyncio.sleep(SETTLED_S / 50)
    return stream


async def _meta(gateway: Gateway, client: str, stream_id: str) -> SessionMeta:
    await _one(gateway, client, stream_id)
    meta = await gateway.bus.session_meta(stream_id)
    if meta is None or meta.client != client:
        raise ApiError(404, "not_found", f"stream {stream_id!r:.80} is not there (any more)", "stream_id")
    return meta

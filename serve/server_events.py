"""What the gateway says to clients: every event of `/v1/realtime` and of the server-sent events as a type.

Names are those of the OpenAI Realtime API where it has one; video is our extension. An event that
stems from the session log carries the log's `position`; events of one log entry share it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from serve.client_events import ClientError, DropPolicy


class ServerEvent(BaseModel):
    """Base of server events. `position` is the log position an event stems from, if it does."""

    model_config = ConfigDict(frozen=True)
    type: str
    position: int | None = None

    def json_text(self) -> str:
        """As one JSON text message, absent fields left out."""
        return self.model_dump_json(exclude_none=True)


class VideoInfo(BaseModel):
    """Settings of the video in force."""

    fps: float
    threshold: float
    drop_policy: DropPolicy


class SessionInfo(BaseModel):
    """A session and the settings in force."""

    id: str
    type: Literal["realtime"] = "realtime"
    instructions: str | None = None
    max_output_tokens: int
    include: list[str]
    video: VideoInfo


class SessionCreated(ServerEvent):
    """First event of every connection."""

    type: Literal["session.created"] = "session.created"
    session: SessionInfo


class SessionUpdated(ServerEvent):
    """Settings in force from here on; without a position they belong to the gateway alone."""

    type: Literal["session.updated"] = "session.updated"
    session: SessionInfo


class Statistics(BaseModel):
    """Frames of one session so far. `lag_*` is from a frame's arrival to its decision, in seconds."""

    received: int
    admitted: int
    waiting: int
    decided: int
    skipped: int
    dropped: int
    lag_p50: float | None = None
    lag_p99: float | None = None


class VideoStatus(ServerEvent):
    """How the video is keeping up, about once a second while frames come."""

    type: Literal["input_video_buffer.status"] = "input_video_buffer.status"
    frames: Statistics


class FrameDecided(ServerEvent):
    """A frame entered the context; only sent when `include` asks for it."""

    type: Literal["frame_decided"] = "frame_decided"
    seq: int
    video_time: float
    p_silent: float


class ItemContent(BaseModel):
    """A question as text."""

    type: Literal["input_text"] = "input_text"
    text: str


class ItemInfo(BaseModel):
    """A user's question."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["user"] = "user"
    content: list[ItemContent]


class ItemAdded(ServerEvent):
    """A question entered the context; its response follows."""

    type: Literal["conversation.item.added"] = "conversation.item.added"
    video_time: float
    item: ItemInfo


class ResponseInfo(BaseModel):
    """A response; `item_id` is the question it answers, absent when it was spoken unasked."""

    id: str
    status: Literal["in_progress", "completed", "incomplete", "cancelled"]
    reason: str | None = None
    item_id: str | None = None
    video_time: float


class ResponseCreated(ServerEvent):
    """The assistant starts to speak."""

    type: Literal["response.created"] = "response.created"
    response: ResponseInfo


class TextDelta(ServerEvent):
    """More text of the open response."""

    type: Literal["response.output_text.delta"] = "response.output_text.delta"
    response_id: str
    delta: str


class TextDone(ServerEvent):
    """The whole text of a response."""

    type: Literal["response.output_text.done"] = "response.output_text.done"
    response_id: str
    video_time: float
    text: str


class ResponseDone(ServerEvent):
    """The response was closed."""

    type: Literal["response.done"] = "response.done"
    response: ResponseInfo


class ErrorInfo(BaseModel):
    """What went wrong; `event_id` is the client's id of the message that caused it."""

    type: Literal["invalid_request_error", "server_error"]
    code: str
    message: str
    param: str | None = None
    event_id: str | None = None
    video_time: float | None = None


class ErrorEvent(ServerEvent):
    """Something the client sent was refused, or the server failed; the session goes on unless it is closed."""

    type: Literal["error"] = "error"
    error: ErrorInfo


class SessionEnded(ServerEvent):
    """Last event of a session."""

    type: Literal["session.ended"] = "session.ended"
    reason: str
    frames: Statistics


AnyServerEvent = Annotated[
    SessionCreated
    | SessionUpdated
    | VideoStatus
    | FrameDecided
    | ItemAdded
    | ResponseCreated
    | TextDelta
    | TextDone
    | ResponseDone
    | ErrorEvent
    | SessionEnded,
    Field(discriminator="type"),
]
_server_event: TypeAdapter[AnyServerEvent] = TypeAdapter(AnyServerEvent)


def parse_event(text: str | bytes) -> AnyServerEvent:
    """An event as a client receives it. Raises pydantic's ValidationError for what is none."""
    return _server_event.validate_json(text)


def refusal(error: ClientError) -> ErrorEvent:
    """A client's mistake as the event that answers it."""
    info = ErrorInfo(
        type="invalid_request_error",
        code=error.code,
        message=str(error),
        param=error.param,
        event_id=error.event_id,
    )
    return ErrorEvent(error=info)


def failure(code: str, message: str) -> ErrorEvent:
    """The server's own failure as an event."""
    return ErrorEvent(error=ErrorInfo(type="server_error", code=code, message=message))

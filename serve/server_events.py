"""What the gateway says to clients: every event of `/v1/realtime` and of the server-sent events as a type.

Names and fields are those of the OpenAI Realtime API where it has them; video is our extension. An
event that stems from the session log carries the log's `position`, which events of one log entry
share, and an `event_id` that is the same whenever and by whichever gateway it is told.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from actors.config import Fit
from serve.client_events import ClientError, DropPolicy


class ServerEvent(BaseModel):
    """Base of server events. `position` is the log position an event stems from, if it does."""

    model_config = ConfigDict(frozen=True)
    type: str
    event_id: str = ""
    position: int | None = None

    def json_text(self) -> str:
        """As one JSON text message, absent fields left out."""
        return self.model_dump_json(exclude_none=True)


class WindowInfo(BaseModel):
    """When the context is rebuilt and how much of it stays, in positions."""

    trigger: int | None = None
    keep: int | None = None


class VideoInfo(BaseModel):
    """Settings of the video in force; `window` is absent where the model's limit is the only bound.

    `fit` is the model's: which part of a picture it sees (FrameConfig).
    """

    fps: float
    threshold: float
    drop_policy: DropPolicy
    fit: Fit
    window: WindowInfo | None = None


class SessionInfo(BaseModel):
    """A session and the settings in force. `model` is the one that answers."""

    id: str
    object: Literal["realtime.session"] = "realtime.session"
    type: Literal["realtime"] = "realtime"
    model: str | None = None
    output_modalities: list[Literal["text"]] = ["text"]
    instructions: str | None = None
    max_output_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    include: list[str]
    video: VideoInfo


class SessionCreated(ServerEvent):
    """First event of every connection; `resumed` where the session was there before."""

    type: Literal["session.created"] = "session.created"
    session: SessionInfo
    resumed: bool = False


class SessionUpdated(ServerEvent):
    """Settings in force from here on; without a position they belong to the gateway alone."""

    type: Literal["session.updated"] = "session.updated"
    session: SessionInfo


class Statistics(BaseModel):
    """Frames of one session so far. `lag_*` is from a frame's arrival to its decision, in seconds.

    `received` are those the server answers for: admitted, or dropped and counted; those that are
    `waiting` come on top and go with the gateway. `through` is the video time up to which none waits.
    """

    received: int
    admitted: int
    waiting: int
    decided: int
    skipped: int
    dropped: int
    dropped_by: dict[str, int] = {}
    through: float | None = None
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
    object: Literal["realtime.item"] = "realtime.item"
    status: Literal["completed"] = "completed"
    type: Literal["message"] = "message"
    role: Literal["user"] = "user"
    content: list[ItemContent]


class ItemAdded(ServerEvent):
    """A question entered the context; its response follows."""

    type: Literal["conversation.item.added"] = "conversation.item.added"
    video_time: float
    item: ItemInfo


class OutputContent(BaseModel):
    """What was said."""

    type: Literal["output_text"] = "output_text"
    text: str


class OutputItem(BaseModel):
    """The assistant's message of a response."""

    id: str
    object: Literal["realtime.item"] = "realtime.item"
    type: Literal["message"] = "message"
    status: Literal["completed", "incomplete"]
    role: Literal["assistant"] = "assistant"
    content: list[OutputContent]


class StatusDetails(BaseModel):
    """Why a response is not complete."""

    type: Literal["incomplete", "cancelled"]
    reason: Literal["max_output_tokens", "client_cancelled"]


class ResponseInfo(BaseModel):
    """A response; `item_id` is the question it answers, absent when it was spoken unasked."""

    id: str
    object: Literal["realtime.response"] = "realtime.response"
    status: Literal["in_progress", "completed", "incomplete", "cancelled"]
    status_details: StatusDetails | None = None
    output: list[OutputItem] = []
    output_modalities: list[Literal["text"]] = ["text"]
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
    item_id: str
    output_index: Literal[0] = 0
    content_index: Literal[0] = 0
    delta: str


class TextDone(ServerEvent):
    """The whole text of a response."""

    type: Literal["response.output_text.done"] = "response.output_text.done"
    response_id: str
    item_id: str
    output_index: Literal[0] = 0
    content_index: Literal[0] = 0
    video_time: float
    text: str


class ResponseDone(ServerEvent):
    """The response was closed."""

    type: Literal["response.done"] = "response.done"
    response: ResponseInfo


class ErrorInfo(BaseModel):
    """What went wrong; `event_id` is the client's id of the message that caused it."""

    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    code: str
    message: str
    param: str | None = None
    event_id: str | None = None
    video_time: float | None = None


class ErrorEvent(ServerEvent):
    """Something the client sent was refused, or the server failed; the session goes on unless it is closed."""

    type: Literal["error"] = "error"
    error: ErrorInfo

    def json_text(self) -> str:
        """With `param` even where there is none, as in every error of the server."""
        fields = self.model_dump(exclude_none=True)
        return json.dumps(fields | {"error": {"param": None} | fields["error"]}, ensure_ascii=False)


class GoingAway(ServerEvent):
    """The server will close this connection with 1012 in so many seconds: connect again and resume."""

    type: Literal["session.going_away"] = "session.going_away"
    seconds: float


class Usage(BaseModel):
    """Positions of the context: what the model was given, and what it spoke."""

    input_tokens: int
    output_tokens: int


class SessionEnded(ServerEvent):
    """Last event of a session."""

    type: Literal["session.ended"] = "session.ended"
    reason: str
    frames: Statistics
    usage: Usage | None = None


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
    | GoingAway
    | SessionEnded,
    Field(discriminator="type"),
]
_server_event: TypeAdapter[AnyServerEvent] = TypeAdapter(AnyServerEvent)


RATE_CODES = ("rate_limited", "too_many_inputs", "too_many_sessions", "sessions_full", "no_capacity")


def parse_event(text: str | bytes) -> AnyServerEvent:
    """An event as a client receives it. Raises pydantic's ValidationError for what is none."""
    return _server_event.validate_json(text)


def refusal(error: ClientError) -> ErrorEvent:
    """A client's mistake as the event that answers it."""
    info = ErrorInfo(
        type="rate_limit_error" if error.code in RATE_CODES else "invalid_request_error",
        code=error.code,
        message=str(error),
        param=error.param,
        event_id=error.event_id,
    )
    return ErrorEvent(error=info)


def failure(code: str, message: str) -> ErrorEvent:
    """What ends a connection, as an event: the server's own failure unless a limit is the reason."""
    kind: Literal["rate_limit_error", "server_error"] = "rate_limit_error" if code in RATE_CODES else "server_error"
    return ErrorEvent(error=ErrorInfo(type=kind, code=code, message=message))

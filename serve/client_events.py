"""What clients of `/v1/realtime` say: every message as a type, and the reading of untrusted bytes.

Names are those of the OpenAI Realtime API where it has one; video is our extension. Messages are
JSON text, except that a frame may also be one binary message: a header (version byte, video time as
a big-endian double) and then JPEG, PNG or WebP bytes.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

MOST_TOKENS = 4096
MOST_PROBLEMS = 100  # in one message, beyond which no list of them is made: it takes a kilobyte each
BINARY_VERSION = 1
BINARY_HEADER = struct.Struct(">Bd")  # version, video time in seconds

DropPolicy = Literal["latest", "block"]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
VideoTime = Annotated[float, Field(strict=True, ge=0, le=1e9, allow_inf_nan=False)]  # a number: not "1", not true


class ClientError(ValueError):
    """The client's mistake: `code` for programs, the message for people; the session goes on."""

    def __init__(self, code: str, message: str, param: str | None = None, event_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.event_id = event_id


class ClientEvent(BaseModel):
    """Base of client messages: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    event_id: str | None = Field(default=None, max_length=512)


class _Identified(BaseModel):
    """The one field that is read of a message that was refused."""

    event_id: str | None = Field(default=None, max_length=512)


class Part(BaseModel):
    """Base of what client messages are made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class WindowPatch(Part):
    """When the context is rebuilt (`trigger`) and how much of it stays (`keep`), in positions."""

    trigger: int | None = Field(default=None, gt=0)
    keep: int | None = Field(default=None, gt=0)


class VideoPatch(Part):
    """Settings of the video; what is absent stays as it is."""

    fps: float | None = Field(default=None, gt=0, le=60, allow_inf_nan=False)
    threshold: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    window: WindowPatch | None = None
    drop_policy: DropPolicy | None = None


class SessionPatch(Part):
    """Settings of the session; what is absent stays as it is. `include` asks for optional events.

    `model` may be given, as clients of other servers do, and changes nothing: one model is served.
    """

    type: Literal["realtime"] | None = None
    model: str | None = Field(default=None, max_length=256)
    output_modalities: list[Literal["text"]] | None = Field(default=None, min_length=1, max_length=1)
    instructions: str | None = Field(default=None, max_length=8192)
    max_output_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | Literal["inf"] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    repetition_penalty: float | None = Field(default=None, gt=0, le=2, allow_inf_nan=False)
    seed: Seed | None = None
    include: list[Literal["frame_decided"]] | None = Field(default=None, max_length=8)
    video: VideoPatch | None = None

    @property
    def most_tokens(self) -> int | None:
        """`max_output_tokens` as a number."""
        return MOST_TOKENS if self.max_output_tokens == "inf" else self.max_output_tokens


class SessionUpdate(ClientEvent):
    """Change settings, before the first frame or in the middle of the stream."""

    type: Literal["session.update"]
    session: SessionPatch


class InputText(Part):
    """A question: about now, or at `video_time` of the video."""

    type: Literal["input_text"]
    text: str = Field(min_length=1)
    video_time: VideoTime | None = None


class InputImage(Part):
    """A frame as a data URL; without `video_time` it comes one frame after the last. `detail` is the model's affair."""

    type: Literal["input_image"]
    image_url: str = Field(repr=False)
    detail: Literal["auto", "low", "high"] | None = None
    video_time: VideoTime | None = None


class Item(Part):
    """A user's message: questions and frames in order."""

    id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]{1,64}$")
    object: Literal["realtime.item"] | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None
    type: Literal["message"] = "message"
    role: Literal["user"] = "user"
    content: list[Annotated[InputText | InputImage, Field(discriminator="type")]] = Field(min_length=1, max_length=64)


class ConversationItemCreate(ClientEvent):
    """Ask a question or give a frame, as a message of the conversation."""

    type: Literal["conversation.item.create"]
    previous_item_id: None = None
    item: Item


class VideoAppend(ClientEvent):
    """A frame as base64."""

    type: Literal["input_video_buffer.append"]
    video_time: VideoTime
    image: str = Field(repr=False)


class VideoEnd(ClientEvent):
    """No more frames: what waits is decided, what was asked is answered, then the session ends."""

    type: Literal["input_video_buffer.end"]


class ResponseWish(Part):
    """How to respond; `instructions` are asked like a question."""

    instructions: str | None = Field(default=None, min_length=1)
    output_modalities: list[Literal["text"]] | None = Field(default=None, min_length=1, max_length=1)
    conversation: Literal["auto"] | None = None


class ResponseCreate(ClientEvent):
    """Ask the instructions given, else `serve.prompt`: not after a question, which is answered anyway."""

    type: Literal["response.create"]
    response: ResponseWish | None = None


class ResponseCancel(ClientEvent):
    """Stop the response that is being spoken."""

    type: Literal["response.cancel"]
    response_id: str | None = None


AnyClientEvent = SessionUpdate | ConversationItemCreate | VideoAppend | VideoEnd | ResponseCreate | ResponseCancel
_client_event: TypeAdapter[AnyClientEvent] = TypeAdapter(Annotated[AnyClientEvent, Field(discriminator="type")])
CLIENT_TYPES = [
    "session.update",
    "conversation.item.create",
    "input_video_buffer.append",
    "input_video_buffer.end",
    "response.create",
    "response.cancel",
]


def parse_text(text: str) -> AnyClientEvent:
    """A client's text message. Raises ClientError naming the field, what was found and what was expected."""
    try:
        return _client_event.validate_json(text)
    except ValidationError as error:
        raise _client_error(error, _event_id(text)) from None


def parse_patch(fields: Mapping[str, object]) -> SessionPatch:
    """Session settings from a form's fields. Raises ClientError."""
    try:
        return SessionPatch.model_validate(fields)
    except ValidationError as error:
        raise _client_error(error, None) from None


def parse_binary(data: bytes) -> tuple[float, bytes]:
    """Video time and picture bytes of a binary message. Raises ClientError."""
    if len(data) <= BINARY_HEADER.size:
        raise ClientError(
            "bad_frame",
            f"binary message of {len(data)} bytes, expected version byte, 8 bytes of video time and a picture",
        )
    version, video_time = BINARY_HEADER.unpack_from(data)
    if version != BINARY_VERSION:
        raise ClientError("bad_frame", f"binary message of version {version}, expected {BINARY_VERSION}", "version")
    return check_time(video_time), data[BINARY_HEADER.size :]


def pack_binary(video_time: float, image: bytes) -> bytes:
    """A frame as the binary message that `parse_binary` reads."""
    return BINARY_HEADER.pack(BINARY_VERSION, video_time) + image


def check_time(video_time: float) -> float:
    """The time itself when it is a moment of a video. Raises ClientError for NaN, infinity and negatives."""
    if not 0 <= video_time <= 1e9:
        raise ClientError("bad_time", f"video_time is {video_time}, expected seconds from 0 on", "video_time")
    return video_time


def is_number(text: str) -> bool:
    """Whether a header's or an address's text is a whole number of a size that occurs: `int` takes or fails at more."""
    return text.isascii() and text.isdecimal() and len(text) < 16


def picture_bytes(encoded: str, param: str) -> bytes:
    """Bytes of base64 text or of a base64 data URL. Raises ClientError."""
    if encoded.startswith("data:"):
        header, comma, encoded = encoded.partition(",")
        if not comma or not header.startswith("data:image/") or not header.endswith(";base64"):
            raise ClientError("bad_frame", f"{param} is {header[:60]!r}, expected data:image/...;base64,...", param)
    elif param == "image_url":
        raise ClientError("bad_frame", f"image_url is {encoded[:60]!r}, expected data:image/...;base64,...", param)
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ClientError("bad_frame", f"{param} is not base64: {error}", param) from None


def _event_id(text: str) -> str | None:
    """The client's own id of a message that was refused, where it can be read."""
    try:
        return _Identified.model_validate_json(text).event_id
    except ValidationError:
        return None


def _client_error(error: ValidationError, event_id: str | None) -> ClientError:
    if error.error_count() > MOST_PROBLEMS:
        text = f"{error.error_count()} fields or items are wrong: /v1/realtime/schema tells what a message may have"
        return ClientError("bad_value", text, None, event_id)
    problem = error.errors(include_url=False)[0]
    kind = problem["type"]
    where = ".".join(str(part) for part in problem["loc"] if str(part) not in CLIENT_TYPES)
    found = repr(problem["input"])
    found = found if len(found) <= 80 else found[:77] + "..."
    if kind == "json_invalid":
        return ClientError("bad_json", f"not valid JSON: {problem['msg'].removeprefix('Invalid JSON: ')}")
    if kind in ("union_tag_invalid", "union_tag_not_found") and not where:
        return ClientError(
            "unknown_type", f"type of {found}, expected one of {', '.join(CLIENT_TYPES)}", "type", event_id
        )
    if kind == "extra_forbidden":
        return ClientError("unknown_field", f"{where} is not a field of this message", where, event_id)
    code = "bad_time" if where.endswith("video_time") else "bad_value"
    if kind == "missing":
        return ClientError(code, f"{where} is missing", where, event_id)
    return ClientError(code, f"{where or 'message'} is {found}: {problem['msg']}", where or None, event_id)

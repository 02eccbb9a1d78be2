"""A request to `/v1/chat/completions` as types, and as what it asks for: pictures, questions, settings.

Order in the messages is order in time: text before a video is said before its first frame, text behind it asked at
its end, text behind an image when that image has been seen, text before images when the first one has;
`video_time` on a text part says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from serve.client_events import (
    MOST_TOKENS,
    ClientError,
    Seed,
    SessionPatch,
    Temperature,
    TopP,
    VideoTime,
    parse_patch,
)
from serve.recorded import Moment, Question

MOST_IMAGES = 64
MOST_PARTS = 256  # of one message: pictures, and questions about them
NEUTRAL: dict[str, tuple[JsonValue, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "stop": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")


class Given(BaseModel):
    """Base of what clients send: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Url(Given):
    """`data:` or an allow-listed https address."""

    url: str = Field(repr=False, min_length=1)
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(Given):
    """A question or an instruction."""

    type: Literal["text"]
    text: str = Field(min_length=1)
    video_time: VideoTime | None = None


class ImagePart(Given):
    """One picture: a frame."""

    type: Literal["image_url"]
    image_url: Url


class VideoPart(Given):
    """A video; without `video_url` it is the file that came with the request."""

    type: Literal["video_url", "video"]
    video_url: Url | None = None


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


def _not_too_many(content: object) -> object:
    """Before each part is looked at."""
    if isinstance(content, list) and len(content) > MOST_PARTS:
        raise ValueError(f"{len(content)} parts, at most {MOST_PARTS} are taken in one message")
    return content


class Message(Given):
    """What the user says and shows, or how the assistant should behave."""

    role: Literal["system", "developer", "user"]
    content: Annotated[str | list[Part], Field(min_length=1), BeforeValidator(_not_too_many)]
    name: str | None = None


class StreamOptions(Given):
    include_usage: bool = False
    include_obfuscation: bool = False


class VideoSettings(Given):
    """How the video is watched; an extension. `spontaneous` tells also what was said without a question."""

    fps: float = Field(default=2.0, gt=0, le=60, allow_inf_nan=False)
    threshold: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    spontaneous: bool = True


class ChatRequest(BaseModel):
    """Parameters that have an effect; others are refused by name unless they ask for nothing."""

    model_config = ConfigDict(frozen=True, extra="allow")

    model: str = Field(min_length=1, max_length=256, examples=["videollm-online"])
    messages: list[Message] = Field(min_length=1, max_length=64)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS, description="longest response")
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS, description="longest response")
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    video: VideoSettings = VideoSettings()

    def check_rest(self) -> None:
        """Raises ClientError naming a parameter that would have to have an effect."""
        for name, value in (self.model_extra or {}).items():
            if value is None or name in IGNORED or value in NEUTRAL.get(name, ()):
                continue
            known = "is not supported here" if name in NEUTRAL else "is not a parameter of this request"
            raise ClientError("unsupported_parameter", f"{name:.60} {known}: leave it out", name[:60])


@dataclass(frozen=True)
class Asked:
    """What a request asks for: one video, or images, and the questions about them."""

    video: VideoPart | None
    images: tuple[Url, ...]
    questions: tuple[Question, ...]
    patch: SessionPatch


def understood(request: ChatRequest) -> Asked:
    """The request in terms of sessions. Raises ClientError."""
    request.check_rest()
    video: VideoPart | None = None
    images: list[Url] = []
    questions: list[Question] = []
    parts = _parts(request.messages)
    first: Moment = "before" if any(isinstance(part, VideoPart) for _, part in parts) else 0.0
    for where, part in parts:
        match part:
            case TextPart():
                place: Moment = "after" if video else (len(images) - 1) / request.video.fps if images else first
                questions.append(Question(part.text, place if part.video_time is None else part.video_time))
            case VideoPart() if video is not None:
                raise ClientError("bad_value", "a request is about one video, this is the second", where)
            case VideoPart():
                video = part
            case ImagePart():
                images.append(part.image_url)
        if video and images:
            raise ClientError("bad_value", "a request has a video or images, not both", where)
    if not video and not images:
        raise ClientError("bad_value", "nothing to see: add a part of type video_url or image_url", "messages")
    if len(images) > MOST_IMAGES:
        raise ClientError("bad_value", f"{len(images)} images, at most {MOST_IMAGES} are taken", "messages")
    return Asked(video, tuple(images), tuple(questions), _patch(request))


def _parts(messages: Sequence[Message]) -> list[tuple[str, TextPart | ImagePart | VideoPart]]:
    """The users' parts in order, each with its place in the request."""
    found: list[tuple[str, TextPart | ImagePart | VideoPart]] = []
    for index, message in enumerate(messages):
        if message.role == "user":
            parts = (
                [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
            )
            found += [(f"messages.{index}.content.{number}", part) for number, part in enumerate(parts)]
    return found


def _patch(request: ChatRequest) -> SessionPatch:
    instructions = "\n".join(
        _text(message, index) for index, message in enumerate(request.messages) if message.role != "user"
    )
    given: dict[str, object] = {
        "instructions": instructions or None,
        "max_output_tokens": request.max_completion_tokens or request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "video": {"fps": request.video.fps, "threshold": request.video.threshold},
    }
    return parse_patch(given)


def _text(message: Message, index: int) -> str:
    if isinstance(message.content, str):
        return message.content
    texts = [part.text for part in message.content if isinstance(part, TextPart)]
    if len(texts) < len(message.content):
        raise ClientError("bad_value", f"a {message.role} message holds text only", f"messages.{index}.content")
    return "\n".join(texts)

"""A session's events as the message of a chat completion, whole or in chunks."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import BaseModel

from serve.server_events import ItemAdded, ResponseCreated, ResponseDone, ServerEvent, SessionEnded, TextDelta, TextDone

FinishReason = Literal["stop", "length"]


class Segment(BaseModel):
    """One response: when it was spoken, and the question it answers if it does."""

    video_time: float
    text: str
    question: str | None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    segments: list[Segment]


class Choice(BaseModel):
    index: Literal[0] = 0
    message: ChatMessage
    finish_reason: FinishReason
    logprobs: None = None


class ChatUsage(BaseModel):
    """Positions of the context: those the model was given, and those it spoke."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    frames: int


class ChatCompletion(BaseModel):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage | None


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: Literal[0] = 0
    delta: Delta
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """A piece of the answer; `video_time` says where in the video it belongs."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    video_time: float | None = None
    usage: ChatUsage | None = None

    def json_text(self) -> str:
        """As one JSON text; `finish_reason` is null until the last, other absent fields are left out."""
        fields = self.model_dump(exclude_none=True)
        for choice in fields["choices"]:
            choice.setdefault("finish_reason", None)
        return json.dumps(fields, ensure_ascii=False)


class Answer:
    """Gathers what is said; `spontaneous` says whether to tell what nobody asked for."""

    def __init__(self, session_id: str, model: str, created: int, spontaneous: bool) -> None:
        self._id = f"chatcmpl-{session_id.removeprefix('sess_')}"
        self._model = model
        self._created = created
        self._spontaneous = spontaneous
        self._questions: dict[str, str] = {}
        self._open: dict[str, tuple[float, str | None]] = {}
        self._segments: list[Segment] = []
        self._lines = 0
        self._finish: FinishReason = "stop"
        self._usage: ChatUsage | None = None

    def take(self, event: ServerEvent) -> list[ChatChunk]:
        """One event of the session; the chunks that it makes."""
        match event:
            case ItemAdded():
                self._questions[event.item.id] = event.item.content[0].text
            case ResponseCreated(response=response):
                if self._spontaneous or response.item_id is not None:
                    self._open[response.id] = response.video_time, response.item_id
                    self._lines += 1
                    return [self._said("\n", response.video_time)] if self._lines > 1 else []
            case TextDelta() if event.response_id in self._open:
                return [self._said(event.delta, self._open[event.response_id][0])]
            case TextDone() if event.response_id in self._open:
                video_time, item_id = self._open[event.response_id]
                question = self._questions.get(item_id) if item_id else None
                self._segments.append(Segment(video_time=video_time, text=event.text, question=question))
            case ResponseDone(response=response) if self._open.pop(response.id, None):
                self._finish = "length" if response.status == "incomplete" else self._finish
            case SessionEnded():
                self._usage = _usage(event)
        return []

    def opening(self) -> ChatChunk:
        return self._chunk(Delta(role="assistant", content=""))

    def closing(self) -> ChatChunk:
        return self._chunk(Delta(), self._finish)

    def usage_chunk(self) -> ChatChunk:
        return self._chunk(None).model_copy(update={"usage": self._usage})

    def completion(self) -> ChatCompletion:
        message = ChatMessage(content="\n".join(segment.text for segment in self._segments), segments=self._segments)
        choice = Choice(message=message, finish_reason=self._finish)
        return ChatCompletion(
            id=self._id, created=self._created, model=self._model, choices=[choice], usage=self._usage
        )

    def _said(self, text: str, video_time: float) -> ChatChunk:
        return self._chunk(Delta(content=text)).model_copy(update={"video_time": video_time})

    def _chunk(self, delta: Delta | None, finish: FinishReason | None = None) -> ChatChunk:
        choices = [] if delta is None else [ChunkChoice(delta=delta, finish_reason=finish)]
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=choices)


def _usage(ended: SessionEnded) -> ChatUsage | None:
    if ended.usage is None:
        return None
    given, spoken = ended.usage.input_tokens, ended.usage.output_tokens
    return ChatUsage(
        prompt_tokens=given, completion_tokens=spoken, total_tokens=given + spoken, frames=ended.frames.decided
    )

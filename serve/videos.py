"""`POST /v1/videos`: an uploaded video file in, the session's events as server-sent events out."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.responses import StreamingResponse
from starlette.datastructures import UploadFile as FormFile

from serve.access import Client, TheGateway
from serve.client_events import ClientError, SessionPatch, check_time, parse_patch
from serve.conversation import Conversation
from serve.errors import ApiError, described
from serve.gateway import Gateway
from serve.recorded import Moment, Question, Recording, check_video, pictures_of_video, watch
from serve.server_events import ServerEvent, SessionCreated
from serve.sse import EventStream, as_sse

router = APIRouter(tags=["recorded video"])


@router.post(
    "/v1/videos",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}, **described(408, 413, 422, 429, 503)},
)
async def videos(
    request: Request,
    gateway: TheGateway,
    client: Client,
    video: Annotated[UploadFile, File(description="a video file")],
    question: Annotated[list[str], Form(description="asked at its question_time")] = [],  # noqa: B006
    question_time: Annotated[
        list[float], Form(description="seconds, one per question; before the first frame where absent")
    ] = [],  # noqa: B006
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
    times: list[Moment] = [check_time(at) for at in question_time]
    times += ["before"] * (len(question) - len(times))
    settings = {"max_output_tokens": max_output_tokens, "video": {"fps": fps, "threshold": threshold}}
    patch = parse_patch({"include": include, **settings})
    async with AsyncExitStack() as stack:
        stack.enter_context(slot(request))
        path = await stack.enter_async_context(stored(video))
        await check_video(path, shown_name(video), gateway.limits)
        conversation = await stack.enter_async_context(opened(gateway, client, patch))
        asked = tuple(Question(text, at) for text, at in zip(question, times, strict=True))
        recording = Recording(pictures_of_video(path, fps, request.app.state.frames), asked)
        texts = _told(SessionCreated(session=conversation.info), watch(recording, conversation, gateway))
        return EventStream(texts, stack.pop_all(), gateway.limits.send_s)


@asynccontextmanager
async def opened(gateway: Gateway, client: str, patch: SessionPatch) -> AsyncIterator[Conversation]:
    """A session for a recording, begun with its settings. Raises Full and ClientError."""
    async with gateway.conversation(bulk=True, client=client) as conversation:
        await conversation.update(patch)
        await conversation.open()
        yield conversation


@asynccontextmanager
async def stored(video: FormFile) -> AsyncIterator[Path]:
    """The uploaded file under a name of ours, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="videollm-") as folder:
        path = Path(folder) / f"upload{Path(shown_name(video)).suffix[:8]}"
        await asyncio.to_thread(_store, video, path)
        yield path


def shown_name(video: FormFile) -> str:
    """What the client calls the file, without folders and what cannot be printed."""
    name = Path(video.filename or "video").name
    return "".join(letter if letter.isprintable() and letter.isascii() else "?" for letter in name)[:80]


class Slots:
    """How many recordings a gateway decodes at a time."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0

    def __enter__(self) -> None:
        if self.taken >= self.most:
            raise ApiError(429, "too_many_recordings", f"{self.taken} recorded videos are being watched: try later")
        self.taken += 1

    def __exit__(self, *_: object) -> None:
        self.taken -= 1


def slot(request: Request) -> Slots:
    """A place among the recordings of this gateway, to be entered. Raises ApiError (429)."""
    slots = request.app.state.slots
    assert isinstance(slots, Slots)
    return slots


async def _told(created: SessionCreated, events: AsyncGenerator[ServerEvent]) -> AsyncGenerator[str]:
    async with aclosing(events):
        yield as_sse(created)
        async for event in events:
            yield as_sse(event)


def _store(video: FormFile, path: Path) -> None:
    with path.open("wb") as file:
        shutil.copyfileobj(video.file, file, 1 << 20)

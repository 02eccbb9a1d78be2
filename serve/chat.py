"""`POST /v1/chat/completions`: recorded video or images in, what the model says about them out.

The same session as live video has, watched faster than real time (recorded.py); the stock `openai` client
works. Responses are lines of one message; chunks carry the `video_time` they belong to.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from actors.image import check_image
from actors.tasks import end_all
from serve.access import Client, TheGateway
from serve.chat_answer import Answer, ChatCompletion
from serve.chat_request import Asked, ChatRequest, Url, understood
from serve.client_events import MOST_PROBLEMS, ClientError
from serve.errors import ApiError, described
from serve.fetch import data_url, download
from serve.gateway import Gateway
from serve.health import check_model
from serve.recorded import Pictures, Recording, check_video, pictures_of_images, pictures_of_video, watch
from serve.server_events import ErrorEvent, ServerEvent
from serve.sse import EventStream, as_data
from serve.url_guard import UrlGuard
from serve.videos import opened, shown_name, slot, stored

router = APIRouter(tags=["recorded video"])

MULTIPART = "multipart/form-data"
DONE = as_data("[DONE]")
STATUS = {"sessions_full": 429, "no_capacity": 503, "idle_timeout": 503, "total_time": 503, "internal": 500}
REQUEST = {"$ref": "#/components/schemas/ChatRequest"}
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": REQUEST,
                "example": {
                    "model": "videollm-online",
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
                                {"type": "text", "text": "What happened?"},
                            ],
                        }
                    ],
                },
            },
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": ["request", "video"],
                    "properties": {
                        "request": {"type": "string", "contentMediaType": "application/json", "contentSchema": REQUEST},
                        "video": {"type": "string", "format": "binary", "description": "what a part without URL shows"},
                    },
                }
            },
        },
    }
}


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={
        200: {"description": "the whole message, or with `stream` its chunks", "content": {"text/event-stream": {}}},
        **described(404, 408, 413, 422, 429, 503),
    },
    openapi_extra=BODY,
)
async def chat_completions(request: Request, gateway: TheGateway, client: Client) -> Response:
    """Watch a video or images and say what the model says. Unknown parameters are refused by name."""
    async with AsyncExitStack() as stack:
        wanted, upload = await _read(request, stack)
        model = check_model(gateway, wanted.model)
        asked = understood(wanted)
        for question in asked.questions:
            gateway.check_question(question.text)
        stack.enter_context(slot(request))
        pictures = await _pictures(request, gateway, asked, upload, stack)
        conversation = await stack.enter_async_context(opened(gateway, client, asked.patch))
        recording = Recording(pictures, asked.questions)
        events = watch(recording, conversation, gateway)
        answer = Answer(conversation.id, model.id, int(time.time()), wanted.video.spontaneous)
        if wanted.stream:
            usage = bool(wanted.stream_options and wanted.stream_options.include_usage)
            return EventStream(_chunks(answer, events, asked, usage), stack.pop_all(), gateway.limits.send_s)
        gone = asyncio.create_task(_gone(request))
        whole = asyncio.create_task(_whole(answer, events, asked))
        try:
            await asyncio.wait({gone, whole}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse((await whole).model_dump()) if whole.done() else Response(status_code=499)
        finally:
            await end_all((gone, whole))


async def _whole(answer: Answer, events: AsyncGenerator[ServerEvent], asked: Asked) -> ChatCompletion:
    """Everything in one message. Raises ApiError where the session could not be watched to its end."""
    async with aclosing(events):
        async for event in events:
            if problem := _problem(event, asked):
                raise problem
            answer.take(event)
    return answer.completion()


async def _chunks(
    answer: Answer, events: AsyncGenerator[ServerEvent], asked: Asked, usage: bool
) -> AsyncGenerator[str]:
    """The message in chunks as it is spoken; an error is the last event."""
    async with aclosing(events):
        yield as_data(answer.opening().json_text())
        async for event in events:
            if problem := _problem(event, asked):
                yield as_data(problem.body.model_dump_json())
                return
            for chunk in answer.take(event):
                yield as_data(chunk.json_text())
        yield as_data(answer.closing().json_text())
        if usage:
            yield as_data(answer.usage_chunk().json_text())
        yield DONE


def _problem(event: ServerEvent, asked: Asked) -> ApiError | None:
    """What ends the request, if the event does."""
    if not isinstance(event, ErrorEvent):
        return None
    error = event.error
    if error.code == "frame_skipped":
        return ApiError(422, "bad_image", error.message, "messages") if asked.images else None
    if error.type == "invalid_request_error" or error.code == "bad_video":
        return ApiError(422, error.code, error.message, error.param)
    return ApiError(STATUS.get(error.code, 503), error.code, error.message)


async def _gone(request: Request) -> None:
    """Return once the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read(request: Request, stack: AsyncExitStack) -> tuple[ChatRequest, UploadFile | None]:
    """The request, and the file that came with it. Raises RequestValidationError and ClientError."""
    if not request.headers.get("content-type", "").startswith(MULTIPART):
        return _validated(await request.body(), "body"), None
    form: FormData = await stack.enter_async_context(request.form(max_files=1, max_fields=1))
    text, video = form.get("request"), form.get("video")
    if not isinstance(text, str) or not isinstance(video, UploadFile) or len(form) > 2:
        raise ClientError("bad_value", "a form has the fields `request` (JSON) and `video` (a file)", "request")
    return _validated(text.encode(errors="surrogatepass"), "request"), video


def _validated(data: bytes, where: str) -> ChatRequest:
    try:
        return ChatRequest.model_validate_json(data)
    except ValidationError as error:
        if error.error_count() > MOST_PROBLEMS:
            text = (
                f"{error.error_count()} fields or items of this request are wrong: /openapi.json tells what it may have"
            )
            raise ClientError("bad_value", text, where) from None
        problems = error.errors(include_url=False)
        raise RequestValidationError([{**problem, "loc": (where, *problem["loc"])} for problem in problems]) from None


async def _pictures(
    request: Request, gateway: Gateway, asked: Asked, upload: UploadFile | None, stack: AsyncExitStack
) -> Callable[[], Pictures]:
    """What the request shows, fetched and checked. Raises ClientError and ApiError."""
    guard = request.app.state.guard
    assert isinstance(guard, UrlGuard)
    fps = asked.patch.video.fps if asked.patch.video and asked.patch.video.fps else 2.0
    if asked.video is None:
        images = [await _image(url, number, guard, gateway) for number, url in enumerate(asked.images)]
        return pictures_of_images(images, fps)
    if asked.video.video_url is None:
        if upload is None:
            text = "a video part without video_url shows the file of the form, and there is none"
            raise ClientError("bad_value", text, "video")
        path, name = await stack.enter_async_context(stored(upload)), shown_name(upload)
    else:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="videollm-")))
        path, name = folder / "video", "video_url"
        await asyncio.to_thread(_fetch, asked.video.video_url.url, path, "video_url", ("video/",), guard, gateway)
    await check_video(path, name, gateway.limits)
    return pictures_of_video(path, fps, request.app.state.frames)


async def _image(url: Url, number: int, guard: UrlGuard, gateway: Gateway) -> bytes:
    with tempfile.TemporaryDirectory(prefix="videollm-") as folder:
        path = Path(folder) / "image"
        await asyncio.to_thread(_fetch, url.url, path, "image_url", ("image/",), guard, gateway)
        size, most = path.stat().st_size, gateway.bus.config.max_frame_bytes
        if size > most:
            raise ClientError("too_big", f"image {number} has {size} bytes, at most {most} are taken", "image_url")
        data = await asyncio.to_thread(path.read_bytes)
    try:
        await asyncio.to_thread(check_image, data, gateway.limits.frame_pixels)
    except ValueError as error:
        raise ClientError("bad_image", f"image {number}: {error}", "image_url") from None
    return data


def _fetch(url: str, path: Path, param: str, kinds: tuple[str, ...], guard: UrlGuard, gateway: Gateway) -> None:
    if url[:5].lower() == "data:":
        path.write_bytes(data_url(url, param, kinds, gateway.limits.body_bytes))
    else:
        download(guard, url, path, param)

"""Recorded video through the engine that serves live: pictures offered as fast as encoders and LLM take them.

`/v1/videos` tells the session's events as they are (videos.py), `/v1/chat/completions` as chunks of a
chat (chat.py); both are made here. Frames wait for credits, so a long video never piles up in Redis.
The reader runs in a thread of its own, one picture ahead at most.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actors.bus import BusError
from actors.config import FrameConfig
from actors.tasks import end_all
from actors.video import VideoError, encode_jpeg, probe, read_frames
from serve.admission import NoCapacity, owned
from serve.client_events import ClientError
from serve.conversation import Conversation
from serve.errors import ApiError
from serve.gateway import Gateway
from serve.limits import LimitsConfig
from serve.server_events import ServerEvent, failure

log = logging.getLogger(__name__)

JPEG_QUALITY = 95
ASK_AGAIN_S = 0.2

Pictures = Iterator[tuple[float, bytes]]
Moment = float | Literal["before", "after"]


@dataclass(frozen=True)
class Question:
    """Asked at `time` seconds of the video, or outside of it: before the first frame, or once the last one is there."""

    text: str
    time: Moment


@dataclass(frozen=True)
class Recording:
    """What is watched: video times with encoded pictures, begun anew at every call, and the questions about it."""

    pictures: Callable[[], Pictures]
    questions: tuple[Question, ...]


def pictures_of_video(path: Path, fps: float, frames: FrameConfig) -> Callable[[], Pictures]:
    """Every frame of a file on the clock of `fps`, square as the model sees it.

    A stranger's file is for PyAV: decord carries decoders that are years old.
    """

    def pictures() -> Pictures:
        for _, video_time, frame in read_frames(path, fps, frames.resolution_px, frames.fit, backend="pyav"):
            yield video_time, encode_jpeg(frame, JPEG_QUALITY)

    return pictures


def pictures_of_images(images: Sequence[bytes], fps: float) -> Callable[[], Pictures]:
    """Images as if they were frames of a video."""
    return lambda: iter([(index / fps, image) for index, image in enumerate(images)])


async def check_video(path: Path, name: str, limits: LimitsConfig) -> None:
    """Raises ApiError (422), naming the client's `name`, for a file that is no video, too large a picture, too long."""
    try:
        video = await asyncio.to_thread(probe, path, limits.video_pixels)
        if video.duration > limits.video_s:
            raise VideoError(
                f"{path} lasts {video.duration:.0f} s by its times, at most {limits.video_s:.0f} are taken"
            )
    except VideoError as error:
        raise ApiError(422, "bad_video", str(error).replace(str(path), name), "video") from None


async def watch(recording: Recording, conversation: Conversation, gateway: Gateway) -> AsyncGenerator[ServerEvent]:
    """The session's events while the video is read, encoded and decided; `conversation` is already open.

    What goes wrong is the last event, an `error`, and counted.
    """
    try:
        async with asyncio.timeout(gateway.limits.total_s):
            async for event in _watch(recording, conversation, gateway):
                yield event
        return
    except TimeoutError:
        problem = failure("total_time", f"the video was watched for {gateway.limits.total_s:g} s, the longest allowed")
    except NoCapacity as error:
        problem = failure("no_capacity", str(error))
    except VideoError as error:
        problem = failure("bad_video", str(error))
    except ClientError as error:
        problem = failure(error.code, str(error))
    except BusError as error:
        log.error("session=%s watching failed: %s", conversation.id, error)
        problem = failure(error.code, str(error))
    gateway.meters.error(problem.error.code)
    yield problem


async def _watch(recording: Recording, conversation: Conversation, gateway: Gateway) -> AsyncGenerator[ServerEvent]:
    waits = False  # for a replica, which is bounded

    def note_waiting(now: bool) -> None:
        nonlocal waits
        waits = now

    tasks = [
        asyncio.create_task(_supply(recording, conversation)),
        asyncio.create_task(conversation.feed()),
        asyncio.create_task(owned(conversation, gateway, note_waiting)),
    ]
    events = conversation.events()
    following = asyncio.ensure_future(anext(events))
    idle_s = gateway.limits.idle_s
    try:
        waiting, settled = {*tasks, following}, 0
        while True:
            done, waiting = await asyncio.wait(waiting, timeout=idle_s, return_when=asyncio.FIRST_COMPLETED)
            # Frames about which nothing is told are decided all the same.
            before, settled = settled, conversation.counts.decided + conversation.counts.skipped
            if not done and not waits and settled == before:
                yield failure("idle_timeout", f"nothing happened for {idle_s:g} s")
                return
            for task in done - {following}:
                task.result()
            if following in done:
                yield following.result()
                following = asyncio.ensure_future(anext(events))
                waiting.add(following)
    except StopAsyncIteration:
        pass
    finally:
        await end_all((*tasks, following))


async def _supply(recording: Recording, conversation: Conversation) -> None:
    """Offer every picture in order and ask every question, then say that there are no more."""
    questions = sorted(recording.questions, key=_place)
    pictures = recording.pictures()
    loop = asyncio.get_running_loop()
    thread = ThreadPoolExecutor(1, thread_name_prefix="decode")
    try:
        upcoming = await loop.run_in_executor(thread, next, pictures, None)
        while (picture := upcoming) is not None:
            upcoming = await loop.run_in_executor(thread, next, pictures, None)
            due = [one for one in questions if upcoming is None or _place(one) <= picture[0]]
            del questions[: len(due)]
            # Before their frame is admitted: its decision must not come first. Others than may wait come after it.
            for question in due[: conversation.most_inputs]:
                await _ask(question, conversation, picture[0])
            await conversation.room()
            conversation.offer(*picture)
            for question in due[conversation.most_inputs :]:
                await _ask(question, conversation, picture[0])
    finally:
        if isinstance(pictures, Generator):
            thread.submit(pictures.close)  # in its thread: a generator cannot be closed while it runs
        thread.shutdown(wait=False)
    conversation.finish()


def _place(question: Question) -> float:
    """When a question is asked, in seconds of the video."""
    return {"before": -math.inf, "after": math.inf}[question.time] if isinstance(question.time, str) else question.time


async def _ask(question: Question, conversation: Conversation, reached: float) -> None:
    """Ask once fewer questions wait than may, at the latest of the last frame `reached`."""
    moment = None if question.time == "before" else min(_place(question), reached)
    while True:
        try:
            await conversation.ask(question.text, moment)
            return
        except ClientError as error:
            if error.code != "too_many_inputs":
                raise
        await asyncio.sleep(ASK_AGAIN_S)

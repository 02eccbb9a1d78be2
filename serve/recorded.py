"""A posted video file: decoded at the session's rate, watched as fast as the encoders and the LLM go.

Frames wait for credits, so a long video never piles up in Redis. The reader runs in a thread of its
own, one frame ahead at most.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from actors.bus import BusError
from actors.video import VideoError, VideoFrame, encode_jpeg, read_frames
from serve.conversation import Conversation, NoCapacity
from serve.gateway import ServeConfig
from serve.server_events import ServerEvent, failure

log = logging.getLogger(__name__)

JPEG_QUALITY = 95


@dataclass(frozen=True)
class Recording:
    """A video file, how it is sampled, and the questions with their times."""

    path: Path
    fps: float
    resolution_px: int
    questions: tuple[tuple[float, str], ...]


async def watch(
    recording: Recording, conversation: Conversation, config: ServeConfig, idle_s: float
) -> AsyncGenerator[ServerEvent]:
    """The session's events while the video is read, encoded and decided; `conversation` is already open."""
    for video_time, text in recording.questions:
        await conversation.ask(text, video_time)
    tasks = [
        asyncio.create_task(_supply(recording, conversation)),
        asyncio.create_task(conversation.feed()),
        asyncio.create_task(conversation.owned(config.admission_timeout_s)),
    ]
    events = conversation.events()
    following = asyncio.ensure_future(anext(events))
    try:
        waiting = {*tasks, following}
        while True:
            done, waiting = await asyncio.wait(waiting, timeout=idle_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
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
    except NoCapacity as error:
        yield failure("no_capacity", str(error))
    except VideoError as error:
        yield failure("bad_video", str(error))
    except BusError as error:
        log.error("session=%s watching failed: %s", conversation.id, error)
        yield failure(error.code, str(error))
    finally:
        for task in (*tasks, following):
            task.cancel()
        await asyncio.gather(*tasks, following, return_exceptions=True)


def as_sse(event: ServerEvent) -> str:
    """One event in the format of server-sent events, its log position as id."""
    lines = [f"event: {event.type}", f"data: {event.json_text()}"]
    if event.position is not None:
        lines.insert(0, f"id: {event.position}")
    return "\n".join(lines) + "\n\n"


async def _supply(recording: Recording, conversation: Conversation) -> None:
    """Offer every frame of the video in order, then say that there are no more."""
    frames = read_frames(recording.path, recording.fps, recording.resolution_px)
    loop = asyncio.get_running_loop()
    thread = ThreadPoolExecutor(1, thread_name_prefix="decode")
    try:
        while (frame := await loop.run_in_executor(thread, _next_jpeg, frames)) is not None:
            await conversation.room()
            conversation.offer(*frame)
    finally:
        if isinstance(frames, Generator):
            thread.submit(frames.close)  # in its thread: a generator cannot be closed while it runs
        thread.shutdown(wait=False)
    conversation.finish()


def _next_jpeg(frames: Iterator[VideoFrame]) -> tuple[float, bytes] | None:
    for _, video_time, frame in frames:
        return video_time, encode_jpeg(frame, JPEG_QUALITY)
    return None

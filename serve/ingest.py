"""A source that the server reads itself: a file at its own pace, an HTTP resource, or a camera by RTSP.

Opened again, with growing pauses, when it breaks off; what has been seen is not shown twice. FFmpeg gets
bytes, not addresses, but for RTSP, where it gets the judged address of an allow-listed server.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Literal

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream

from actors.config import FrameConfig
from actors.video import encode_jpeg, fit_square
from actors.video_file import FORMATS, MAX_PIXELS
from serve.client_events import ClientError
from serve.fetch import HttpFile
from serve.recorded import JPEG_QUALITY
from serve.url_guard import Target, UrlGuard

log = logging.getLogger(__name__)

LIVE_FORMATS = f"{FORMATS},mjpeg,mpjpeg,rtsp,sdp,rtp"
MOTION_JPEG = ("mjpeg", "mpjpeg")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 15.0
JUMP_S = 1.0  # by which times may go back, as those of pictures that are not shown in the order they come in
HTTP_BUFFER = 1 << 16

Kind = Literal["file", "http", "rtsp"]


class SourceError(Exception):
    """The source cannot be read (any more); says why."""


@dataclass
class Source:
    """What was asked for, as it was judged; `shown` is for people and carries no password."""

    kind: Kind
    shown: str
    guard: UrlGuard
    path: Path | None = None
    url: str = ""
    http: HttpFile | None = None

    @property
    def broken(self) -> str | None:
        """What went wrong with an HTTP connection that FFmpeg may not have told."""
        return self.http.broken if self.http else None

    def close(self) -> None:
        """End the HTTP connection, if there is one."""
        if self.http is not None:
            self.http.close()

    @classmethod
    def of(cls, text: str, guard: UrlGuard) -> Source:
        """A path or file:// URL in a listed folder, or a URL of a listed host. Raises ClientError."""
        if text.startswith(("http://", "https://")):
            return cls("http", guard.check(text, "source", ("http", "https")).shown, guard, url=text)
        if text.startswith(("rtsp://", "rtsps://")):
            return cls("rtsp", guard.check(text, "source", ("rtsp", "rtsps")).shown, guard, url=text)
        path = guard.file(text.removeprefix("file://"), "source")
        return cls("file", path.name, guard, path=path)

    def open(self) -> tuple[InputContainer, bool]:
        """The container, and whether the source has an end of its own. Raises ClientError, FFmpegError and OSError."""
        options = {"format_whitelist": LIVE_FORMATS, "protocol_whitelist": ""}
        if self.path is not None:
            return av.open(f"file:{self.path}", options={**options, "protocol_whitelist": "file"}), True
        if self.kind == "http":
            file = self.http = HttpFile(self.guard, self.url, "source")
            reader = file if file.seekable() else _Forward(file)
            return av.open(reader, "r", options=options, buffer_size=HTTP_BUFFER), file.length is not None
        target = self.guard.check(self.url, "source", ("rtsp", "rtsps"))
        options = {
            "format_whitelist": LIVE_FORMATS,
            "protocol_whitelist": "rtsp,rtp,tcp,tls,udp",
            "rtsp_transport": "tcp",
        }
        limit = self.guard.config.connect_s
        return av.open(_at_address(target, self.guard.addresses(target)[0]), options=options, timeout=limit), False


@dataclass
class Ingest:
    """Pictures of a source at `fps`, over all its interruptions; `stopped` ends it soon. Iterated in a thread."""

    source: Source
    fps: float
    frames: FrameConfig
    live: bool
    reconnected: Callable[[], None]
    stopped: Event = field(default_factory=Event)
    started: float = field(default_factory=time.monotonic)
    last: float = -1.0
    due: float = 0.0  # when the next picture is wanted, so that their number follows `fps` whatever the source's rate

    def pictures(self) -> Iterator[tuple[float, bytes]]:
        """Video times with JPEGs. A source with an end comes at its own pace if `live`. Raises SourceError."""
        failures = 0
        while not self.stopped.is_set():
            before = self.last
            problem, over = "it ended", False
            try:
                with contextlib.closing(self.source):  # closing a container leaves a file of ours open
                    container, finite = self.source.open()
                    with container:
                        yield from self._frames(container, finite)
                over, problem = finite and not self.source.broken, self.source.broken or problem
            except (FFmpegError, OSError, ClientError) as error:
                problem = self.source.broken or getattr(error, "strerror", None) or str(error)
                if isinstance(error, av.error.InvalidDataError) and self.last < 0 and not self.source.broken:
                    raise SourceError(f"{self.source.shown} holds no video that can be decoded") from None
            if over or self.stopped.is_set():
                if self.last < 0 and not self.stopped.is_set():
                    raise SourceError(f"{self.source.shown} holds no video that can be decoded")
                return
            failures = 1 if self.last > before else failures + 1
            if self.last < 0 and self.source.kind == "file":
                raise SourceError(f"{self.source.shown} cannot be read: {problem}")
            if failures > self.source.guard.config.reconnects:
                raise SourceError(f"{self.source.shown} failed {failures} times in a row, the last time: {problem}")
            log.warning("source=%s interrupted, failures=%d: %s", self.source.shown, failures, problem)
            self.reconnected()
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
            self.stopped.wait(pause_s)

    def _frames(self, container: InputContainer, finite: bool) -> Iterator[tuple[float, bytes]]:
        """Of one connection. What has an end counts its own time, the rest the time since the beginning."""
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream) or stream.codec_context is None:
            raise SourceError(f"{self.source.shown} holds no video stream that can be decoded")
        stream.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        base = 0.0 if finite else time.monotonic() - self.started
        if self.last < 0:
            base, self.started = 0.0, time.monotonic()
        # A camera that sends one JPEG after another says no times: FFmpeg makes up those of 25 a second.
        timeless = not finite and container.format.name in MOTION_JPEG
        step = 1 / float(stream.guessed_rate or 25)
        origin: float | None = None
        newest = 0.0
        at = -step
        for frame in _decoded(container, stream.index):
            if self.stopped.is_set():
                return
            next_at = at + step if frame.time is None else frame.time  # some formats leave out the times of some
            at = time.monotonic() if timeless else next_at
            origin, newest = (at, at) if origin is None else (origin, newest)
            if at < newest - JUMP_S:  # an encoder that began anew: its times do, too
                log.warning("source=%s times jumped back by %.1f s", self.source.shown, newest - at)
                base = self.last + 1 / self.fps if finite else time.monotonic() - self.started
                origin = newest = at
            newest = max(newest, at)
            video_time = max(0.0, at - origin) + base
            if video_time <= self.last or video_time < self.due - 1e-3:
                continue
            self.due = (math.floor(video_time * self.fps + 0.05) + 1) / self.fps
            if finite and self.live:
                self.stopped.wait(max(0.0, self.started + video_time - time.monotonic()))
            self.last = video_time
            image = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
            yield video_time, encode_jpeg(fit_square(image, self.frames.resolution_px, self.frames.fit), JPEG_QUALITY)


class _Forward:
    """A file that can only be read on: with a `seek`, PyAV would rely on it."""

    def __init__(self, file: io.RawIOBase) -> None:
        self.read = file.read
        self.close = file.close


def _decoded(container: InputContainer, index: int) -> Iterator[av.VideoFrame]:
    """Frames in order; damaged packets are left out. Raises FFmpegError where reading fails."""
    for packet in container.demux(container.streams[index]):
        frames: list[av.VideoFrame] = []
        with contextlib.suppress(av.error.InvalidDataError):
            frames = [frame for frame in packet.decode() if isinstance(frame, av.VideoFrame)]
        yield from frames


def _at_address(target: Target, address: str) -> str:
    """The URL with the address in its name's place."""
    host = f"[{address}]" if ":" in address else address
    user = f"{target.url.netloc.rpartition('@')[0]}@" if "@" in target.url.netloc else ""
    return f"{target.url.scheme}://{user}{host}:{target.port}{target.path}"

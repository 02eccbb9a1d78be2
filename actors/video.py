"""Recorded video -> frames at a rate and a size, on an exact clock.

Tick i is i / fps seconds after the video's first frame, and shows the first frame whose timestamp is
not before the tick. Both are compared as integers in the stream's time base, so that neither 29.97
frames a second nor a film of three hours drifts. One frame is held at a time.

decord decodes short clips where it is installed; PyAV decodes everything else and takes over where
decord fails. Both yield the same pixels, which decord 0.6 does only in some formats, and it decodes
far ahead of a slow reader, so that it is kept to what fits in memory. Clients and `encode_frames` read here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, dropwhile
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image

log = logging.getLogger(__name__)

# Self-contained files only: a playlist would make FFmpeg open whatever a stranger's upload names.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,ogg,asf,rm,mxf,nut,ivf,gif,"
    "h264,hevc,m4v,obu,jpeg_pipe,png_pipe,webp_pipe,bmp_pipe"
)

# Containers with an index of key frames; seeking in others can land in the middle of one.
INDEXED_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi"}
# decord finds frames exactly only where these two hold, and may hold all of them at once.
DECORD_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
DECORD_CODECS = {"h264", "hevc", "vp8", "vp9"}
DECORD_MAX_BYTES = 512 << 20

Backend = Literal["decord", "pyav"]


class VideoError(ValueError):
    """A file that yields no frames; the message says what was found and what was expected."""


class VideoInfo(NamedTuple):
    """What a file holds: `duration` in seconds, `fps` its mean rate, size in pixels as displayed."""

    duration: float
    fps: float
    width: int
    height: int
    frames: int


class VideoFrame(NamedTuple):
    """Number `tick` on the grid of the chosen rate, at `time` seconds; `image` (R, R, 3) uint8 RGB."""

    tick: int
    time: float
    image: np.ndarray


def probe(path: str | Path) -> VideoInfo:
    """Size, rate and length of a video, from its packets and its first frame. Raises VideoError."""
    video = _inspect(Path(path))
    duration = float(video.length * video.time_base)
    fps = video.frames / duration if duration > 0 else 0.0
    return VideoInfo(duration, fps, video.width, video.height, video.frames)


def read_frames(
    path: str | Path,
    fps: float,
    resolution_px: int,
    start: float = 0,
    stop: float | None = None,
    backend: Backend | None = None,
) -> Iterator[VideoFrame]:
    """The ticks with start <= time < stop, each frame padded to a square of `resolution_px`.

    Ticks count from the beginning of the video whatever `start` is. Raises VideoError at the first
    step when there is nothing to read; damage further on ends the frames early, with a warning.
    `backend` insists on one decoder.
    """
    if not (math.isfinite(fps) and fps > 0 and resolution_px > 0):
        raise ValueError(f"fps is {fps} and resolution_px {resolution_px}, expected both above 0")
    video = _inspect(Path(path))
    clock = _Clock(video, fps)
    first = max(0, math.floor(Fraction(start) * clock.fps))
    while clock.time(first) < start:
        first += 1
    for tick, image in _read(video, clock, first, backend):
        time = clock.time(tick)
        if stop is not None and time >= stop:
            return
        yield VideoFrame(tick, time, fit_square(image, resolution_px))


def fit_square(image: np.ndarray, resolution_px: int) -> np.ndarray:
    """`image` (H, W, 3) with its larger side scaled to `resolution_px`, centred on black: (R, R, 3)."""
    height, width = image.shape[:2]
    scale = resolution_px / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    scaled = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    square = Image.new("RGB", (resolution_px, resolution_px))
    square.paste(scaled, ((resolution_px - size[0]) // 2, (resolution_px - size[1]) // 2))
    return np.array(square)


def encode_jpeg(image: np.ndarray, quality: int = 90) -> bytes:
    """`image` (H, W, 3) uint8 RGB as a JPEG file, the form in which clients send frames."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@dataclass(frozen=True)
class _Video:
    """A file whose first frame could be decoded.

    `timeline` holds the timestamps of all frames in display order, None where packets carry none;
    `origin` is that of the first decoded frame. They and `length` are in units of `time_base` seconds.
    """

    path: Path
    format: str
    codec: str
    time_base: Fraction
    origin: int
    length: int
    frames: int
    timeline: np.ndarray | None
    width: int
    height: int
    quarter_turns: int

    def why_not_decord(self) -> str | None:
        """What keeps decord from this file, if anything does."""
        if self.format not in DECORD_FORMATS or self.codec not in DECORD_CODECS:
            return f"{self.codec} in {self.format} is not exact with it"
        if self.timeline is None or self.quarter_turns:
            return "it needs timestamps and upright frames"
        if self.frames * self.width * self.height * 3 > DECORD_MAX_BYTES:
            return f"it may keep all {self.frames} frames of {self.width}x{self.height} in memory"
        return None


class _Clock:
    """The tick grid, in the stream's own time base."""

    def __init__(self, video: _Video, fps: float) -> None:
        self.fps = Fraction(fps).limit_denominator(10_000)
        self.origin = video.origin
        self.units = 1 / (self.fps * video.time_base)

    def time(self, tick: int) -> float:
        """Seconds, the nearest to the exact fraction."""
        return float(tick / self.fps)

    def due(self, tick: int) -> int:
        """The smallest timestamp that is not before tick `tick`."""
        return self.origin + math.ceil(tick * self.units)


class _DecordStopped(Exception):
    """decord cannot open this file, or cannot go on."""


def _open(path: Path) -> InputContainer:
    if not path.exists():
        raise VideoError(f"{path}: no such file")
    if not path.is_file():
        raise VideoError(f"{path}: not a file, expected one video file")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: empty (0 bytes), expected a video file")
    try:
        return av.open(f"file:{path}", options={"format_whitelist": FORMATS}, metadata_errors="ignore")
    except (FFmpegError, OSError) as error:
        raise VideoError(
            f"{path}: not a readable video ({error.strerror}), expected a complete MP4, Matroska, WebM or AVI file"
        ) from None


def _video_stream(path: Path, container: InputContainer) -> tuple[VideoStream, Fraction]:
    """The stream and its time base, in seconds."""
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        found = ", ".join(sorted({other.type for other in container.streams})) or "nothing"
        raise VideoError(f"{path}: holds no video stream (found: {found})")
    if stream.time_base is None:
        raise VideoError(f"{path}: its video stream has no time base, expected timed frames")
    stream.thread_count = 1  # readers share a machine: each keeps to one core
    return stream, stream.time_base


def _inspect(path: Path) -> _Video:
    """Read all packets without decoding them, and the first frame."""
    with _open(path) as container:
        stream, time_base = _video_stream(path, container)
        declared = float((stream.duration or 0) * time_base)
        stamps: list[int] = []
        frames = end = 0
        with contextlib.suppress(FFmpegError):  # what comes before the damage still counts
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    frames += 1
                    if packet.pts is not None:
                        stamps.append(packet.pts)
                        end = max(end, packet.pts + (packet.duration or 0))
    frame, origin = next(_decode(path), (None, 0))
    if frame is None:
        raise VideoError(f"{path}: none of its {frames} video packets can be decoded")
    length = max(0, end - origin)
    if declared - length * time_base > 1:
        log.warning(
            "video=%s truncated frames=%d duration=%.1f declared=%.1f", path, frames, length * time_base, declared
        )
    turned = frame.rotation % 180 != 0
    return _Video(
        path=path,
        format=container.format.name,
        codec=stream.codec_context.name,
        time_base=time_base,
        origin=origin,
        length=length,
        frames=frames,
        timeline=np.sort(np.asarray(stamps, np.int64)) if len(stamps) == frames else None,
        width=frame.height if turned else frame.width,
        height=frame.width if turned else frame.height,
        quarter_turns=round(frame.rotation / 90),
    )


def _read(video: _Video, clock: _Clock, tick: int, backend: Backend | None) -> Iterator[tuple[int, np.ndarray]]:
    """(tick, image (H, W, 3)) from tick `tick` on: from decord as far as it gets, then from PyAV."""
    if backend == "decord" or (backend is None and importlib.util.find_spec("decord") is not None):
        try:
            for shown, image in _read_decord(video, clock, tick):
                yield shown, image
                tick = shown + 1
            return
        except _DecordStopped as stopped:
            if backend == "decord":
                raise VideoError(f"{video.path}: decord cannot read it: {stopped}") from None
            log.info("video=%s tick=%d PyAV takes over: %s", video.path, tick, stopped)
    yield from _read_pyav(video, clock, tick)


def _read_decord(video: _Video, clock: _Clock, tick: int) -> Iterator[tuple[int, np.ndarray]]:
    import decord
    from decord._ffi.base import DECORDLimitReachedError

    if (obstacle := video.why_not_decord()) or video.timeline is None:
        raise _DecordStopped(obstacle or "no timestamps")
    try:
        reader = decord.VideoReader(str(video.path), num_threads=1)
        if len(reader) != video.frames:
            raise _DecordStopped(f"it counts {len(reader)} frames, the file has {video.frames}")
        last = -1
        while (position := int(np.searchsorted(video.timeline, clock.due(tick)))) < video.frames:
            if position != last:
                image, last = reader[position].asnumpy(), position
            yield tick, image
            tick += 1
    except (decord.DECORDError, DECORDLimitReachedError) as error:
        raise _DecordStopped(str(error).strip().splitlines()[-1]) from None


def _read_pyav(video: _Video, clock: _Clock, tick: int) -> Iterator[tuple[int, np.ndarray]]:
    seekable = tick > 0 and video.timeline is not None and video.format in INDEXED_FORMATS
    for frame, stamp in _decode_from(video.path, clock.due(tick)) if seekable else _decode(video.path):
        if stamp < clock.due(tick):
            continue
        image = np.rot90(frame.to_ndarray(format="rgb24"), video.quarter_turns)
        while stamp >= clock.due(tick):
            yield tick, image
            tick += 1


def _decode_from(path: Path, stamp: int) -> Iterator[tuple[av.VideoFrame, int]]:
    """From a key frame that is not after `stamp`; from the beginning where seeking does not find one."""
    frames = dropwhile(lambda decoded: not decoded[0].key_frame, _decode(path, stamp))
    first = next(frames, None)
    if first is None or first[1] > stamp:
        return _decode(path)
    return chain([first], frames)


def _decode(path: Path, seek: int | None = None) -> Iterator[tuple[av.VideoFrame, int]]:
    """Frames with their timestamps, from about `seek` on; damaged packets are left out."""
    with _open(path) as container:
        stream, time_base = _video_stream(path, container)
        if seek is not None:
            with contextlib.suppress(FFmpegError):  # no index to seek in: read from the beginning
                container.seek(seek, stream=stream)
        step = round(1 / ((stream.guessed_rate or 25) * time_base))
        packets = container.demux(stream)
        frames, damaged, stamp = 0, 0, -step
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                decoded = packet.decode()
            except FFmpegError:
                damaged += 1
                continue
            for frame in decoded:
                stamp = frame.pts if frame.pts is not None else stamp + step
                frames += 1
                yield frame, stamp
        if damaged:
            log.warning("video=%s damaged_packets=%d frames_read=%d", path, damaged, frames)

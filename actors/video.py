"""Recorded video -> frames at a rate and a size, on an exact clock.

Tick i is i / fps seconds after the video's first frame, and shows the first frame whose timestamp is
not before the tick. Both are compared as integers in the stream's time base, so that neither 29.97
frames a second nor a film of three hours drifts. One frame is held at a time.

decord decodes short clips where it is installed; PyAV decodes everything else and takes over where
decord fails. Both yield the same pixels, which decord 0.6 does only in some formats, and it decodes
far ahead of a slow reader, so that it is kept to what fits in memory. Clients and `encode_frames` read here.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from actors.config import Fit
from actors.video_file import FORMATS, MAX_PIXELS, VideoError, VideoFile, decode, decode_from, inspect

__all__ = ["FORMATS", "VideoError", "VideoFrame", "VideoInfo", "encode_jpeg", "fit_square", "probe", "read_frames"]

log = logging.getLogger(__name__)

# decord finds frames exactly only where these two hold, and may hold all of them at once.
DECORD_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
DECORD_CODECS = {"h264", "hevc", "vp8", "vp9"}
DECORD_MAX_BYTES = 512 << 20
DECORD_MIN_WIDTH = 64  # the rows of narrower pictures come with their padding

Backend = Literal["decord", "pyav"]


class VideoInfo(NamedTuple):
    """What a file holds: `duration` in seconds, `fps` its mean rate, size in pixels as displayed.

    `last` is the time of the last picture in seconds.
    """

    duration: float
    fps: float
    width: int
    height: int
    frames: int
    last: float


class VideoFrame(NamedTuple):
    """Number `tick` on the grid of the chosen rate, at `time` seconds; `image` (R, R, 3) uint8 RGB."""

    tick: int
    time: float
    image: np.ndarray


def probe(path: str | Path, max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """Size, rate and length of a video, from its packets and its first frame. Raises VideoError."""
    video = inspect(Path(path), max_pixels)
    duration = float(video.length * video.time_base)
    fps = video.frames / duration if duration > 0 else 0.0
    last = float(video.last * video.time_base)
    return VideoInfo(duration, fps, video.width, video.height, video.frames, last)


def read_frames(
    path: str | Path,
    fps: float,
    resolution_px: int,
    fit: Fit,
    start: float = 0,
    stop: float | None = None,
    backend: Backend | None = None,
) -> Iterator[VideoFrame]:
    """The ticks with start <= time < stop, each frame made a square of `resolution_px` by `fit` (`fit_square`).

    Ticks count from the beginning of the video whatever `start` is. Raises VideoError at the first
    step when there is nothing to read; damage further on ends the frames early, with a warning.
    `backend` insists on one decoder.
    """
    if not (math.isfinite(fps) and fps > 0 and resolution_px > 0):
        raise ValueError(f"fps is {fps} and resolution_px {resolution_px}, expected both above 0")
    video = inspect(Path(path))
    clock = _Clock(video, fps)
    first = max(0, math.floor(Fraction(start) * clock.fps))
    while clock.time(first) < start:
        first += 1
    for tick, image in _read(video, clock, first, backend):
        time = clock.time(tick)
        if stop is not None and time >= stop:
            return
        yield VideoFrame(tick, time, fit_square(image, resolution_px, fit))


def fit_square(image: np.ndarray, resolution_px: int, fit: Fit) -> np.ndarray:
    """`image` (H, W, 3) as a square (R, R, 3) of `resolution_px`.

    `pad` scales its larger side and centres it on black; `crop` scales its smaller side and keeps the middle.
    """
    if fit == "crop":
        return np.array(ImageOps.fit(Image.fromarray(image), (resolution_px, resolution_px)))
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


class _Clock:
    """The tick grid, in the stream's own time base."""

    def __init__(self, video: VideoFile, fps: float) -> None:
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


def _read(video: VideoFile, clock: _Clock, tick: int, backend: Backend | None) -> Iterator[tuple[int, np.ndarray]]:
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


def _why_not_decord(video: VideoFile) -> str | None:
    """What keeps decord from this file, if anything does."""
    if video.format not in DECORD_FORMATS or video.codec not in DECORD_CODECS:
        return f"{video.codec} in {video.format} is not exact with it"
    if video.timeline is None or video.quarter_turns:
        return "it needs timestamps and upright frames"
    if video.width < DECORD_MIN_WIDTH:
        return f"it reads no picture of {video.width} pixels a row"
    if video.frames * video.width * video.height * 3 > DECORD_MAX_BYTES:
        return f"it may keep all {video.frames} frames of {video.width}x{video.height} in memory"
    return None


def _read_decord(video: VideoFile, clock: _Clock, tick: int) -> Iterator[tuple[int, np.ndarray]]:
    import decord
    from decord._ffi.base import DECORDLimitReachedError

    if (obstacle := _why_not_decord(video)) or video.timeline is None:
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


def _read_pyav(video: VideoFile, clock: _Clock, tick: int) -> Iterator[tuple[int, np.ndarray]]:
    seeks = tick > 0 and video.seekable
    for frame, stamp in decode_from(video.path, clock.due(tick)) if seeks else decode(video.path):
        if stamp < clock.due(tick):
            continue
        image = np.rot90(frame.to_ndarray(format="rgb24"), video.quarter_turns)
        while stamp >= clock.due(tick):
            yield tick, image
            tick += 1

"""A video file as PyAV sees it: what it is, the timestamps of its frames, and its frames decoded in order.

A file comes from a stranger: only self-contained formats are opened, and damage costs frames, never the
process. `video.py` makes frames at a rate out of this.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, dropwhile
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream

log = logging.getLogger(__name__)

# Self-contained files only: a playlist would make FFmpeg open whatever a stranger's upload names.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,ogg,asf,rm,mxf,nut,ivf,gif,"
    "h264,hevc,m4v,obu,jpeg_pipe,png_pipe,webp_pipe,bmp_pipe"
)

MAX_PIXELS = 8192 * 4320  # of one picture; an uncompressed one of this size takes 106 MB

LONG_PAUSE_S = 60.0
JUMP_BACK_S = 5.0  # farther than any codec keeps pictures back

# Containers with an index of key frames; seeking in others can land in the middle of one.
INDEXED_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi"}


class VideoError(ValueError):
    """A file that yields no frames; the message says what was found and what was expected."""


@dataclass(frozen=True)
class VideoFile:
    """A file whose first frame could be decoded.

    `timeline` holds the timestamps of all frames in display order, None where packets carry none: then they come at
    the stream's own rate. `origin` is that of the first decoded frame, `last` is how long after it the last picture
    comes. They and `length` are in units of `time_base` seconds.
    """

    path: Path
    format: str
    codec: str
    time_base: Fraction
    origin: int
    length: int
    last: int
    frames: int
    timeline: np.ndarray | None
    width: int
    height: int
    quarter_turns: int

    @property
    def seekable(self) -> bool:
        return self.timeline is not None and self.format in INDEXED_FORMATS


def inspect(path: Path, max_pixels: int = MAX_PIXELS) -> VideoFile:
    """Read all packets without decoding them, and the first frame. Its picture has `max_pixels` at most."""
    with _open(path) as container:
        stream, time_base = _video_stream(path, container, max_pixels)
        declared = float((stream.duration or 0) * time_base)
        step = _step(stream, time_base)
        stamps: list[int] = []
        frames = end = last = 0
        with contextlib.suppress(FFmpegError):  # what comes before the damage still counts
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    frames += 1
                    if packet.pts is not None:
                        stamps.append(packet.pts)
                        if not packet.is_corrupt:  # where a file is cut, in the middle of its last packet
                            end = max(end, packet.pts + (packet.duration or 0))
                            last = max(last, packet.pts)
    frame, origin = next(decode(path), (None, 0))
    if frame is None:
        raise VideoError(f"{path}: none of its {frames} video packets can be decoded")
    if not stamps:
        last, end = origin + (frames - 1) * step, origin + frames * step
    length = max(0, end - origin)
    if declared - length * time_base > 1:
        log.warning(
            "video=%s truncated frames=%d duration=%.1f declared=%.1f", path, frames, length * time_base, declared
        )
    timeline = np.sort(np.asarray(stamps, np.int64))
    if len(stamps) > 1:
        _warn_of_jumps(path, np.asarray(stamps, np.int64), timeline, time_base)
    turned = frame.rotation % 180 != 0
    return VideoFile(
        path=path,
        format=container.format.name,
        codec=stream.codec_context.name,
        time_base=time_base,
        origin=origin,
        length=length,
        last=max(0, last - origin),
        frames=frames,
        timeline=timeline if len(stamps) == frames else None,
        width=frame.height if turned else frame.width,
        height=frame.width if turned else frame.height,
        quarter_turns=round(frame.rotation / 90),
    )


def _warn_of_jumps(path: Path, stamps: np.ndarray, timeline: np.ndarray, time_base: Fraction) -> None:
    """Of a recorder that was off for a while, and of recordings put one behind the other.

    `stamps` are as in the file, two at least; `timeline` are the same in display order.
    """
    pause = float(np.diff(timeline).max() * time_base)
    if pause > LONG_PAUSE_S:
        log.warning("video=%s pause_s=%.1f the picture before it is shown for so long", path, pause)
    back = float((np.maximum.accumulate(stamps) - stamps).max() * time_base)
    if back > JUMP_BACK_S:
        log.warning("video=%s clock_back_s=%.1f pictures of times that have been shown are left out", path, back)


def decode_from(path: Path, stamp: int) -> Iterator[tuple[av.VideoFrame, int]]:
    """From a key frame that is not after `stamp`; from the beginning where seeking does not find one."""
    frames = dropwhile(lambda decoded: not decoded[0].key_frame, decode(path, stamp))
    first = next(frames, None)
    if first is None or first[1] > stamp:
        return decode(path)
    return chain([first], frames)


def decode(path: Path, seek: int | None = None) -> Iterator[tuple[av.VideoFrame, int]]:
    """Frames with their timestamps, from about `seek` on; damaged packets are left out."""
    with _open(path) as container:
        stream, time_base = _video_stream(path, container)
        if seek is not None:
            with contextlib.suppress(FFmpegError):  # no index to seek in: read from the beginning
                container.seek(seek, stream=stream)
        step = _step(stream, time_base)
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


def _step(stream: VideoStream, time_base: Fraction) -> int:
    """From one frame to the next where packets carry no times."""
    return round(1 / ((stream.guessed_rate or 25) * time_base))


def _open(path: Path) -> InputContainer:
    if not path.exists():
        raise VideoError(f"{path}: no such file")
    if not path.is_file():
        raise VideoError(f"{path}: not a file, expected one video file")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: empty (0 bytes), expected a video file")
    try:
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        return av.open(f"file:{path}", options=options, metadata_errors="ignore")
    except (FFmpegError, OSError) as error:
        raise VideoError(
            f"{path}: not a readable video ({error.strerror}), expected a complete MP4, Matroska, WebM or AVI file"
        ) from None


def _video_stream(path: Path, container: InputContainer, max_pixels: int = MAX_PIXELS) -> tuple[VideoStream, Fraction]:
    """The stream and its time base, in seconds."""
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        found = ", ".join(sorted({other.type for other in container.streams})) or "nothing"
        raise VideoError(f"{path}: holds no video stream (found: {found})")
    if stream.time_base is None:
        raise VideoError(f"{path}: its video stream has no time base, expected timed frames")
    codec = stream.codec_context
    if codec is None:
        raise VideoError(f"{path}: its video stream is of a codec that cannot be decoded here")
    if codec.width * codec.height > max_pixels:
        raise VideoError(
            f"{path}: pictures of {codec.width}x{codec.height} pixels, at most {max_pixels:,} in all are decoded"
        )
    codec.options = {"max_pixels": str(max_pixels)}  # for pictures that are larger than the header says
    stream.thread_count = 1  # readers share a machine: each keeps to one core
    return stream, stream.time_base

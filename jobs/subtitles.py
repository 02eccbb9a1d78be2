"""What was said, as subtitles: SubRip, WebVTT, or burnt into a copy of the video.

A cue stays until the next one, but not longer than it takes to read it slowly. `jobs.annotations`
reads both text formats back.
"""

from __future__ import annotations

import contextlib
import html
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Stream
from PIL import Image, ImageDraw, ImageFont

from actors.video import FORMATS, VideoError
from jobs.replay import Utterance

SECONDS_PER_CHARACTER = 1 / 12
SHORTEST_S = 2.0
COLUMNS = 42


@dataclass(frozen=True)
class Cue:
    """`text` shown from `start` to `stop`, in seconds of the video."""

    start: float
    stop: float
    text: str


def cues_of(utterances: Sequence[Utterance]) -> list[Cue]:
    """One cue for each time at which something was said."""
    said = [
        (time, " ".join(" ".join(utterance.text for utterance in together).split()))
        for time, together in groupby(sorted(utterances, key=lambda u: u.time), key=lambda u: u.time)
    ]
    stops = [*(time for time, _ in said), float("inf")][1:]
    return [
        Cue(time, min(stop, time + max(SHORTEST_S, len(text) * SECONDS_PER_CHARACTER)), text)
        for (time, text), stop in zip(said, stops, strict=True)
    ]


def srt(cues: Sequence[Cue]) -> str:
    """SubRip."""
    blocks = [
        f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.stop, ',')}\n{_lines(cue.text)}\n"
        for number, cue in enumerate(cues, start=1)
    ]
    return "\n".join(blocks)


def webvtt(cues: Sequence[Cue]) -> str:
    """WebVTT; what would be markup in it is escaped."""
    blocks = [
        f"{_clock(cue.start, '.')} --> {_clock(cue.stop, '.')}\n{html.escape(_lines(cue.text), quote=False)}\n"
        for cue in cues
    ]
    return "\n".join(["WEBVTT\n", *blocks])


def burn(video: Path, target: Path, cues: Sequence[Cue]) -> None:
    """Write `target`, an MP4 of `video` with the cues drawn into its pictures; its sound is copied.

    Damaged pictures are left out. Raises VideoError where there is nothing to decode or its sound cannot be in an MP4.
    """
    part = target.with_name(f".{target.name}.part")
    try:
        with (
            av.open(f"file:{video}", options={"format_whitelist": FORMATS}, metadata_errors="ignore") as source,
            av.open(str(part), "w", format="mp4") as result,
        ):
            _copy(source, result, cues)
        part.replace(target)
    except (FFmpegError, ValueError) as error:
        raise VideoError(f"{video}: subtitles cannot be burnt in: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def _copy(source: InputContainer, result: OutputContainer, cues: Sequence[Cue]) -> None:
    """The sound as it is, the pictures drawn on and encoded again, at their own times."""
    pictures = source.streams.video[0]
    drawn = result.add_stream("libx264", rate=pictures.guessed_rate or 25, options={"crf": "23"})
    drawn.pix_fmt = "yuv420p"
    drawn.codec_context.time_base = pictures.time_base or Fraction(1, 90_000)
    sounds = source.streams.audio[:1]
    copies = [result.add_stream_from_template(sound) for sound in sounds]
    canvas: _Canvas | None = None
    for packet in _whole_packets(source, pictures, *sounds):
        if packet.stream is not pictures:
            if packet.dts is not None:
                packet.stream = copies[0]
                result.mux(packet)
            continue
        for frame in _decoded(packet):
            time = frame.time or 0.0
            image = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
            height, width = (side - side % 2 for side in image.shape[:2])  # what yuv420p can hold
            if canvas is None:
                canvas = _Canvas(cues, origin=time)
                drawn.height, drawn.width = height, width
            shown = av.VideoFrame.from_ndarray(canvas.draw(image[:height, :width], time), format="rgb24")
            shown.pts, shown.time_base = frame.pts, frame.time_base
            result.mux(drawn.encode(shown))
    result.mux(drawn.encode())


def _whole_packets(source: InputContainer, *streams: Stream) -> Iterator[Packet]:
    """The packets of a file up to its end, or to where it breaks off."""
    packets = source.demux(*streams)
    with contextlib.suppress(FFmpegError):
        yield from packets


def _decoded(packet: Packet) -> list[av.VideoFrame]:
    """The pictures of a packet, none of a damaged one."""
    try:
        return [frame for frame in packet.decode() if isinstance(frame, av.VideoFrame)]
    except FFmpegError:
        return []


class _Canvas:
    """Draws the cue of a time at the bottom of a picture."""

    def __init__(self, cues: Sequence[Cue], origin: float) -> None:
        self.cues = cues
        self.origin = origin

    def draw(self, picture: np.ndarray, time: float) -> np.ndarray:
        """`picture` (H, W, 3) of the frame with timestamp `time`."""
        text = next((cue.text for cue in self.cues if cue.start <= time - self.origin < cue.stop), "")
        picture = np.ascontiguousarray(picture)
        if not text:
            return picture
        image = Image.fromarray(picture)
        size = max(12, image.height // 22)
        pen = ImageDraw.Draw(image)
        pen.multiline_text(
            (image.width / 2, image.height - size),
            textwrap.fill(text, max(8, int(image.width / (0.55 * size)))),
            fill="white",
            font=ImageFont.load_default(size),
            anchor="md",
            align="center",
            stroke_width=max(1, size // 10),
            stroke_fill="black",
        )
        return np.asarray(image)


def _clock(seconds: float, point: str) -> str:
    ms = round(seconds * 1000)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{point}{ms % 1000:03}"


def _lines(text: str) -> str:
    """At most COLUMNS characters a line, and nothing that could be taken for a cue's timing."""
    return textwrap.fill(text.replace("-->", "->"), COLUMNS)

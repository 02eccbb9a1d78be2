"""Seconds to frame numbers. Frames stand at 0, 1/fps, 2/fps, ...; all arithmetic is exact.

A time becomes a frame once, and from then on frames are counted as integers: at any rate a stream
has as many frames as its range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


def exact(number: float) -> Fraction:
    """The decimal a float was written as: 0.1 is one tenth, not the binary float next to it."""
    return Fraction(str(number))


def frame_at(time: float, fps: float) -> int:
    """The first frame at or after `time` seconds."""
    return math.ceil(exact(time) * exact(fps))


def frame_before(time: float, fps: float) -> int:
    """The last frame at or before `time` seconds."""
    return math.floor(exact(time) * exact(fps))


def nearest_frame(time: float, fps: float) -> int:
    """The frame nearest to `time` seconds; halfway between two, the even one."""
    return round(exact(time) * exact(fps))


@dataclass(frozen=True)
class Extent:
    """What a video has: its frames at `fps`, and how long it lasts. Later times belong to the last frame."""

    num_frames: int
    fps: float
    duration: float

    @property
    def last(self) -> int:
        return self.num_frames - 1

    def at(self, time: float) -> int:
        """The first frame at or after `time`."""
        return min(frame_at(time, self.fps), self.last)

    def before(self, time: float) -> int:
        """The last frame at or before `time`."""
        return min(frame_before(time, self.fps), self.last)

    def nearest(self, time: float) -> int:
        """The frame nearest to `time`."""
        return min(nearest_frame(time, self.fps), self.last)

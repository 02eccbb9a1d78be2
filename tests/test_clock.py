"""Seconds to frames: the reference's roundings where they are exact, and integers where they are not."""

from __future__ import annotations

import pytest
from golden_files import read_json

from jobs.clock import Extent, exact

GOLDEN = read_json("data/time_rounding.json")


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: f"{row[0]}s-{row[1]}fps")
def test_roundings_match(row: list[float]) -> None:
    time, fps, low, high, nearest, after, before = row
    video = Extent(int(high * fps) + 1, fps, high)
    time = max(time, low)
    ours = [video.nearest(time), video.at(time), video.before(time)]
    assert [frame / fps for frame in ours] == pytest.approx([nearest, after, before])


@pytest.mark.parametrize("fps", [row["fps"] for row in GOLDEN["float_truncation"]])
def test_the_time_of_a_frame_is_that_frame_at_any_rate(fps: int) -> None:
    """Finding 6.1: truncated floats are off by one for many of these."""
    video = Extent(2000, fps, 2000 / fps)
    for frame in range(0, 2000, 7):
        for time in (frame / fps, float(exact(round(frame / fps, 9)))):
            assert abs(video.nearest(time) - frame) == 0

"""Clipping, as in the public reference."""

from __future__ import annotations

import pytest
from golden_files import read_json

from actors.turns import parse
from jobs.scenes import Scene, clip

GOLDEN = read_json("data/max_frames_clip.json")
CASES = [case for case in GOLDEN["cases"] if len(case["load_ranges"]) == 1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['conversation']}-{case['max_num_frames']}")
def test_clipping_matches(case: dict) -> None:
    whole = parse(GOLDEN["conversations"][case["conversation"]])
    turns = clip(whole, case["max_num_frames"])
    assert list(turns) == parse(case["out_conversation"])
    (frames,) = case["load_ranges"].values()
    (clipped,) = case["out_load_ranges"].values()
    if len(turns) < len(whole):
        assert Scene(frames[0], turns).frames == tuple(clipped)

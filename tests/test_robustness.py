"""Dialogues about no video, noise and black frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from golden_data import text, turns
from golden_files import read_json

from actors.config import DEFAULT_SYSTEM_PROMPT
from actors.turns import parse
from actors.video import probe, read_frames
from jobs.clock import Extent
from jobs.dialogues import DataConfig, Dialogue
from jobs.extents import frames_in
from jobs.robustness import read_robustness, write_videos
from jobs.tasks import dialogues_of


def made(folder: Path) -> list[Dialogue]:
    extents = {"robustness_noise": Extent(10, 2, 5), "robustness_black": Extent(1, 2, 0.5)}
    return [
        dialogue
        for row in read_robustness(folder)
        for dialogue in dialogues_of(
            row, extents.get(row.video_id, Extent(0, 2, 0)), DataConfig(fps=2), DEFAULT_SYSTEM_PROMPT
        ).dialogues
    ]


@pytest.mark.parametrize("version", ["live1", "live1plus"])
def test_samples_match(tmp_path: Path, version: str) -> None:
    golden = read_json("data/samples.json")[f"robustness__{version}"]
    # The reference says of user turns, too, that they are not learned.
    for ours, anno, sample in zip(made(tmp_path), golden["annos"], golden["samples"], strict=True):
        conversation = [
            {key: turn[key] for key in turn.keys() - ({"learn"} if turn["role"] == "user" else set())}
            for turn in anno["conversation"]
        ]
        assert list(turns(ours)) == parse(conversation)
        assert text(ours, version) == sample["text"]


@pytest.mark.parametrize("fps", [2, 5, 29.97])
def test_its_videos_show_noise_and_black_at_the_rate_of_the_dialogues(tmp_path: Path, fps: float) -> None:
    write_videos(tmp_path, fps)
    paths = [tmp_path / "robustness_noise.mkv", tmp_path / "robustness_black.mkv"]
    assert [frames_in(probe(path), fps) for path in paths] == [10, 1]
    noise, black = ([frame.image for frame in read_frames(path, fps, 224, "pad")] for path in paths)
    assert np.std(noise[0]) > 50
    assert not np.array_equal(noise[0], noise[1])
    assert np.max(black) <= 2

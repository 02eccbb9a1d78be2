"""The pipeline's benchmark, on the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.config import Config, FrameConfig, ModelConfig
from jobs.stream_benchmark import PAPER_FPS, Clip, StreamReport, measure


def test_a_clip_is_full_and_speaks_on_schedule(sample_video: Path) -> None:
    clip = Clip(sample_video, seconds=60, fps=1, reply_every_s=20)
    assert list(clip.speaks) == [19, 39, 59]
    assert sum(1 for _ in clip.pictures(FrameConfig(resolution_px=16))) == 60  # longer than the sample: it begins anew


@pytest.mark.slow
@pytest.mark.beside
def test_a_video_goes_through_all_stages(tiny_configs: dict[str, ModelConfig], sample_video: Path) -> None:
    tiny = tiny_configs["live1plus"].model_copy(update={"checkpoint": None}).model_dump(mode="json")
    config = Config({"model": tiny, "engine": {"untrained": True}})
    clip = Clip(sample_video, seconds=6, fps=2, reply_every_s=3)
    found = measure(config, "live1plus", clip)
    assert (found.frames, found.replies) == (12, 2)
    assert 0 < found.overlap == found.fps / min(found.encoder_alone_fps, found.llm_alone_fps)
    assert found.peak_gb > found.encoder_gb > 0
    assert f"{PAPER_FPS:.2f}" in StreamReport({}, [], [found]).table()

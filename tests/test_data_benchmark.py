"""The benchmark of the data pipeline: what it computes, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.config import Config, ModelConfig
from jobs.data_benchmark import DATA_QUICK, DataBenchmark
from jobs.data_report import DataReport, Memory, Pipeline, Reads, Stages

REPORT = DataReport(
    settings={"date": "2026-11-22"},
    stages=Stages(decode_s=0.002, encode_s=0.008),
    pipeline=Pipeline(frames=1000, wall_s=8, cpu_s=12.5, driver_s=0.5, cores=4, free_cores=1.5),
    memory=[Memory(2, 240, 1000), Memory(30, 3600, 1080)],
    megabytes_an_hour=100,
    reads=[Reads(64, 64, 400, 25600)],
)


def test_the_bound_is_what_the_stages_alone_would_allow_on_the_cores_there_were() -> None:
    assert REPORT.bound == pytest.approx(150)
    assert REPORT.of_bound == pytest.approx(125 / 150)
    assert REPORT.of_cpu == pytest.approx(0.8)
    assert REPORT.memory_growth == pytest.approx(1.08)
    assert [goal.met for goal in REPORT.goals] == [False, True]


def test_a_report_is_kept_with_its_goals_and_a_picture(tmp_path: Path) -> None:
    REPORT.save(tmp_path / "deep" / "run")
    kept = json.loads((tmp_path / "deep" / "run.json").read_text())
    assert kept["pipeline"]["frames_per_s"] == 125
    assert [goal["met"] for goal in kept["goals"]] == [False, True]
    assert (tmp_path / "deep" / "run.png").stat().st_size > 1000
    assert "0.83 of the bound" in REPORT.table()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
def test_it_runs(ray_cluster: None, tiny_configs: dict[str, ModelConfig], sample_video: Path) -> None:
    config = Config({"model": tiny_configs["live1plus"].model_dump(), "store": {"encoders": 1, "encoder_cpus": 0.5}})
    report = DataBenchmark(config, [str(sample_video)], DATA_QUICK).run()
    assert report.stages.decode_s > 0 < report.stages.encode_s
    assert report.pipeline.frames > 0 < report.pipeline.cpu_s
    assert [memory.frames for memory in report.memory] == [24, 60]
    # Ten tokens of 48 numbers a frame, two frames a second.
    assert 0.9 * 6.9 < report.megabytes_an_hour < 3 * 6.9
    assert [reads.wanted for reads in report.reads] == [1, 16]

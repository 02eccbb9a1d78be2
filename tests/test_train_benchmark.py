"""All ways of training learn the same, and the report says how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_data import untrained_config

from actors.config import Config, ModelConfig
from jobs.benchmark import main
from jobs.train_benchmark import run


def test_all_ways_have_the_same_losses(tiny_configs: dict[str, ModelConfig], tmp_path: Path) -> None:
    sections = {
        "model": untrained_config(tiny_configs["live1plus"]).model_dump(mode="json"),
        "data": {"max_frames": 6},
        "training": {"adapter": {"rank": 2, "alpha": 4, "dropout": 0}, "batch_size": 2},
    }
    report = run(Config(sections, "test"), steps=1, dialogues=4)
    assert report.loss_difference < 1e-4
    needed = report.arithmetic.gflop_a_position
    assert needed["packed"] < needed["loop_kept"] < needed["loop"]
    report.save(tmp_path / "found")
    saved = json.loads((tmp_path / "found.json").read_text())
    assert set(saved["positions_per_s"]) == {"loop", "loop_kept", "packed"}
    assert (tmp_path / "found.png").is_file()
    assert f"reached {saved['goal']['reached']:.2f}" in report.table()


def test_the_settings_file_may_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "training.batch_size=few"]) == 1
    assert "batch_size" in capsys.readouterr().err

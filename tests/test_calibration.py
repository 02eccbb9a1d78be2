"""The threshold that a checkpoint brings along."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from actors import checkpoint
from actors.calibration import CALIBRATION_FILE, Calibration, write_calibration
from actors.messages import SessionSettings
from actors.parts import CheckpointError


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, to be written into."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def of(folder: Path, **changes: object) -> Calibration:
    fields = {
        "fingerprint": checkpoint.read_settings(folder).fingerprint,
        "threshold": 0.9,
        "metric": "temporal F1",
        "value": 0.5,
        "before_s": 1.0,
        "after_s": 3.0,
        "data": "validation.jsonl",
        "data_digest": "0123",
        "num_dialogues": 7,
        "fps": 2.0,
    }
    return Calibration.model_validate(fields | changes)


def test_a_checkpoint_brings_its_threshold_along(copy: Path) -> None:
    assert checkpoint.load(copy).threshold is None
    for threshold in (0.9, 0.8):
        write_calibration(copy, of(copy, threshold=threshold))
        loaded = checkpoint.load(copy)
        assert loaded.calibration == of(copy, threshold=threshold)
        assert loaded.threshold == threshold
    assert not list(copy.glob(".*"))


def test_a_sessions_own_threshold_wins() -> None:
    assert SessionSettings().with_threshold_of(0.9).threshold == 0.9
    assert SessionSettings().with_threshold_of(None).threshold == SessionSettings().threshold
    assert SessionSettings(threshold=0.725).with_threshold_of(0.9).threshold == 0.725


def test_after_more_training_it_is_gone(copy: Path, tmp_path: Path) -> None:
    write_calibration(copy, of(copy))
    checkpoint.save(tmp_path / "next", checkpoint.load(copy, merged=False))
    assert checkpoint.load(tmp_path / "next").threshold is None


def test_that_of_another_model_is_not_used(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_calibration(copy, of(copy, fingerprint="llm/other"))
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load(copy).threshold is None
    assert "calibration.json is of model llm/other" in caplog.text


@pytest.mark.parametrize(("content", "problem"), [("{", "JSON"), ('{"threshold": "high"}', "damaged")])
def test_a_damaged_one_is_refused(content: str, problem: str, copy: Path) -> None:
    (copy / CALIBRATION_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=f"{problem}.*run jobs.evaluate"):
        checkpoint.load(copy)


def test_one_that_cannot_be_written_leaves_nothing(copy: Path) -> None:
    calibration = of(copy)
    (copy / CALIBRATION_FILE).mkdir()
    with pytest.raises(CheckpointError, match="cannot be stored in"):
        write_calibration(copy, calibration)
    assert not list(copy.glob(".*"))

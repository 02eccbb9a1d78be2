"""The default model's own pipeline, end to end in miniature, and the checkpoint that is shipped."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from actors import checkpoint
from actors.backends import build_engine, load_model
from actors.calibration import read_calibration
from actors.config import load_config
from actors.efficientnet import load_embedded
from actors.encoder import FrameEncoder
from actors.engine import EngineConfig
from actors.messages import SessionSettings
from jobs.class_fields import Classifier
from jobs.default_report import alarms, best_quiet, classifier_told
from jobs.event_metrics import Said
from jobs.make_streams import StreamsConfig
from jobs.photo_streams import PhotosError
from jobs.replay import FrameChunk, Recording, replay
from jobs.training_config import TrainingConfig

REPOSITORY = Path(__file__).parents[1]
SETTINGS = str(REPOSITORY / "configs" / "default_model.yaml")
SMALL = "{dense: {streams: 30, frames: [8, 14], gap: [2, 4]}}"


def job(name: str, root: Path, *overrides: str) -> str:
    """Run a job as a user would, with results in `root`; its log. Fails the test where it fails."""
    command = [sys.executable, "-m", f"jobs.{name}", SETTINGS, "--root", str(root), *overrides]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stderr


def test_of_thresholds_that_are_quiet_enough_the_best_is_taken() -> None:
    curve = {0.1: 0.70, 0.2: 0.74, 0.3: 0.74, 0.4: 0.75}
    an_hour = {0.1: 0.0, 0.2: 1.5, 0.3: 2.0, 0.4: 2.5}
    assert best_quiet(curve, an_hour, 3) == 0.4
    assert best_quiet(curve, an_hour, 2) == 0.2
    assert best_quiet(curve, an_hour, 0) == 0.1
    with pytest.raises(PhotosError, match=r"0\.5 at 0\.1, 1\.0 at 0\.2, expected at most 0\.2.*most_alarms"):
        best_quiet({0.1: 0.7, 0.2: 0.7}, {0.1: 0.5, 0.2: 1}, 0.2)
    with pytest.raises(PhotosError, match="named nothing right"):
        best_quiet({0.1: 0.0}, {0.1: 0}, 2)


def test_frames_below_a_threshold_that_follow_each_other_are_one_false_alarm() -> None:
    p_silent = [0.9, 0.3, 0.2, 0.9, 0.1, 0.6]
    assert [alarms(p_silent, [], threshold) for threshold in (0, 0.15, 0.25, 0.35, 0.7)] == [0, 1, 2, 2, 2]
    assert alarms(p_silent, [5], 0.15) == 1, "5 goes on with 4"
    assert alarms(p_silent, [0], 0.15) == 2, "it spoke there at threshold 0"


def test_the_classifier_that_is_told_when_looks_at_what_comes_then(samples: Path) -> None:
    config = load_config(REPOSITORY / "configs" / "embedded.yaml")
    cat = np.array(Image.open(samples / "cat.jpg").convert("RGB").resize((224, 224)))
    grey = np.full_like(cat, 120)
    tokens = FrameEncoder(config.model, threads=1)(np.stack([grey] * 4 + [cat] * 5 + [grey] * 5))
    classifier = Classifier(load_embedded())
    there, gone = classifier_told(classifier, tokens, [1.9, 4.5])
    assert there == Said(1.9, "a cat comes into view.")
    assert gone.time == 4.5
    assert "cat" not in gone.text


@pytest.mark.parametrize(("target", "parts"), [("train-default", 11), ("train-short", 5)])
def test_make_asks_for_settings_that_there_are(target: str, parts: int) -> None:
    asked = subprocess.run(["make", "-n", target], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    trained = 0
    for line in asked.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if not {"jobs.make_streams", "jobs.train"} & set(words):
            continue
        config = load_config(SETTINGS, words[words.index("-m") + 3 :])
        config.section("streams", StreamsConfig)
        config.section("training", TrainingConfig).check()
        trained += "jobs.train" in words
    assert trained == parts


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.timeout(900)
def test_the_pipeline_of_the_default_model_in_miniature(tmp_path: Path) -> None:
    job(
        "make_streams",
        tmp_path,
        "streams.clips=12",
        "streams.things=1",
        f"streams.sets={SMALL}",
        "streams.validation_fraction=0.3",
    )
    made = ["data.folder=runs/default/dense/dialogues", "store.folder=runs/default/dense/tokens"]
    job(
        "train",
        tmp_path,
        "model.checkpoint=runs/default/connector",
        *made,
        "training.name=small",
        "training.batch_size=4",
        "training.max_steps=6",
    )
    trained = tmp_path / "runs" / "default" / "runs" / "small"
    losses = [json.loads(line)["loss"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    job("export_checkpoint", tmp_path, f"model.checkpoint={trained / 'checkpoint'}", "export.folder=runs/default/model")
    shipped = tmp_path / "runs" / "default" / "model"
    assert sum(file.stat().st_size for file in shipped.glob("*.safetensors")) < 20e6
    job(
        "evaluate",
        tmp_path,
        f"model.checkpoint={shipped}",
        *made,
        "evaluation.calibrate=true",
        "evaluation.thresholds=[0.5,0.9]",
        "evaluation.max_dialogues=3",
        "session.max_response_tokens=4",
    )
    assert json.loads((shipped / "calibration.json").read_text())["threshold"] in (0.5, 0.9)
    job(
        "default_report",
        tmp_path,
        f"model.checkpoint={shipped}",
        "report.quiet_hours=0.02",
        "report.quiet_clips=4",
        "session.max_response_tokens=4",
        "report.threshold=0.02",
        f"report.samples={REPOSITORY / 'tests/samples'}",
    )
    report = json.loads((tmp_path / "runs" / "default" / "report" / "report.json").read_text())
    assert report["samples"]["always silent"]["f1"] == 0
    assert report["samples"]["model"]["events"] == 19
    assert report["quiet"]["hours"] == 0.02


def test_the_shipped_model_is_small_and_has_a_threshold_of_its_own() -> None:
    folder = checkpoint.checkpoint_folder(checkpoint.EMBEDDED)
    settings = checkpoint.read_settings(folder)
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 20e6
    calibration = read_calibration(folder, settings.fingerprint)
    assert calibration is not None
    assert 0 < calibration.threshold < 1


@pytest.mark.slow
@pytest.mark.beside
def test_the_shipped_model_tells_when_a_cat_comes_and_goes(samples: Path) -> None:
    config = load_config(REPOSITORY / "configs" / "embedded.yaml")
    encoder = FrameEncoder(config.model, threads=1)
    grey = np.full((224, 224, 3), 120, np.uint8)
    cat = np.array(Image.open(samples / "cat.jpg").convert("RGB").resize((224, 224)))
    tokens = encoder(np.stack([grey] * 8 + [cat] * 10 + [grey] * 8))
    loaded = load_model(config)
    engine = build_engine(loaded.model, loaded.template, config.section("engine", EngineConfig))
    settings = config.section("session", SessionSettings).with_threshold_of(loaded.threshold)
    times = [frame / 2 for frame in range(len(tokens))]
    [transcript] = replay(engine, [Recording("cat", [FrameChunk(times, tokens)], settings=settings)])
    comes = [one for one in transcript.utterances if 4 <= one.time <= 5.5]
    assert len(comes) == 1
    assert "cat" in comes[0].text.lower()
    assert [one.text for one in transcript.utterances if 9 <= one.time <= 10.5] == ["The cat is gone."]

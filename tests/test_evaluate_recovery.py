"""Evaluations that lose a process, by SIGKILL: nothing that was graded is graded again, and all numbers come."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from training_data import narrated, write_store

from actors import checkpoint
from actors.config import Config, ModelConfig
from actors.messages import SessionSettings
from jobs.dialogue_files import to_line
from jobs.grader_pool import Actors

VIDEOS = [f"video{number}" for number in range(6)]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def settings(tiny_checkpoint: Path, tiny_configs: dict[str, ModelConfig], tmp_path: Path) -> dict:
    features = checkpoint.load(tiny_checkpoint).features
    write_store(tmp_path / "tokens", tiny_configs["live1plus"].frames, VIDEOS, fingerprint=features)
    (tmp_path / "dialogues.jsonl").write_text("".join(to_line(narrated(name)) for name in VIDEOS))
    model = tiny_configs["live1plus"].model_copy(update={"checkpoint": str(tiny_checkpoint)})
    return {
        "model": model.model_dump(mode="json"),
        "engine": {"kv_memory_gb": 0.1},
        "store": {"folder": str(tmp_path / "tokens")},
        "evaluation": {
            "dialogues": str(tmp_path / "dialogues.jsonl"),
            "folder": str(tmp_path / "out"),
            "thresholds": [0, 0.9],
            "at_once": 1,
        },
    }


def finished(folder: Path) -> list[str]:
    file = folder / "out" / "finished.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line)["key"] for line in lines if line.endswith(b"\n")]


def test_a_killed_evaluation_goes_on(settings: dict, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "jobs.evaluate", str(tmp_path / "settings.yaml")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120
        while not finished(tmp_path):
            assert process.poll() is None
            assert time.monotonic() < end, "nothing was graded"
            time.sleep(0.01)
        process.kill()
    kept = finished(tmp_path)
    assert not (tmp_path / "out" / "metrics.json").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    keys = finished(tmp_path)
    assert keys[: len(kept)] == kept
    assert len(keys) == len(set(keys))
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["num_dialogues"] == len(VIDEOS)


def test_a_killed_actor_comes_back(ray_cluster: None, settings: dict) -> None:
    import ray

    pool = Actors(Config(settings), 1)
    batches = [[narrated(name)] for name in VIDEOS]
    found = {}
    for index, results in pool.run("play", batches, SessionSettings(max_response_tokens=4)):
        found[index] = results
        if len(found) == 1:
            ray.kill(pool.actors[0], no_restart=False)
    assert sorted(found) == list(range(len(VIDEOS)))
    assert all(len(results) == 1 for results in found.values())

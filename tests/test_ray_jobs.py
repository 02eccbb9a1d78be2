"""Every offline program through `ray job submit`, on a cluster started as docs/jobs.md says."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from training_data import narrated, untrained_config, write_store

from actors import checkpoint
from actors.config import ModelConfig
from actors.vision import vision_fingerprint
from jobs.dialogue_files import read_dialogues, to_line
from jobs.frame_store import FrameStore
from jobs.run_folder import RunFolder
from jobs.training_log import read_log
from jobs.training_worker import STATE_FILE

REPOSITORY = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@pytest.fixture
def job_server(tmp_path: Path) -> Iterator[str]:
    """Address to submit jobs to; the cluster ends with the test."""
    gcs, dashboard, agent, client = free_ports(4)
    command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"]
    command += [f"--port={gcs}", f"--ray-client-server-port={client}", "--include-dashboard=true"]
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    with (
        (tmp_path / "head.log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment) as head,
    ):
        try:
            wait_for(f"http://127.0.0.1:{agent}/api/local_raylet_healthz", head)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            head.terminate()


def wait_for(url: str, head: subprocess.Popen, deadline_s: float = 120) -> None:
    """Until the address answers: only then are jobs accepted."""
    end = time.monotonic() + deadline_s
    while True:
        assert head.poll() is None, "the cluster did not start: see head.log"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < end, f"{url} does not answer"
            time.sleep(0.2)


def submit(job_server: str, folder: Path, job: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """A job of the settings in `folder`, which is its root, to its end."""
    program = ["python", "-m", f"jobs.{job}", str(folder / "settings.yaml"), "--root", str(folder), *overrides]
    command = [BIN / "ray", "job", "submit", "--address", job_server, "--working-dir", ".", "--", *program]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_offline_leg_runs_as_submitted_jobs(
    job_server: str, tiny_configs: dict[str, ModelConfig], samples: Path, tmp_path: Path
) -> None:
    settings = {
        "model": untrained_config(tiny_configs["live1plus"]).model_dump(mode="json"),
        "annotations": {"paths": [str(samples)]},
        "data": {"folder": "dialogues", "max_frames": 30, "longer": "split", "validation_fraction": 0},
        "store": {"folder": "tokens", "encoder_cpus": 0.5},
        "training": {"name": "test", "adapter": {"rank": 4, "alpha": 8}, "max_steps": 2, "batch_size": 1},
    }
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))

    for job in ("build_dialogues", "encode_frames", "train"):
        done = submit(job_server, tmp_path, job)
        assert done.returncode == 0, done.stdout + done.stderr
    told = {dialogue.video_id for dialogue in read_dialogues(tmp_path / "dialogues" / "train")}
    assert (
        told == set(FrameStore.open(tmp_path / "tokens").video_ids()) == {file.stem for file in samples.glob("*.srt")}
    )
    run = tmp_path / "runs" / "test"
    trained = checkpoint.load(run / "checkpoint")
    assert trained.trained_videos == sorted(told)
    assert trained.features == FrameStore.open(tmp_path / "tokens").info.fingerprint
    assert trained.fingerprint != checkpoint.untrained(untrained_config(tiny_configs["live1plus"])).fingerprint
    assert not (run / "checkpoint" / STATE_FILE).exists()
    assert [record["step"] for record in read_log(RunFolder(str(run)))] == [0, 1]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.alone
@pytest.mark.timeout(600)
def test_two_workers_train_in_a_submitted_job_and_one_that_fails_says_why(
    job_server: str, tiny_configs: dict[str, ModelConfig], tmp_path: Path
) -> None:
    videos, model = ["ab", "abcd", "abcdef"], untrained_config(tiny_configs["live1plus"])
    write_store(tmp_path / "tokens", model.frames, videos, fingerprint=vision_fingerprint(model))
    (tmp_path / "dialogues").mkdir()
    (tmp_path / "dialogues" / "train.jsonl").write_text("".join(to_line(narrated(video)) for video in videos))
    settings = {
        "model": model.model_dump(mode="json"),
        "data": {"folder": "dialogues"},
        "store": {"folder": "tokens"},
        "training": {"adapter": {"rank": 4, "alpha": 8}, "max_steps": 2, "batch_size": 3, "pack_tokens": 1}
        | {"workers": 2, "cpus_per_worker": 0.5},
    }
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    done = submit(job_server, tmp_path, "train")
    assert done.returncode == 0, done.stdout + done.stderr
    failed = submit(job_server, tmp_path, "train", "training.learning_rate=1")
    assert failed.returncode == 1
    assert "error: the run in" in failed.stdout
    assert "Traceback" not in failed.stdout
    records = read_log(RunFolder(str(tmp_path / "runs" / "run")))
    assert [(record["step"], record["packs"]) for record in records] == [(0, 3), (1, 3)]
    assert checkpoint.load(tmp_path / "runs" / "run" / "checkpoint").trained_videos == videos

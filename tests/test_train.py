"""The offline leg over a real Ray: videos and subtitles in, a servable checkpoint out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from training_data import narrated, untrained_config, write_store

from actors import checkpoint
from actors.config import Config, ConfigError, ModelConfig
from actors.vision import vision_fingerprint
from jobs.build_dialogues import build
from jobs.dialogue_files import to_line
from jobs.encode_frames import encode
from jobs.frame_store import FrameStore, StoreError
from jobs.learner import Learner
from jobs.train import STATE_FILE, train
from jobs.training_config import TrainingConfig
from jobs.training_log import read_log
from jobs.training_run import PLAN_FILE, keep_settings, load_data, make_plan, portable

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context", "ignore::ResourceWarning")

TRAINING = {
    "name": "test",
    "adapter": {"rank": 4, "alpha": 8, "dropout": 0},
    "max_steps": 8,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "checkpoint_every": 3,
    "cpus_per_worker": 0.5,
}
VIDEOS = ["ab", "abcd", "abcdef", "abcdefghij"]


@pytest.fixture
def settings_of(tiny_configs: dict[str, ModelConfig], tmp_path: Path):
    """Settings of a run in `tmp_path` with the tiny live1plus model; keywords are of the section `training`."""

    def settings(**training: object) -> Config:
        return Config(
            {
                "model": untrained_config(tiny_configs["live1plus"]).model_dump(mode="json"),
                "data": {"folder": str(tmp_path / "dialogues"), "validation_fraction": 0},
                "store": {"folder": str(tmp_path / "tokens")},
                "training": TRAINING | {"folder": str(tmp_path / "runs")} | training,
            }
        )

    return settings


@pytest.fixture
def prepared(settings_of, tmp_path: Path):
    """The same, with dialogues and frame tokens in place."""
    model = settings_of().model
    write_store(tmp_path / "tokens", model.frames, VIDEOS, fingerprint=vision_fingerprint(model))
    (tmp_path / "dialogues").mkdir()
    (tmp_path / "dialogues" / "train.jsonl").write_text("".join(to_line(narrated(video)) for video in VIDEOS))
    return settings_of


def learner_of(config: Config) -> Learner:
    """The same training in this process, without Ray."""
    settings = config.section("training", TrainingConfig)
    loaded = checkpoint.untrained(config.model, settings.seed, adapter=settings.adapter)
    data = load_data(config, loaded.template)
    return Learner(loaded.model, data, make_plan(config, data, Path(settings.folder) / PLAN_FILE), settings)


def check_undisturbed(config: Config, folder: Path) -> None:
    """The checkpoint holds, to the last bit, what a run learns that nothing stopped."""
    learner = learner_of(config)
    while learner.step < learner.num_steps:
        learner.take_step()
    trained = checkpoint.load(folder, merged=False).model
    for name, parameter in learner.parameters.items():
        assert torch.equal(trained.get_parameter(name), parameter), name


def wait_for_steps(log: Path, steps: int, deadline_s: float = 120) -> None:
    """Until the run has written that many lines."""
    end = time.monotonic() + deadline_s
    while not log.exists() or len(log.read_text().splitlines()) < steps:
        assert time.monotonic() < end, f"{log} has not reached {steps} steps"
        time.sleep(0.05)


def training_workers(ancestor: int) -> list[int]:
    """Process ids of Ray Train's workers below a process."""
    return [pid for pid in descendants(ancestor) if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def descendants(pid: int) -> list[int]:
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()
    ]
    return children + [found for child in children for found in descendants(child)]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_videos_with_subtitles_become_a_servable_checkpoint(settings_of, samples: Path, tmp_path: Path) -> None:
    config = settings_of(batch_size=1, max_steps=4)
    config.sections["annotations"] = {"paths": [str(samples)]}
    config.sections["data"] |= {"max_frames": 30, "longer": "split"}
    config.sections["store"] |= {"encoder_cpus": 0.5, "decoder_cpus": 0.25}
    build(config)
    encode(config)
    folder = train(config)
    trained = checkpoint.load(folder)
    assert trained.trained_videos == sorted(video.stem for video in samples.glob("*.mp4"))
    assert trained.features == FrameStore.open(tmp_path / "tokens").info.fingerprint
    assert trained.fingerprint != checkpoint.untrained(config.model).fingerprint
    assert not (folder / STATE_FILE).exists()
    run = tmp_path / "runs" / "test"
    assert [record["step"] for record in read_log(run / "metrics.jsonl")] == [0, 1, 2, 3]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_learn_what_one_process_learns(prepared, tmp_path: Path) -> None:
    config = prepared(workers=2)
    folder = train(config)

    learner = learner_of(config)
    steps = [learner.take_step() for _ in range(8)]

    records = read_log(tmp_path / "runs" / "test" / "metrics.jsonl")
    assert [record["loss"] for record in records] == pytest.approx([step.loss for step in steps], rel=1e-4)
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    trained = checkpoint.load(folder, merged=False)
    assert trained.trained_videos == VIDEOS
    for name, parameter in learner.parameters.items():
        torch.testing.assert_close(trained.model.get_parameter(name), parameter.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_is_replaced_and_the_result_is_the_same(prepared, tmp_path: Path) -> None:
    config = prepared(name="killed", max_steps=60)
    log = tmp_path / "runs" / "killed" / "metrics.jsonl"

    def kill() -> None:
        wait_for_steps(log, 10)
        (worker,) = training_workers(os.getpid())
        os.kill(worker, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    folder = train(config)
    killer.join()
    assert [record["step"] for record in read_log(log)] == list(range(60))
    check_undisturbed(config, folder)


@pytest.mark.slow
def test_an_interrupted_run_exits_with_130_and_goes_on_with_the_same_command(prepared, tmp_path: Path) -> None:
    config = prepared(name="stopped", max_steps=60)
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(config.sections))
    run = tmp_path / "runs" / "stopped"

    def start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-m", "jobs.train", str(file)], start_new_session=True)

    with start() as process:
        wait_for_steps(run / "metrics.jsonl", 10)
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    assert len(read_log(run / "metrics.jsonl")) < 60
    with start() as process:
        pass
    assert process.returncode == 0
    check_undisturbed(config, run / "checkpoint")


def test_a_run_of_other_settings_under_the_same_name_is_refused(prepared) -> None:
    config = portable(prepared())
    data = load_data(config)
    folder = Path(config.section("training", TrainingConfig).folder) / "test"
    keep_settings(config, data, folder / "settings.json")
    keep_settings(portable(prepared(workers=4)), data, folder / "settings.json")
    with pytest.raises(ConfigError, match=r"training.learning_rate 0.01, now it is 0.02: give another training.name"):
        keep_settings(portable(prepared(learning_rate=2e-2)), data, folder / "settings.json")


def test_frame_tokens_of_another_encoder_are_refused_before_a_worker_starts(prepared, tmp_path: Path) -> None:
    (tmp_path / "tokens" / "store.json").unlink()
    write_store(tmp_path / "tokens", prepared().model.frames, [], fingerprint="siglip/384px")
    with pytest.raises(StoreError, match=r"come from 'siglip/384px', the model expects 'siglip/32px/cls\+3x3/"):
        train(prepared())


def test_a_batch_of_fewer_dialogues_than_workers_is_refused(prepared) -> None:
    with pytest.raises(ConfigError, match=r"batch_size is 4, fewer dialogues than training.workers 5"):
        train(prepared(workers=5))


@pytest.mark.parametrize("key", ["folder", "checkpoint"])
def test_local_paths_become_absolute_for_workers(
    prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    config = prepared(folder="runs")
    config.sections["model"]["checkpoint"] = "here"
    sections = portable(config).sections
    assert sections["training"]["folder"] == str(tmp_path / "runs")
    assert sections["model"]["checkpoint"] == str(tmp_path / "here")
    assert config.sections["model"]["checkpoint"] == "here"

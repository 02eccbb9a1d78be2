"""The offline leg over a real Ray: videos and subtitles in, a servable checkpoint out."""

from __future__ import annotations

import asyncio
import math
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
from ray.train import Checkpoint
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport
from ray.train.v2.api.config import CheckpointConfig
from training_data import narrated, untrained_config, write_store

from actors import checkpoint
from actors.adapter import AdapterConfig
from actors.config import Config, ConfigError, ModelConfig
from actors.vision import vision_fingerprint
from jobs.dataset import DatasetError
from jobs.dialogue_files import DialogueFileError, to_line
from jobs.dialogues import Dialogue
from jobs.encoding_summary import Summary
from jobs.frame_store import FrameStore, StoreError
from jobs.learner import Learner, TrainingError
from jobs.run_folder import RunFolder
from jobs.train import train
from jobs.training_config import TrainingConfig
from jobs.training_log import METRICS_FILE, read_log
from jobs.training_run import check_held_out, keep_settings, load_data, make_plan, portable, run_folder
from jobs.training_worker import FAILURE_FILE, score, score_name, start

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context", "ignore::ResourceWarning")

TRAINING = {
    "name": "test",
    "adapter": {"rank": 4, "alpha": 8, "dropout": 0},
    "max_steps": 8,
    "batch_size": 4,
    "pack_tokens": 200,
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
    return Learner(loaded.model, data, make_plan(config, data, run_folder(config)), settings)


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
def test_a_killed_worker_is_replaced_and_the_result_is_the_same(prepared, tmp_path: Path) -> None:
    config = prepared(name="killed", max_steps=60)
    log = tmp_path / "runs" / "killed" / METRICS_FILE

    kept = list[str]()

    def kill() -> None:
        wait_for_steps(log, 10)
        kept.extend(log.read_text().splitlines()[:6])
        (worker,) = training_workers(os.getpid())
        os.kill(worker, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    folder = train(config)
    killer.join()
    assert [record["step"] for record in read_log(run_folder(config))] == list(range(60))
    assert log.read_text().splitlines()[:6] == kept  # with how long each took: they were not learned again
    check_undisturbed(config, folder)


@pytest.mark.slow
def test_an_interrupted_run_exits_with_130_and_goes_on_with_the_same_command(prepared, tmp_path: Path) -> None:
    config = prepared(name="stopped", max_steps=60)
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(config.sections))
    run = tmp_path / "runs" / "stopped"

    def start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-m", "jobs.train", str(file)], start_new_session=True)

    for steps, how in ((10, signal.SIGINT), (25, signal.SIGTERM)):  # Ctrl-C, and a `ray job` that is stopped
        with start() as process:
            wait_for_steps(run / "metrics.jsonl", steps)
            process.send_signal(how)
        assert process.returncode == 130
        assert len(read_log(RunFolder(str(run)))) < 60
        kept = (run / METRICS_FILE).read_text().splitlines()[: steps - 4]  # up to a checkpoint, with how long each took
    with start() as process:
        pass
    assert process.returncode == 0
    assert (run / METRICS_FILE).read_text().splitlines()[: len(kept)] == kept
    check_undisturbed(config, run / "checkpoint")


def test_a_run_of_other_settings_under_the_same_name_is_refused(prepared) -> None:
    config = portable(prepared())
    data, folder = load_data(config), run_folder(config)
    keep_settings(config, data, folder)
    keep_settings(portable(prepared(workers=4, pack_tokens=77)), data, folder)
    with pytest.raises(ConfigError, match=r"training.learning_rate 0.01, now it is 0.02: give another training.name"):
        keep_settings(portable(prepared(learning_rate=2e-2)), data, folder)


@pytest.mark.slow
def test_two_workers_learn_what_one_process_learns_and_validate_and_keep_the_best_in_any_storage(
    prepared, tmp_path: Path, ray_cluster: None
) -> None:
    """Losses, norms of gradients and every parameter; tests/test_learner.py says why at this rate.

    Through fsspec by URL, as an object store would be used.
    """
    (tmp_path / "dialogues" / "validation.jsonl").write_text(to_line(narrated("held")))
    store = FrameStore.open(tmp_path / "tokens")
    with store.locked(), store.writer("held") as writer:
        writer.append([frame / 2 for frame in range(12)], torch.randn(12, 10, 48).half())
        writer.commit()
    settings = {"folder": f"file://{tmp_path}/bucket", "validate_every": 4, "keep_best": "text_loss"}
    config = prepared(**settings, workers=2, learning_rate=1e-3)
    assert train(config) == f"file://{tmp_path}/bucket/test/checkpoint"
    run = tmp_path / "bucket" / "test"

    learner = learner_of(config)
    steps = [learner.take_step() for _ in range(8)]
    records = read_log(RunFolder(f"file://{run}"))
    learned = [record for record in records if "loss" in record]
    assert [record["step"] for record in learned] == list(range(8))
    assert [record["loss"] for record in learned] == pytest.approx([step.loss for step in steps], rel=1e-5)
    norms = [record["gradient_norm"] for record in learned]
    assert norms == pytest.approx([step.gradient_norm for step in steps], rel=1e-5)
    assert learned[-1]["loss"] < 0.8 * learned[0]["loss"]
    trained = checkpoint.load(run / "checkpoint", merged=False)
    assert trained.trained_videos == VIDEOS
    for name, parameter in learner.parameters.items():
        torch.testing.assert_close(trained.model.get_parameter(name), parameter.detach(), rtol=0, atol=1e-5)

    validated = {record["step"]: record for record in records if "validation_text_loss" in record}
    assert list(validated) == [3, 7]
    assert {"validation_lm_ppl", "validation_time_diff", "validation_fluency"} <= validated[7].keys()
    best = min(validated, key=lambda step: validated[step]["validation_text_loss"])
    wanted = run / ("checkpoint" if best == 7 else "best")
    assert checkpoint.read_settings(run / "best").parts == checkpoint.read_settings(wanted).parts
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))


def test_a_run_may_start_from_another_ones_checkpoint_with_a_new_optimizer(prepared, tmp_path: Path) -> None:
    first = prepared()
    settings = first.section("training", TrainingConfig)
    loaded = start(first.model, settings, "cpu")
    data = load_data(first, loaded.template)
    learner = Learner(loaded.model, data, make_plan(first, data, run_folder(first)), settings)
    for _ in range(2):
        learner.take_step()
    checkpoint.save(tmp_path / "first", loaded, data.video_ids())

    config = prepared(name="second")
    config.sections["model"]["checkpoint"] = str(tmp_path / "first")
    again = start(config.model, settings, "cpu")
    assert again.trained_videos == VIDEOS
    second = Learner(again.model, data, make_plan(config, data, run_folder(config)), settings)
    assert second.step == 0
    assert not second.optimizer.state_dict()["state"]
    for name, parameter in learner.parameters.items():
        assert torch.equal(second.parameters[name], parameter), name
    assert second.take_step().loss < 6
    with pytest.raises(ConfigError, match=r"has the adapter .*rank=4.*, training.adapter is .*rank=8.*: make them"):
        start(config.model, settings.model_copy(update={"adapter": AdapterConfig(rank=8)}), "cpu")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_at_once(prepared, ray_cluster: None) -> None:
    config = prepared(learning_rate=1e30, max_gradient_norm=1e30, warmup=0, max_failures=3)
    with pytest.raises(TrainingError, match=r"step \d: loss .*ab\w*-narration-0.*lower training.learning_rate"):
        train(config)
    assert run_folder(config).exists(FAILURE_FILE)


def test_a_video_in_training_and_validation_is_refused(prepared, tmp_path: Path) -> None:
    (tmp_path / "dialogues" / "validation.jsonl").write_text(to_line(narrated("abcd")))
    with pytest.raises(DatasetError, match="1 videos are in training and validation, such as 'abcd'"):
        train(prepared())


def test_a_validation_video_that_an_earlier_run_trained_on_is_refused(
    prepared, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    (tmp_path / "dialogues" / "validation.jsonl").write_text(to_line(narrated("tiny_world")))
    config = prepared()
    config.sections["model"]["checkpoint"] = str(tiny_checkpoint)
    with pytest.raises(DatasetError, match=r"validation videos were trained on in model.checkpoint .*'tiny_world'"):
        check_held_out(config, load_data(config))


def test_validation_without_held_out_dialogues_is_refused(prepared, tmp_path: Path) -> None:
    with pytest.raises(DialogueFileError, match="validation: no such dialogue file"):
        train(prepared(validate_every=1))
    with pytest.raises(ConfigError, match="keep_best is fluency, but nothing is validated"):
        train(prepared(keep_best="fluency"))


def test_validation_on_dialogues_that_teach_nothing_is_refused_before_a_worker_starts(prepared, tmp_path: Path) -> None:
    asked = narrated("abcd").model_dump() | {"dialogue_id": "asked", "frames": (0, 0)}
    blind = Dialogue.model_validate(asked | {"conversation": [{"role": "user", "content": "What?"}]})
    (tmp_path / "dialogues" / "validation.jsonl").write_text(to_line(blind))
    with pytest.raises(DatasetError, match="none of 1 dialogues to validate on has anything to learn"):
        train(prepared(validate_every=1))


def test_dialogues_beyond_the_limit_are_clipped_and_counted(prepared, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(prepared(dry_run=True, max_tokens=120)) is None
    told = capsys.readouterr().out
    assert "data: 4 dialogues of 4 videos" in told
    assert "clipped to 120 positions: 4 dialogues" in told
    assert "plan: 8 steps of 4 dialogues (8.00 epochs) on 1 workers" in told
    assert not run_folder(prepared()).exists("settings.json")


def test_the_plan_tells_which_videos_are_left_out(prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = prepared(dry_run=True)
    with (tmp_path / "dialogues" / "train.jsonl").open("a") as lines:
        lines.writelines(to_line(narrated(video)) for video in ("broken", "absent"))
    Summary(failed={"broken": "not a readable video"}).save(tmp_path / "tokens")
    assert train(config) is None
    told = capsys.readouterr().out
    assert f"data: {len(VIDEOS)} dialogues of {len(VIDEOS)} videos" in told
    assert "left out: 1 dialogue of 1 video, not in the frame-token store: absent" in told
    assert "left out: 1 dialogue of 1 video, jobs.encode_frames failed on them: broken" in told


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


def test_one_program_at_a_time_trains_a_run(prepared) -> None:
    config = prepared()
    with run_folder(config).alone(), pytest.raises(ConfigError, match="another program is training the run"):
        train(config)


def test_a_split_without_dialogues_is_refused(prepared, tmp_path: Path) -> None:
    (tmp_path / "dialogues" / "validation.jsonl").write_text("")
    with pytest.raises(DatasetError, match=r"has no validation dialogues: .* raise data.validation_fraction"):
        train(prepared(validate_every=1))
    (tmp_path / "dialogues" / "train.jsonl").write_text("")
    with pytest.raises(DatasetError, match=r"has no train dialogues: .* lower data.validation_fraction"):
        train(prepared())


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scores_of_checkpoints_survive_a_run_that_is_started_again(tmp_path: Path, value: float | None) -> None:
    """Ray keeps them as JSON, and compares with them when the run goes on."""
    kept = CheckpointConfig(num_to_keep=2, checkpoint_score_attribute=score_name("loss"), checkpoint_score_order="max")

    def manager() -> tuple[StorageContext, CheckpointManager]:
        storage = StorageContext(storage_path=str(tmp_path), experiment_dir_name="steps")
        return storage, CheckpointManager(storage_context=storage, checkpoint_config=kept)

    async def report(name: str, found: float | None) -> CheckpointManager:
        storage, one = manager()
        folder = tmp_path / "steps" / name
        folder.mkdir(parents=True)
        saved = Checkpoint(str(folder), filesystem=storage.storage_filesystem)
        metrics = {score_name("loss"): score(found, "loss")}
        one.register_checkpoint(_TrainingReport(checkpoint=saved, metrics=metrics, validation=False))
        return one

    async def losses() -> None:
        for number, found in enumerate((1.5, value, 1.4, value, 1.6)):
            last = await report(f"checkpoint_{number}", found)
        assert last.best_checkpoint_result.metrics == {score_name("loss"): -1.4}

    asyncio.run(losses())


def test_a_dry_run_refuses_what_training_would(prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DialogueFileError, match="validation: no such dialogue file"):
        train(prepared(dry_run=True, validate_every=1))
    validation = tmp_path / "dialogues" / "validation.jsonl"
    validation.write_text(to_line(narrated("abcd")))
    with pytest.raises(DatasetError, match="1 videos are in training and validation"):
        train(prepared(dry_run=True))
    validation.write_text(to_line(narrated("held")))
    store = FrameStore.open(tmp_path / "tokens")
    with store.locked(), store.writer("held") as writer:
        writer.append([frame / 2 for frame in range(12)], torch.randn(12, 10, 48).half())
        writer.commit()
    train(prepared(dry_run=True, validate_every=1))
    assert "validated on 1 of 1 dialogues" in capsys.readouterr().out


def test_more_fluency_is_better_less_loss_too_and_none_is_worst() -> None:
    assert score(0.4, "fluency") > score(0.3, "fluency") > score(None, "fluency")
    assert score(0.3, "loss") > score(0.4, "loss") > score(math.nan, "loss")

"""A folder of videos and texts to a model to serve; and what a folder is told that holds something else."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from actors import checkpoint
from actors.adapter import read_adapter_config
from actors.config import Config, ConfigError, load_config
from actors.engine import EngineConfig
from actors.messages import SessionSettings
from actors.published import CONFIG_FILE
from jobs.annotations import AnnotationsConfig, find_annotations, read_annotations
from jobs.dialogues import DataConfig
from jobs.encode_frames import EncodingError
from jobs.finetune import check_videos, finetune
from jobs.training_config import TrainingConfig


def test_a_folder_without_videos_or_texts_is_told_what_it_lacks(tmp_path: Path, samples: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: no such folder; give one that holds videos"):
        check_videos(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no video")
    with pytest.raises(ConfigError, match=r"holds no video \(.*\.mp4.*\): nothing to learn from"):
        check_videos(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds 1 videos and no text: put an .srt, .vtt or .jsonl .*a\.srt"):
        check_videos(tmp_path)
    (tmp_path / "b.srt").write_text("")
    with pytest.raises(ConfigError, match=r"no text of the name of one, but .*b\.srt: put .*a\.srt"):
        check_videos(tmp_path)
    (tmp_path / "all.jsonl").write_text("")
    check_videos(tmp_path)
    check_videos(samples)


def test_videos_without_a_text_are_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.MP4", "a.srt", "b.mp4"):
        (tmp_path / name).touch()
    check_videos(tmp_path)
    assert "1 of 2 videos have no text and are left out" in caplog.text
    assert str(tmp_path / "b.srt") in caplog.text


def test_the_videos_of_any_name_are_found_from_their_texts(tmp_path: Path) -> None:
    names = ("a.MP4", "b.Mkv", "çay 日本 #1 100%.mp4", "x.y.mov", "it's.webm")
    for name in names:
        (tmp_path / name).touch()
        (tmp_path / name).with_suffix(".SRT").touch()
    found = [row.video for file in find_annotations([str(tmp_path)]) for row in read_annotations(file)]
    assert sorted(found) == sorted(str(tmp_path / name) for name in names)


@pytest.mark.parametrize("name", ["Mein Kino, ünï [x]", "it's", "a; b & c"])
def test_make_passes_a_folder_of_any_name(name: str) -> None:
    command = [
        "make",
        "--no-print-directory",
        "-o",
        ".venv/.installed",
        "finetune",
        f"VIDEOS={name}",
        "RUN=printf '%s\\n'",
    ]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    config = load_config("configs/finetune.yaml", shown[-1:])
    assert config.section("annotations", AnnotationsConfig).paths == (name,)


def test_it_ends_with_commands_that_serve_and_try_the_result(
    tmp_path: Path, samples: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = []
    for stage in ("build", "encode"):
        monkeypatch.setattr(f"jobs.finetune.{stage}", lambda _, name=stage: stages.append(name))
    monkeypatch.setattr("jobs.finetune.train", lambda _: f"{tmp_path}/my runs/checkpoint")
    finetune(load_config("configs/finetune.yaml", [f"annotations.paths=[{samples}]"]))
    assert stages == ["build", "encode"]
    commands = dict(line.split(":  ", 1) for line in capsys.readouterr().out.splitlines() if ":  " in line)
    module, *settings = shlex.split(commands["serve it"])[2:]
    assert module == "serve.app"
    assert load_config(settings[0], settings[1:]).model.checkpoint == f"{tmp_path}/my runs/checkpoint"
    assert shlex.split(commands["try it"])[2:] == ["jobs.narrate", str(samples), *settings]


def test_a_video_that_cannot_be_encoded_is_left_out_unless_all_are_wanted(
    samples: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Config) -> None:
        raise EncodingError("1 of 2 videos could not be encoded: cut")

    monkeypatch.setattr("jobs.finetune.build", lambda _: None)
    monkeypatch.setattr("jobs.finetune.encode", fail)
    monkeypatch.setattr("jobs.finetune.train", lambda _: "trained")
    overrides = [f"annotations.paths=[{samples}]"]
    assert finetune(load_config("configs/finetune.yaml", overrides)) == "trained"
    assert "going on without what failed: 1 of 2 videos" in caplog.text
    with pytest.raises(EncodingError, match="1 of 2"):
        finetune(load_config("configs/finetune.yaml", [*overrides, "store.strict=true"]))


def test_the_settings_go_on_from_the_default_model_and_serve_what_they_train() -> None:
    config = load_config("configs/finetune.yaml")
    shipped = checkpoint.checkpoint_folder(checkpoint.EMBEDDED)
    assert config.section("training", TrainingConfig).adapter == read_adapter_config(shipped / CONFIG_FILE)
    assert config.model.frames == checkpoint.read_settings(shipped).model.frames
    positions, session = (
        config.section("engine", EngineConfig).max_positions,
        config.section("session", SessionSettings),
    )
    assert session.window_trigger is not None
    assert config.section("data", DataConfig).max_frames * 6 < session.window_trigger < positions


def test_finetuning_ends_before_it_starts_where_the_folder_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path("configs/finetune.yaml").absolute()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="holds no video"):
        finetune(load_config(file, [f"annotations.paths=[{tmp_path}]"]))
    assert list(tmp_path.iterdir()) == []

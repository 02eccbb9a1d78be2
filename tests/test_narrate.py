"""jobs.narrate: from a command line to subtitles."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from actors.config import Config, ConfigError, ModelConfig
from actors.video import VideoFrame, read_frames
from jobs.annotations import read_srt, read_webvtt
from jobs.narrate import INSTRUCTION, find_tasks, main, question_of, read_request
from jobs.narrator import UNTRAINED_TOKENS, Narrator
from jobs.replay import Question


@pytest.fixture(autouse=True)
def no_handler_left() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def settings_file(tiny_configs: dict[str, ModelConfig], tmp_path: Path) -> str:
    """Settings of the tiny model, which says little at a time."""
    file = tmp_path / "tiny.yaml"
    sections = {
        "model": tiny_configs["live1plus"].model_dump(mode="json"),
        "engine": {"kv_memory_gb": 0.05},
        "session": {"max_response_tokens": 4, "fps": 0.5},
    }
    file.write_text(yaml.safe_dump(sections))
    return str(file)


@pytest.fixture
def narrate(settings_file: str, tmp_path: Path) -> Callable[..., int]:
    return lambda *arguments: main([*map(str, arguments), settings_file, "--output", str(tmp_path / "out")])


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_video_becomes_a_transcript_and_subtitles(
    narrate: Callable[..., int], sample_video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert narrate(sample_video, "--question", "Narrate.", "--question", "What was that?@12.3") == 0
    out = tmp_path / "out"
    name = sample_video.stem
    assert sorted(path.name for path in out.iterdir()) == [f"{name}{suffix}" for suffix in (".jsonl", ".srt", ".vtt")]
    rows = rows_of(out / f"{name}.jsonl")
    assert [(row["time"], row["text"]) for row in rows if row["role"] == "user"] == [
        (0.0, "Narrate."),
        (14.0, "What was that?"),
    ]
    said = [row for row in rows if row["role"] == "assistant"]
    assert {row["video"] for row in rows} == {sample_video.name}
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
    for read, suffix in ((read_srt, ".srt"), (read_webvtt, ".vtt")):
        (subtitles,) = read(out / f"{name}{suffix}")
        assert [moment.time for moment in subtitles.moments] == sorted({row["time"] for row in said})
    shown = capsys.readouterr().out
    assert "14.0s  user: What was that?" in shown
    assert f"1 of 1 videos, {len(said)} utterances; " in shown
    assert " x real time" in shown
    assert shown.endswith(f"{out / name}.jsonl .srt .vtt\n")


def test_of_a_single_video_that_failed_no_file_is_named(
    narrate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    assert narrate(tmp_path / "a.mp4") == 1
    written = capsys.readouterr()
    assert "failed: " in written.err
    assert ".jsonl" not in written.out
    assert not (tmp_path / "out").exists()


def test_a_bad_video_is_named_and_the_others_go_on(
    narrate: Callable[..., int], samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "videos"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.mp4").write_bytes(b"no video")
    (folder / "deep" / "b.mp4").symlink_to(samples / "hands_and_objects.mp4")
    assert narrate(folder) == 1
    written = capsys.readouterr()
    assert f"failed: {folder}/a.mp4: not a readable video" in written.err
    assert re.search(rf"^{folder}/deep/b.mp4: \d+ utterances; \d+ s of video in .* x real time$", written.out, re.M)
    assert "1 of 2 videos" in written.out
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == ["b.jsonl", "b.srt", "b.vtt"]
    assert rows_of(tmp_path / "out" / "deep" / "b.jsonl")[0]["text"] == INSTRUCTION


def test_a_video_that_breaks_the_program_does_not_end_the_others(
    narrate: Callable[..., int],
    samples: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def read(video: Path, *arguments: object) -> Iterator[VideoFrame]:
        if video.name == "a.mp4":
            raise KeyError("a picture of another kind")
        return read_frames(video, *arguments)

    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (folder / name).symlink_to(samples / "hands_and_objects.mp4")
    monkeypatch.setattr("jobs.narrator.read_frames", read)
    assert narrate(folder) == 1
    written = capsys.readouterr()
    assert f"failed: {folder}/a.mp4: KeyError: 'a picture of another kind'" in written.err
    assert "1 of 2 videos" in written.out
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"b"}


def test_a_stopped_run_goes_on(
    narrate: Callable[..., int], samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").symlink_to(samples / "hands_and_objects.mp4")
    assert narrate(folder) == 0
    first = (tmp_path / "out" / "a.jsonl").stat().st_mtime_ns
    (folder / "b.mp4").symlink_to(samples / "hands_and_objects.mp4")
    capsys.readouterr()
    assert narrate(folder, "--keep") == 0
    assert "1 of 1 videos" in capsys.readouterr().out
    assert (tmp_path / "out" / "a.jsonl").stat().st_mtime_ns == first
    assert narrate(folder, "--keep") == 0
    assert "every video is narrated already" in capsys.readouterr().out


def test_an_output_that_is_no_folder_is_refused_before_any_work(
    sample_video: Path, settings_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "deeper"):
        assert main([str(sample_video), settings_file, "--output", str(output)]) == 1
        assert f"{tmp_path}/file is a file, expected a folder" in capsys.readouterr().err


def test_only_bad_videos_end_before_a_model_is_loaded(
    narrate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").touch()
    (folder / "b.mp4").symlink_to(tmp_path / "moved.mp4")
    assert narrate(folder) == 1
    written = capsys.readouterr()
    assert f"failed: {folder}/a.mp4: empty (0 bytes)" in written.err
    assert f"failed: {folder}/b.mp4: no such file" in written.err
    assert "loaded the model" not in written.out


def test_a_model_without_training_says_so(
    narrate: Callable[..., int], sample_video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert narrate(sample_video, "model.checkpoint=null") == 1
    assert "set engine.untrained to true" in capsys.readouterr().err
    assert narrate(sample_video, "model.checkpoint=null", "engine.untrained=true", "session.fps=0.2") == 0
    assert "no trained checkpoint is set (model.checkpoint): what is said means nothing" in capsys.readouterr().out


def test_a_model_without_training_is_brief_unless_told_otherwise(
    tiny_configs: dict[str, ModelConfig],
) -> None:
    model = tiny_configs["live1plus"].model_copy(update={"checkpoint": None}).model_dump()
    sections: dict = {"model": model, "engine": {"untrained": True, "kv_memory_gb": 0.05}}
    assert Narrator(Config(sections), []).session.max_response_tokens == UNTRAINED_TOKENS
    sections["session"] = {"max_response_tokens": 50}
    assert Narrator(Config(sections), []).session.max_response_tokens == 50


def test_ctrl_c_ends_with_130(
    narrate: Callable[..., int], sample_video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.narrator._Screen.show", interrupt)
    assert narrate(sample_video) == 130
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.mp4"], "gone.mp4: no such file or folder"),
        (["model.dtype=float32"], "no video is given"),
        (["model.dtype=float32", "."], "holds no video"),
        ([__file__, "session.thresold=1"], "unknown key 'session.thresold'"),
        ([__file__, "other.yaml", "--question", "x@-1"], "expected one settings file"),
        ([__file__, "--question", "x@-1"], "expected seconds from 0 on"),
        ([__file__, "--workers", "-1"], "--workers is -1, expected 0 or more"),
    ],
)
def test_a_mistake_on_the_command_line_ends_in_one_line(
    arguments: list[str],
    message: str,
    narrate: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert narrate(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_without_settings_the_embedded_default_is_used(sample_video: Path) -> None:
    request = read_request([str(sample_video)])
    assert request.config.model.llm == "embedded"
    assert (request.questions, request.workers) == ([Question(INSTRUCTION, opening=True)], 0)


def test_a_submitted_job_uses_its_cluster(sample_video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert read_request([str(sample_video)]).workers == 1
    assert read_request([str(sample_video), "--workers", "0"]).workers == 0


def test_rays_copy_of_a_folder_is_no_place_for_results(
    sample_video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "working_dir_files" / "package"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(ConfigError, match="give --output an absolute path"):
        read_request([str(sample_video)])
    read_request([str(sample_video), "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("Narrate.", Question("Narrate.", opening=True)),
        ("Narrate.@0", Question("Narrate.", 0.0)),
        ("Who came?@12.5", Question("Who came?", 12.5)),
        ("Write to me@home", Question("Write to me@home", opening=True)),
        ("a@b@3", Question("a@b", 3.0)),
    ],
)
def test_a_question_may_have_a_time(text: str, question: Question) -> None:
    assert question_of(text) == question


def test_videos_keep_their_place_and_names_with_dots_stay_whole(tmp_path: Path) -> None:
    for name in ("in/a.b.mp4", "in/deep/c.MKV", "in/notes.txt", "in/c.subtitled.mp4", "d.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    tasks = find_tasks([tmp_path / "in", tmp_path / "d.mp4"], tmp_path / "out")
    assert [(task.video, task.file(".srt")) for task in tasks] == [
        (tmp_path / "in/a.b.mp4", tmp_path / "out/a.b.srt"),
        (tmp_path / "in/deep/c.MKV", tmp_path / "out/deep/c.srt"),
        (tmp_path / "d.mp4", tmp_path / "out/d.srt"),
    ]


def test_two_videos_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"a\.mkv and .*a\.mp4 would both be narrated in .*/out/a\.\*"):
        find_tasks([tmp_path], tmp_path / "out")


def test_subtitles_of_somebody_else_are_not_overwritten(samples: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.srt is no narration of ours"):
        find_tasks([samples], samples)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"a.vtt": "WEBVTT\n"}, "a.vtt"),
        ({"a.jsonl": '{"video": "a.mp4", "captions": []}\n', "a.srt": ""}, "a.jsonl"),
        ({"a.jsonl": "no JSON\n"}, "a.jsonl"),
        ({"a.jsonl": '"text"\n'}, "a.jsonl"),
    ],
)
def test_texts_beside_a_video_are_not_overwritten(files: dict[str, str], named: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=f"{re.escape(named)} is no narration of ours"):
        find_tasks([tmp_path], tmp_path)


@pytest.mark.parametrize("rows", ["", '{"video": "a.mp4", "time": 1.0, "role": "user", "text": "What?"}\n'])
def test_a_narration_of_ours_may_be_made_again(rows: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    for name, text in (("a.srt", ""), ("a.vtt", "WEBVTT\n"), ("a.jsonl", rows)):
        (tmp_path / name).write_text(text)
    assert len(find_tasks([tmp_path], tmp_path)) == 1


# Ray warns about its own settings when it copies them.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
def test_actors_of_a_cluster_share_the_videos(
    ray_cluster: None, narrate: Callable[..., int], samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    assert narrate(samples, tmp_path / "broken.mp4", "--workers", "1") == 1
    written = capsys.readouterr()
    assert "broken.mp4: not a readable video" in written.err
    assert "2 of 3 videos" in written.out
    assert len(list((tmp_path / "out").glob("*.jsonl"))) == 2


@pytest.mark.slow
@pytest.mark.beside
def test_the_embedded_default_narrates_a_sample(sample_video: Path, tmp_path: Path) -> None:
    arguments = [str(sample_video), "session.max_response_tokens=2", "session.fps=0.25", "--burn"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    suffixes = (".jsonl", ".srt", ".subtitled.mp4", ".vtt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{sample_video.stem}{suffix}" for suffix in suffixes]
    assert rows_of(tmp_path / f"{sample_video.stem}.jsonl")[0] == {
        "video": sample_video.name,
        "time": 0.0,
        "role": "user",
        "text": INSTRUCTION,
    }

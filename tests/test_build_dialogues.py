"""jobs.build_dialogues over a real Ray: which videos and texts become dialogues, and what is said of the others."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import av
import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from actors.config import Config, ConfigError
from actors.video import probe, read_frames
from actors.video_file import inspect
from jobs.annotations import AnnotationError, Moment, VideoAnnotation, read_annotations
from jobs.build_dialogues import build, build_video
from jobs.clock import frame_at
from jobs.dialogue_files import read_dialogues, read_provenance
from jobs.dialogue_sink import alone
from jobs.dialogues import SPLITS, DataConfig
from jobs.extents import frames_in
from jobs.provenance import code_version

# Ray Data warns of its own settings when it copies them.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")

MODEL = {"llm": "embedded", "vision": "embedded", "frames": {"resolution_px": 32}}


def write_clip(path: Path, seconds: int, rate: int = 5, codec: str = "mpeg4") -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = 32, 32
        for index in range(seconds * rate):
            pixels = np.full((32, 32, 3), index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_srt(path: Path, *texts: tuple[float, str]) -> Path:
    """A cue of half a second for every (time below a minute, text)."""
    cues = [f"{n}\n00:00:{t:06.3f} --> 00:00:{t + 0.5:06.3f}\n{text}\n" for n, (t, text) in enumerate(texts)]
    path.write_text("\n".join(cues))
    return path


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(4):
        write_clip(folder / f"clip{number}.mp4", seconds=6)
        write_srt(folder / f"clip{number}.srt", (0.4, "You start."), (number + 0.5, "You go on."), (5.5, "You stop."))
    return folder


def settings(videos: Path, out: Path, **data: object) -> Config:
    return Config({"model": MODEL, "annotations": {"paths": [str(videos)]}, "data": {"folder": str(out)} | data})


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_result_is_the_same_however_the_files_are_spread(videos: Path, tmp_path: Path) -> None:
    build(settings(videos, tmp_path / "one", validation_fraction=0.5))
    gathered = tmp_path / "gathered"
    gathered.mkdir()
    rows = [
        a.model_dump(include={"video", "video_id", "duration", "moments", "tasks"})
        for file in sorted(videos.glob("*.srt"), reverse=True)
        for a in read_annotations(file)
    ]
    (gathered / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(settings(gathered, tmp_path / "two", validation_fraction=0.5))
    for split in SPLITS:
        one, two = (read_dialogues(tmp_path / name / split) for name in ("one", "two"))
        assert one == two
        assert one
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "coverage.json",
        "quarantine.jsonl",
        "train",
        "validation",
    ]


def test_dialogues_written_by_hand_are_not_joined_by_others(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"out/train.jsonl holds dialogues already: remove it, or choose another"):
        build(settings(videos, tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_rows_and_files_say_what_they_were_made_from(videos: Path, tmp_path: Path) -> None:
    build(settings(videos, tmp_path / "out", validation_fraction=1, seed=7))
    files = sorted((tmp_path / "out" / "validation").iterdir())
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert rows
    for row in rows:
        assert Path(row["source"]).name == f"{row['video_id']}.srt"
        assert row["source_sha256"] == hashlib.sha256(Path(row["source"]).read_bytes()).hexdigest()
    for file in files:
        made_from = read_provenance(file)
        assert made_from["data"]["seed"] == 7
        assert made_from["code"] == code_version()
    [empty] = (tmp_path / "out" / "train").iterdir()
    assert pq.read_table(empty).num_rows == 0
    assert read_dialogues(tmp_path / "out" / "train") == []


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_videos_and_texts_that_cannot_be_used_are_reported(videos: Path, tmp_path: Path) -> None:
    (videos / "clip0.mp4").unlink()
    (videos / "clip1.mp4").write_bytes(b"no video")
    write_srt(videos / "clip2.srt", (1, "You start."), (30, "You are late."))
    write_srt(videos / "clip3.srt", (30, "You are late."))
    coverage = build(settings(videos, tmp_path / "out", validation_fraction=0))
    assert coverage.left_out.keys() == {"clip0", "clip1", "clip3"}
    assert str(videos / "clip0.mp4") in coverage.left_out["clip0"]
    assert coverage.texts_dropped == {"after the end of the video": 2}
    assert {d.video_id for d in read_dialogues(tmp_path / "out" / "train")} == {"clip2"}
    written = json.loads((tmp_path / "out" / "coverage.json").read_text())
    assert written["videos"] == {"annotated": 4, "used": 1, "left_out": coverage.left_out}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_all_bad_files_are_named_at_once_and_nothing_is_written(videos: Path, tmp_path: Path) -> None:
    for name in ("clip0.srt", "clip2.srt"):
        (videos / name).write_text("1\nnow --> later\ntext\n")
    with pytest.raises(AnnotationError, match=r"(?s)clip0.srt:2: .*clip2.srt:2: "):
        build(settings(videos, tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_video_annotated_twice_is_refused(videos: Path, tmp_path: Path) -> None:
    shutil.copy(videos / "clip0.srt", videos / "clip0.vtt")
    (videos / "clip0.vtt").write_text("WEBVTT\n\n00:01.000 --> 00:02.000\nAgain.\n")
    with pytest.raises(AnnotationError, match=r"'clip0' is annotated twice, in .*clip0.srt and .*clip0.vtt"):
        build(settings(videos, tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_no_dialogue_at_all_is_an_error_that_says_why(videos: Path, tmp_path: Path) -> None:
    for video in videos.glob("*.mp4"):
        video.unlink()
    with pytest.raises(ConfigError, match=r"no dialogue could be built from 4 annotated videos: .*clip0.mp4"):
        build(settings(videos, tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_what_a_model_writes_is_judged_kept_and_not_written_again(
    tiny_models: Path, videos: Path, tmp_path: Path
) -> None:
    """The tiny model babbles: nothing it writes is a chat."""
    config = settings(videos, tmp_path / "out", validation_fraction=0)
    texts = tmp_path / "texts"
    config.sections["annotations"]["conversations"] = 2
    config.sections["writer"] = {
        "backend": "transformers",
        "model": str(tiny_models / "llm_live1"),
        "dtype": "float32",
        "max_new_tokens": 12,
        "folder": str(texts),
        "cpus": 0.5,
    }
    coverage = build(config)
    assert coverage.quarantined.total() == 4 * 2
    assert coverage.left_out == {}
    rows = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert Counter(row["reason"] for row in rows) == coverage.quarantined
    assert all("You go on." in row["prompt"] for row in rows)
    assert json.loads((tmp_path / "out" / "coverage.json").read_text())["quarantined"] == dict(coverage.quarantined)
    kept = {path: path.stat().st_mtime_ns for path in texts.rglob("*.json")}
    assert 1 <= len(kept) <= 4 * 2
    first = read_dialogues(tmp_path / "out" / "train")
    build(config)
    assert {path: path.stat().st_mtime_ns for path in texts.rglob("*.json")} == kept
    assert read_dialogues(tmp_path / "out" / "train") == first


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_after_kill_9_another_run_gives_the_rows_of_an_undisturbed_one(videos: Path, tmp_path: Path) -> None:
    """Of several hundred rows over the same clip some are written when it happens, and most are not."""
    moments = [{"time": 0.5, "text": "You start."}, {"time": 3, "text": "You go on."}]
    rows = [{"video": str(videos / "clip0.mp4"), "video_id": f"clip{n}", "moments": moments} for n in range(8 * 64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, out = settings(tmp_path / "rows.jsonl", tmp_path / "out", validation_fraction=0.3), tmp_path / "out"
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(config.sections))
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}  # another cluster takes long
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "jobs.build_dialogues", str(file)]
        program = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 200
            while not any(out.glob(".train.part-*/*.parquet")):
                assert program.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, "nothing is written"
                time.sleep(0.01)
        finally:
            program.kill()
            program.wait()
    assert not (out / "train").exists()
    build(config)
    build(settings(tmp_path / "rows.jsonl", tmp_path / "undisturbed", validation_fraction=0.3))
    for split in SPLITS:
        built, undisturbed = (read_dialogues(folder / split) for folder in (out, tmp_path / "undisturbed"))
        assert built == undisturbed
        assert len({dialogue.dialogue_id for dialogue in built}) == len(built) > 0
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "undisturbed").iterdir()}
    one, two = (json.loads((folder / "coverage.json").read_text()) for folder in (out, tmp_path / "undisturbed"))
    assert one["dialogues"] == two["dialogues"]
    assert one["videos"] == two["videos"] == {"annotated": len(rows), "used": len(rows), "left_out": {}}


def test_what_a_killed_run_left_behind_is_cleared_and_no_two_write_at_once(tmp_path: Path) -> None:
    for name in (".train.part-x", ".quarantine-y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part-00000.parquet").touch()
    (tmp_path / ".coverage.json.part-1").touch()
    (tmp_path / "train").mkdir()
    with alone(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["train"]
        with pytest.raises(ConfigError, match="another program is writing dialogues"), alone(tmp_path):
            pass
    with alone(tmp_path):
        pass


def test_a_chat_generated_elsewhere_that_is_of_no_use_is_quarantined_with_its_words(videos: Path) -> None:
    moments = (Moment(time=1, text="What now?", role="user"), Moment(time=1, text="Cut the onion."))
    row = VideoAnnotation(
        video_id="clip0", video=str(videos / "clip0.mp4"), moments=moments, source="chat.json", kind="generated_chat"
    )
    result = build_video(row, DataConfig(), "Be brief.")
    assert not result.dialogues
    [bad] = result.quarantined
    assert bad.reason == "lasts less than 60 s"
    assert bad.text == "1.00s User: What now?\n1.00s Assistant: Cut the onion."


def test_a_video_behind_a_url_is_looked_at_there(videos: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/films/clip.mp4", (videos / "clip0.mp4").read_bytes())
    moments = [{"time": 0.5, "text": "You start."}, {"time": 30, "text": "Too late."}]
    rows = [{"video": f"memory://films/{name}.mp4", "moments": moments} for name in ("clip", "gone")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    there, gone = (build_video(row, DataConfig(), "Be brief.") for row in read_annotations(tmp_path / "rows.jsonl"))
    assert [dialogue.video for dialogue in there.dialogues] == ["memory://films/clip.mp4"]
    assert there.texts_dropped == {"after the end of the video": 1}
    assert "memory://films/gone.mp4 cannot be fetched" in str(gone.left_out)


@pytest.mark.parametrize("fps", [1, 2, 3, 5, 29.97])
def test_a_text_follows_a_frame_that_the_video_has(videos: Path, fps: float) -> None:
    (annotation,) = read_annotations(videos / "clip3.srt")
    (dialogue,) = build_video(annotation, DataConfig(fps=fps), "Be brief.").dialogues
    frames = [frame.time for frame in read_frames(annotation.video, fps, 32, "pad")]
    assert dialogue.frames[1] <= len(frames)
    assert frames[dialogue.frames[0]] >= 0.4 - 1e-9
    assert dialogue.frames[0] == frame_at(0.4, fps)


@pytest.mark.parametrize("fps", [1, 2, 3.5, 5, 10, 25, 29.97, 60])
@pytest.mark.parametrize("rate", [5, 8, 24])
def test_no_frame_is_promised_that_the_video_has_not(tmp_path: Path, fps: float, rate: int) -> None:
    path = write_clip(tmp_path / "clip.mp4", seconds=2, rate=rate)
    there = sum(1 for _ in read_frames(path, fps, 32, "pad"))
    assert there - 1 <= frames_in(probe(path), fps) <= there


def test_a_video_whose_packets_carry_no_times_has_frames_at_its_own_rate(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.h264", seconds=2, codec="libx264")
    assert inspect(path).timeline is None
    assert (probe(path).duration, probe(path).fps) == (2.0, 5.0)
    assert frames_in(probe(path), 2) == sum(1 for _ in read_frames(path, 2, 32, "pad")) == 4


@pytest.mark.parametrize("size", [200_000, 310_007, 420_013, 555_555])
def test_of_a_file_that_was_cut_no_frame_is_promised_that_cannot_be_decoded(
    samples: Path, tmp_path: Path, size: int
) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes((samples / "hands_and_objects.mp4").read_bytes()[:size])
    there = sum(1 for _ in read_frames(path, 15, 32, "pad"))
    assert there - 5 <= frames_in(probe(path), 15) <= there

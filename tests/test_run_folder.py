"""A run's files on a disk and in a storage without appending or renaming."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow.fs
import pytest

from actors.remote import RemoteError
from jobs.learner import Step
from jobs.run_folder import RunFolder
from jobs.training_log import CURVES_FILE, TrainingLog, plot_log, read_log


@pytest.fixture(params=["disk", "memory", "file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunFolder]:
    urls = {"disk": str(tmp_path / "runs"), "memory": "memory://bucket/runs", "file": f"file://{tmp_path}/runs"}
    yield RunFolder(f"{urls[request.param]}/one")
    memory = fsspec.filesystem("memory")
    if memory.exists("/bucket"):
        memory.rm("/bucket", recursive=True)


def step(number: int, loss: float = 2.0) -> Step:
    return Step(number, loss, loss, None, 10, 0, 200, 1, 1e-3, 0.5)


def test_what_is_written_is_read_whole(folder: RunFolder) -> None:
    assert not folder.exists("a/b.txt")
    folder.write("a/b.txt", "one")
    folder.write("a/b.txt", "two")
    assert folder.read("a/b.txt") == "two"
    folder.remove("a/b.txt")
    folder.remove("a/b.txt")
    assert not folder.exists("a/b.txt")


def test_folders_arrive_with_the_file_that_makes_them_complete_last(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("settings.json", "weights/x.safetensors", "z.txt"):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_text(name)
    put, arrived = folder.files.put_file, []
    monkeypatch.setattr(folder.files, "put_file", lambda source, to: (arrived.append(to), put(source, to)))
    folder.put(tmp_path / "source", "checkpoint", last="settings.json")
    assert len(arrived) == 3
    assert arrived[-1].endswith("checkpoint/settings.json")
    assert folder.read("checkpoint/weights/x.safetensors") == "weights/x.safetensors"


def test_ray_gets_the_same_files(folder: RunFolder) -> None:
    folder.write("note.txt", "here")
    path, files = folder.for_ray()
    with (files or pyarrow.fs.LocalFileSystem()).open_input_stream(f"{path}/note.txt") as stream:
        assert stream.read() == b"here"


def test_a_log_takes_back_the_steps_that_are_repeated(folder: RunFolder) -> None:
    with TrainingLog(folder, 0, 4) as log:
        for number in range(3):
            log.add(step(number))
        log.add_validation(3, {"loss": 1.5, "time_diff": None})
    with TrainingLog(folder, 2, 4) as log:
        log.add(step(2, loss=1.0))
        log.add(step(3, loss=1.0))
    records = read_log(folder)
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert [record["loss"] for record in records] == [2, 2, 1, 1]
    plot_log(folder)
    assert folder.exists(CURVES_FILE)
    assert folder.files.ls(f"{folder.path}/tensorboard")


def test_a_scheme_that_nobody_reads_is_refused() -> None:
    with pytest.raises(RemoteError, match="nowhere://"):
        RunFolder("nowhere://bucket/run")

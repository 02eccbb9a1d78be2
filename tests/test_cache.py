import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.cache import CacheError, build_once, cache_folder, whole_folder, write_whole

SLOW_BUILD = """
import pathlib, sys, time
from actors.cache import build_once
def build(folder):
    (folder / "half").write_text("half")
    print("building", flush=True)
    time.sleep(60)
build_once("thing", build)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VIDEOLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_was_built_is_not_built_again():
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "file").write_text("content")

    assert build_once("thing", build) == build_once("thing", build) == cache_folder() / "thing"
    assert len(built) == 1
    assert (cache_folder() / "thing" / "file").read_text() == "content"


def test_a_failed_build_leaves_nothing_and_the_next_one_succeeds(cache: Path):
    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise ValueError("no luck")

    with pytest.raises(ValueError, match="no luck"):
        build_once("thing", fail)
    assert [path.name for path in cache.iterdir()] == [".thing.lock"]
    assert build_once("thing", lambda folder: (folder / "file").touch()).is_dir()


def test_two_that_start_at_once_build_once():
    built = []
    started = threading.Barrier(2)
    results = []

    def run() -> None:
        started.wait()
        results.append(build_once("thing", lambda folder: built.append(folder)))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(built) == 1
    assert results == [cache_folder() / "thing"] * 2


def test_what_a_killed_process_left_is_cleared_and_built_again(cache: Path):
    process = subprocess.Popen([sys.executable, "-c", SLOW_BUILD], stdout=subprocess.PIPE, env=os.environ)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"building\n"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert list(cache.glob(".thing.part-*"))
    folder = build_once("thing", lambda folder: (folder / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert not list(cache.glob(".thing.part-*"))


def test_a_cache_that_cannot_be_written_says_which_variable_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VIDEOLLM_CACHE", str(tmp_path / "file" / "inside"))
    with pytest.raises(CacheError, match="set VIDEOLLM_CACHE"):
        cache_folder()


def test_a_folder_is_replaced_whole_or_kept(tmp_path: Path):
    target = tmp_path / "target"
    for content in ("old", "new"):
        with whole_folder(target) as part:
            (part / content).touch()
        assert [path.name for path in target.iterdir()] == [content]
    with pytest.raises(RuntimeError, match="interrupted"):
        write_half(target)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def write_half(target: Path) -> None:
    with whole_folder(target) as part:
        (part / "newest").touch()
        raise RuntimeError("interrupted")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken() -> Iterator[str]:
        yield "half "
        raise ValueError("no more")

    file = tmp_path / "told.txt"
    write_whole(file, ["gräm", "mar\n"])
    with pytest.raises(ValueError, match="no more"):
        write_whole(file, broken())
    assert file.read_bytes() == "grämmar\n".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["told.txt"]

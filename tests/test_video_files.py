"""Which videos a setting means, on this machine and behind URLs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from actors.config import ConfigError
from actors.remote import RemoteError
from jobs.dialogue_files import DialogueFileError, to_line
from jobs.dialogues import Dialogue
from jobs.remote_files import local_copy
from jobs.video_files import find_videos


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address a web server on this machine shows it at."""
    folder = tmp_path / "served"
    (folder / "deep").mkdir(parents=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_videos_come_from_folders_files_lists_and_dialogues(tmp_path: Path) -> None:
    for name in ("a.mp4", "deep/b.MKV", "deep/notes.srt"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).touch()
    (tmp_path / "list.txt").write_text("c.mp4\n\n/abs/d.mp4\n")
    dialogue = Dialogue(
        dialogue_id="1", task="narration", video_id="e", video="/abs/e.mp4", fps=2.0, frames=(0, 0), conversation=()
    )
    (tmp_path / "dialogues.jsonl").write_text(2 * to_line(dialogue))
    sources = ("folder", "list.txt", "dialogues.jsonl", "f.mp4")
    assert find_videos([str(tmp_path / source) for source in sources], tmp_path) == {
        "a": str(tmp_path / "folder/a.mp4"),
        "b": str(tmp_path / "folder/deep/b.MKV"),
        "c": str(tmp_path / "c.mp4"),
        "d": "/abs/d.mp4",
        "e": "/abs/e.mp4",
        "f": str(tmp_path / "f.mp4"),
    }


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_that_somebody_wrote_by_hand_may_be_alone(split: str, tmp_path: Path) -> None:
    dialogue = Dialogue(
        dialogue_id="1", task="narration", video_id="e", video="/abs/e.mp4", fps=2.0, frames=(0, 0), conversation=()
    )
    (tmp_path / f"{split}.jsonl").write_text(to_line(dialogue))
    assert find_videos([], tmp_path) == {"e": "/abs/e.mp4"}


def test_two_videos_of_one_id_are_refused(tmp_path: Path) -> None:
    videos = [str(tmp_path / "a" / "x.mp4"), str(tmp_path / "b" / "x.mp4")]
    with pytest.raises(ConfigError, match=r"two videos have the id 'x': .*a/x\.mp4 and .*b/x\.mp4"):
        find_videos(videos, tmp_path)


def test_no_video_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no video in .*set store\.videos"):
        find_videos([str(tmp_path)], tmp_path)


def test_videos_come_from_patterns(tmp_path: Path) -> None:
    for name in ("a/one.mp4", "a/two.mp4", "a/one.srt", "b/c/three.webm"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(find_videos([str(tmp_path / "a" / "o*")], tmp_path)) == ["one"]
    assert list(find_videos([str(tmp_path / "**" / "*.[mw]*")], tmp_path)) == ["one", "three", "two"]


def test_videos_come_from_web_servers(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = served
    for name in ("a.mp4", "notes.txt", "deep/b.webm"):
        (folder / name).write_bytes(name.encode())
    (tmp_path / "list.txt").write_text(f"{address}/a.mp4\n")
    assert find_videos([f"{address}/"], tmp_path) == {"a": f"{address}/a.mp4", "b": f"{address}/deep/b.webm"}
    assert find_videos([str(tmp_path / "list.txt")], tmp_path) == {"a": f"{address}/a.mp4"}
    with local_copy(f"{address}/deep/b.webm", str(tmp_path)) as copy:
        assert copy.read_bytes() == b"deep/b.webm"
        assert copy.suffix == ".webm"
    assert not copy.exists()
    with (
        pytest.raises(RemoteError, match=r"/gone.mp4 cannot be fetched: .*gone.mp4"),
        local_copy(f"{address}/gone.mp4"),
    ):
        pass


def test_videos_come_from_any_file_system_of_fsspec(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("/shelf/a.mp4", "/shelf/deep/b.mp4", "/shelf/deep/b.srt"):
        memory.pipe(name, name.encode())
    assert list(find_videos(["memory://shelf"], tmp_path)) == ["a", "b"]
    found = find_videos(["memory://shelf/*/*.mp4"], tmp_path)
    assert found == {"b": "memory://shelf/deep/b.mp4"}
    with local_copy(found["b"]) as copy:
        assert copy.read_bytes() == b"/shelf/deep/b.mp4"


@pytest.mark.parametrize("url", ["nobody://knows/this/", "memory://nothing_here"])
def test_a_url_with_nothing_behind_it_is_an_error_that_names_it(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"store.videos: {url}"):
        find_videos([url], tmp_path)


def test_a_signed_url_is_a_video_by_its_path(tmp_path: Path) -> None:
    signed = "https://bucket.example/deep/one.mp4?X-Amz-Signature=a%2Fb&x=[1]*"
    (tmp_path / "list.txt").write_text(f"{signed}\n")
    for source in (signed, str(tmp_path / "list.txt")):
        assert find_videos([source], tmp_path) == {"one": signed}


def test_dialogues_of_two_videos_with_one_id_are_refused(tmp_path: Path) -> None:
    lines = [
        to_line(
            Dialogue(
                dialogue_id=f"d-{at}",
                task="t",
                video_id="1",
                video=f"{at}/1.mp4",
                fps=2,
                frames=(0, 0),
                conversation=(),
            )
        )
        for at in ("A", "B")
    ]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    with pytest.raises(DialogueFileError, match=r"two videos have the id '1', A/1.mp4 and B/1.mp4: rename one"):
        find_videos([], tmp_path)

"""The frame-token store: slices are what was written, and nothing half-written is ever seen."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs import frame_store
from jobs.frame_store import ROWS_PER_GROUP, FrameStore, StoreError, StoreInfo

INFO = StoreInfo(fingerprint="siglip/384px/cls+3x3/ab12", vision="siglip", fps=2.0, num_tokens=3, width=4)
COUNT = 3 * ROWS_PER_GROUP + 7


def numbered(count: int) -> torch.Tensor:
    """Tokens (count, 3, 4) that tell their frame."""
    return torch.arange(count, dtype=torch.float16).view(-1, 1, 1).expand(-1, 3, 4).contiguous()


def write(store: FrameStore, video_id: str, count: int, batch: int = 10) -> None:
    with store.locked(), store.writer(video_id, source=f"/videos/{video_id}.mp4") as writer:
        for start in range(0, count, batch):
            stop = min(start + batch, count)
            writer.append([seq / 2 for seq in range(start, stop)], numbered(count)[start:stop])
        writer.commit()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FrameStore:
    store = FrameStore.create(tmp_path_factory.mktemp("store"), INFO)
    write(store, "film", COUNT)
    return store


@given(st.data())
def test_any_slice_is_what_was_written(store: FrameStore, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, COUNT))
    stop = data.draw(st.integers(start, COUNT))
    assert torch.equal(store.frames("film", start, stop), numbered(COUNT)[start:stop])
    assert np.array_equal(store.times("film", start, stop), np.arange(start, stop) / 2)


def test_a_video_is_found_again_by_another_process(store: FrameStore) -> None:
    store.frames("film", 0, 1)
    reader = pickle.loads(pickle.dumps(FrameStore.open(store.path)))
    assert reader.info == INFO
    assert reader.video_ids() == ["film"]
    assert reader.num_frames("film") == COUNT
    assert reader.source("film") == "/videos/film.mp4"
    assert torch.equal(reader.frames("film"), numbered(COUNT))


def test_of_many_videos_only_some_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_store, "OPEN_FILES", 3)
    store = FrameStore.create(tmp_path / "store", INFO)
    names = [f"{number}" for number in range(8)]
    for name in names:
        write(store, name, 2)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name in [*names, *names]:
        assert store.source(name) == f"/videos/{name}.mp4"
        assert torch.equal(store.frames(name), numbered(2))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3


def test_tokens_may_be_changed_without_changing_the_store(store: FrameStore) -> None:
    store.frames("film", 3, 4).zero_()
    assert store.frames("film", 3, 4)[0, 0, 0] == 3


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (5, 4), (0, COUNT + 1)])
def test_frames_that_are_not_there_are_an_error(store: FrameStore, start: int, stop: int) -> None:
    with pytest.raises(
        StoreError, match=f"frames {start}..{stop} of video 'film' were asked for, the store has {COUNT}"
    ):
        store.frames("film", start, stop)


def test_a_video_that_is_not_there_is_an_error(store: FrameStore) -> None:
    with pytest.raises(StoreError, match="'other' is not in the frame-token store"):
        store.num_frames("other")


@pytest.mark.parametrize("video_id", ["a/b", "..", ".hidden", "späte Züge 50%", "x.parquet"])
def test_any_video_id_names_a_file_inside_the_store(tmp_path: Path, video_id: str) -> None:
    store = FrameStore.create(tmp_path, INFO)
    write(store, video_id, 2)
    assert store.video_ids() == [video_id]
    assert video_id in store
    assert [path.parent for path in tmp_path.rglob("*.parquet")] == [tmp_path / "videos"]


def test_an_unfinished_video_is_not_seen_and_cleared_by_the_next_writer(tmp_path: Path) -> None:
    store = FrameStore.create(tmp_path, INFO)
    writer = store.writer("film")
    writer.append([0.0], numbered(1))  # and then the program is killed
    assert store.video_ids() == []
    assert "film" not in store
    with store.locked():
        assert list((tmp_path / "videos").iterdir()) == []


def test_what_was_not_committed_is_gone(tmp_path: Path) -> None:
    store = FrameStore.create(tmp_path, INFO)
    with store.writer("film") as writer:
        writer.append([0.0], numbered(1))
    assert list((tmp_path / "videos").iterdir()) == []


def test_two_programs_do_not_write_at_once(tmp_path: Path) -> None:
    store = FrameStore.create(tmp_path, INFO)
    other = FrameStore.open(tmp_path)
    with store.locked(), pytest.raises(StoreError, match="another program is writing"), other.locked():
        pass
    with other.locked():
        pass


def test_a_video_without_frames_is_refused(tmp_path: Path) -> None:
    with FrameStore.create(tmp_path, INFO).writer("film") as writer, pytest.raises(StoreError, match="has no frame"):
        writer.commit()


@pytest.mark.parametrize("tokens", [torch.zeros(1, 3, 4), torch.zeros(1, 4, 3, dtype=torch.float16), numbered(2)])
def test_tokens_of_another_form_are_refused(tmp_path: Path, tokens: torch.Tensor) -> None:
    with (
        FrameStore.create(tmp_path, INFO).writer("film") as writer,
        pytest.raises(StoreError, match=r"the store takes float16 \[1, 3, 4\]"),
    ):
        writer.append([0.0], tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fps": 4.0}, r"fps 2\.0, not 4\.0"),
        ({"fingerprint": "clip/224px/cls/cd34"}, "fingerprint siglip/384px/cls.3x3/ab12, not clip/224px/cls/cd34"),
        ({"num_tokens": 1}, "num_tokens 3, not 1"),
    ],
)
def test_a_store_made_in_another_way_is_not_added_to(tmp_path: Path, change: dict[str, object], message: str) -> None:
    FrameStore.create(tmp_path, INFO)
    with pytest.raises(StoreError, match=message):
        FrameStore.create(tmp_path, INFO.model_copy(update=change))


def test_a_store_is_added_to_wherever_its_encoder_lies(tmp_path: Path) -> None:
    FrameStore.create(tmp_path, INFO)
    assert FrameStore.create(tmp_path, INFO.model_copy(update={"vision": "/elsewhere/siglip"})).info == INFO


def test_tokens_of_another_encoder_are_not_read(store: FrameStore) -> None:
    with pytest.raises(
        StoreError, match=r"come from 'siglip/384px/cls.3x3/ab12', the model expects 'clip/224px/cls/cd34'"
    ):
        FrameStore.open(store.path, expect_fingerprint="clip/224px/cls/cd34")


def test_a_folder_that_is_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is no frame-token store .*run jobs.encode_frames"):
        FrameStore.open(tmp_path)
    (tmp_path / "store.json").write_text('{"version": 2}')
    with pytest.raises(StoreError, match="does not describe a frame-token store of version 1"):
        FrameStore.open(tmp_path)


@pytest.mark.parametrize("video_id", ["ж" * 120, "見" * 80, "a/б%" * 25])
def test_a_long_name_in_any_script_is_stored(tmp_path: Path, video_id: str) -> None:
    store = FrameStore.create(tmp_path / "s", INFO)
    write(store, video_id, 1)
    assert video_id in store
    assert store.video_ids() == [video_id]
    assert store.num_frames(video_id) == 1


def test_a_name_too_long_for_any_file_is_refused(tmp_path: Path) -> None:
    store = FrameStore.create(tmp_path / "s", INFO)
    with pytest.raises(
        StoreError, match=r"makes a file name of 300 bytes, at most 2\d\d are possible: rename the video"
    ):
        write(store, "x" * 300, 1)

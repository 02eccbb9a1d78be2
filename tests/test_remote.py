"""Models behind URLs: copied once, copied anew when they change, never half, and refused in words."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from actors import checkpoint, remote
from actors.remote import RemoteError, file_system, remote_folder
from actors.weights import WeightsError, weights_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("VIDEOLLM_CACHE", str(folder))
    return folder


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    folder = tmp_path / "bucket" / "model"
    folder.mkdir(parents=True)
    save_file({"w": torch.ones(4)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "learner.pt").write_text("pickled")
    return folder


def test_a_folder_behind_a_url_is_copied_once_without_what_is_not_asked_for(
    bucket: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = weights_folder(f"file://{bucket}")
    assert folder.parent == cache
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    monkeypatch.setattr(remote.shutil, "copyfileobj", lambda *_: pytest.fail("copied again"))
    assert weights_folder(f"file://{bucket}/") == folder


def test_a_folder_that_changed_is_copied_anew(bucket: Path) -> None:
    old = weights_folder(f"file://{bucket}")
    (bucket / "config.json").write_text('{"new": true}')
    new = weights_folder(f"file://{bucket}")
    assert new != old
    assert (new / "config.json").read_text() == '{"new": true}'


def test_a_copy_that_breaks_off_leaves_nothing(bucket: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ConnectionResetError("reset by peer")

    with monkeypatch.context() as patched:
        patched.setattr(remote.shutil, "copyfileobj", broken)
        with pytest.raises(WeightsError, match=r"bucket/model/\w+\.\w+ cannot be fetched: reset by peer"):
            weights_folder(f"file://{bucket}")
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    assert weights_folder(f"file://{bucket}").is_dir()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://nothing/there", "memory://nothing/there"),
        ("nonsense://bucket/model", "nonsense://bucket/model: "),
        ("file:///no/such/folder", "file:///no/such/folder cannot be listed: "),
    ],
)
def test_what_cannot_be_read_is_named(url: str, said: str) -> None:
    with pytest.raises(WeightsError) as error:
        weights_folder(url)
    assert said in str(error.value)


def test_a_folder_without_weights_is_refused() -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/notes/readme.md", b"nothing")
    with pytest.raises(RemoteError, match=r"no file in it that is one of \*\.safetensors"):
        remote_folder("memory://notes", ["*.safetensors"])


def test_object_stores_are_read_without_further_packages() -> None:
    for url in ("s3://bucket/runs?region=eu-central-1", "gs://anonymous@bucket/runs", "gcs://anonymous@bucket/runs"):
        _, path = file_system(url)
        assert path == "bucket/runs"


def test_a_checkpoint_behind_a_url_is_the_checkpoint(tiny_checkpoint: Path) -> None:
    here, there = checkpoint.load(tiny_checkpoint), checkpoint.load(f"file://{tiny_checkpoint}")
    assert there.fingerprint == here.fingerprint
    assert there.trained_videos == here.trained_videos

import os
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import save_file

from actors import weights
from actors.config import FrameConfig
from actors.weights import WeightsError, check_safetensors, digest, feature_fingerprint, weights_folder


def write(path: Path, value: float = 1.0) -> Path:
    save_file({"w": torch.full((4,), value)}, path)
    return path


def hub_error(kind: type[Exception], status: int) -> Exception:
    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/org/model"))
    return kind("refused", response=response)


def test_a_folder_is_taken_as_it_is(tmp_path: Path):
    write(tmp_path / "model.safetensors")
    assert weights_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/.no-such-folder"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(WeightsError, match="is no folder"):
        weights_folder(name)


def test_pickled_weights_are_refused(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(WeightsError, match=r"only pickled weights \(pytorch_model.bin\).*expected \*.safetensors"):
        weights_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        (GatedRepoError, 403, "org/model is a gated model: accept its licence .* set HF_TOKEN"),
        (RepositoryNotFoundError, 404, "org/model is neither a folder here nor a model on the hub"),
    ],
)
def test_what_the_hub_refuses_is_explained(
    kind: type[Exception], status: int, message: str, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object, **__: object) -> str:
        raise hub_error(kind, status)

    monkeypatch.setattr(weights, "snapshot_download", refuse)
    with pytest.raises(WeightsError, match=message):
        weights_folder("org/model")


def test_offline_a_hub_name_says_so():
    with pytest.raises(WeightsError, match="org/model is no folder here and cannot be fetched"):
        weights_folder("org/model")


def test_a_digest_follows_the_bytes_and_not_the_place(tmp_path: Path):
    folders = [tmp_path / name for name in "abc"]
    for folder, value in zip(folders, (1.0, 1.0, 2.0), strict=True):
        folder.mkdir()
        write(folder / "model.safetensors", value)
    one, same, other = map(digest, folders)
    assert one == same != other


def test_a_large_file_is_read_again_only_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VIDEOLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "_NOTED_BYTES", 0)
    file = write(tmp_path / "model.safetensors")
    before = digest(tmp_path)
    read = []
    real = weights._read_digest
    monkeypatch.setattr(weights, "_read_digest", lambda path: read.append(path) or real(path))
    assert digest(tmp_path) == before
    assert not read
    write(file, 2.0)
    os.utime(file, ns=(1, 1))
    assert digest(tmp_path) != before
    assert read == [file]


def test_a_note_that_was_cut_off_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VIDEOLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "_NOTED_BYTES", 0)
    write(tmp_path / "model.safetensors")
    before = digest(tmp_path)
    (note,) = (tmp_path / "cache" / "digests").iterdir()
    note.write_text("{")
    assert digest(tmp_path) == before


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", "truncated"])
def test_what_is_no_safetensors_file_is_refused(content: bytes | str, tmp_path: Path):
    file = write(tmp_path / "model.safetensors")
    file.write_bytes(file.read_bytes()[:-3] if isinstance(content, str) else content)
    with pytest.raises(WeightsError, match="no complete safetensors file"):
        check_safetensors(file)


def test_a_feature_fingerprint_names_what_frame_tokens_depend_on():
    frames = FrameConfig(resolution_px=384, pooled=(3, 3), separator=",")
    assert feature_fingerprint("google/siglip-large-patch16-384", "1a2b", frames) == (
        "siglip-large-patch16-384/384px/cls+3x3/1a2b"
    )
    other_text = frames.model_copy(update={"separator": ";"})
    assert feature_fingerprint("a", "1", frames) == feature_fingerprint("a", "1", other_text)

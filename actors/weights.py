"""Where weights come from and which ones they are.

A model is named by a folder, a URL of one, or a hub name; any becomes a local folder of safetensors. Its digest says
which weights they are, and goes into the fingerprints by which frame-token stores, checkpoints and
replicas recognise each other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open

from actors.cache import cache_folder, write_whole
from actors.config import FrameConfig
from actors.remote import RemoteError, is_remote, remote_folder

_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model"]
_NOTED_BYTES = 50_000_000  # below, reading the file is as quick as reading the note
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class WeightsError(ValueError):
    """Weights cannot be found or must not be read; says what was found and what is expected."""


def weights_folder(name: str) -> Path:
    """The local folder of a model named by folder, URL or hub name; of the latter two a copy in a cache.

    Raises WeightsError for a name that is none of them, a gated model without a token, and pickled weights.
    """
    if is_remote(name):
        folder = _from_url(name)
    elif not (folder := Path(name).expanduser()).is_dir():
        if folder.is_absolute() or name.startswith((".", "~")):
            raise WeightsError(
                f"{name} is no folder: give a folder, a URL, a hub name such as org/model, or 'embedded'"
            )
        folder = _from_hub(name)
    weight_files(folder)
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, sorted by name. Raises WeightsError if there is none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        found = f"only pickled weights ({', '.join(pickled)}), which are never read" if pickled else "no weights"
        raise WeightsError(f"{folder} holds {found}; expected *.safetensors: convert or download them in that form")
    return files


def digest(folder: Path) -> str:
    """16 hex digits that change with any byte of the folder's safetensors files.

    A large file's share is noted in the cache folder under its path, size and time of change, so that
    gigabytes are read once.
    """
    return combine(f"{path.name} {_file_digest(path)}" for path in weight_files(folder))


def combine(parts: Iterable[str]) -> str:
    """One digest for several strings, in their order."""
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def feature_fingerprint(vision: str, weights: str, frames: FrameConfig) -> str:
    """What a frame token store, a checkpoint and an encoder must agree on, readable in an error message.

    `vision` is the encoder's name, `weights` its digest. The separator is text, not part of a frame's tokens.
    """
    grid = "x".join(map(str, frames.pooled)) if frames.pooled else ""
    tokens = "+".join(part for part in ("cls" if frames.cls else "", grid) if part)
    fit = "" if frames.fit == "pad" else f"-{frames.fit}"
    return f"{Path(vision).name}/{frames.resolution_px}px{fit}/{tokens}/{weights}"


def check_safetensors(path: Path) -> None:
    """Raises WeightsError if the file is missing, truncated or something else under that name."""
    if not path.is_file():
        raise WeightsError(f"{path} is missing, expected a safetensors file")
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} ({path.stat().st_size} bytes) is no complete safetensors file ({error}): copy or save it again"
        ) from None


def _from_url(url: str) -> Path:
    try:
        return remote_folder(url, _WANTED)
    except RemoteError as error:
        raise WeightsError(str(error)) from None


def _from_hub(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except GatedRepoError:
        raise WeightsError(
            f"{name} is a gated model: accept its licence at https://huggingface.co/{name} and set HF_TOKEN to a "
            "token of that account, or give a folder that holds the model"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise WeightsError(
            f"{name} is neither a folder here nor a model on the hub: give a folder, a hub name, or 'embedded'"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise WeightsError(
            f"{name} is no folder here and cannot be fetched from the hub ({type(error).__name__}, HF_HUB_OFFLINE="
            f"{os.environ.get('HF_HUB_OFFLINE', '0')}): give a folder, or go online for the first use"
        ) from None


def _file_digest(path: Path) -> str:
    check_safetensors(path)
    path = path.resolve()
    state = path.stat()
    if state.st_size < _NOTED_BYTES:
        return _read_digest(path)
    key = f"{path} {state.st_size} {state.st_mtime_ns}"
    note = cache_folder() / "digests" / f"{combine([str(path)])}.json"
    try:
        kept = json.loads(note.read_text())
        if kept["key"] == key:
            return str(kept["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never noted, or half of it: read the file itself
    value = _read_digest(path)
    note.parent.mkdir(exist_ok=True)
    write_whole(note, [json.dumps({"key": key, "digest": value})])
    return value


def _read_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

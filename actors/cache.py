"""Files and folders that are written whole or not at all, and the one place for weights derived once.

Converted weights (the embedded LLM, a folded vision encoder) are built on first use and read by every
process after that. Several processes may start at once and any of them may be killed half-way: a folder
appears under its name only when it is complete, one process builds while the others wait on a file lock,
and what a killed one left behind is cleared by the next.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

log = logging.getLogger(__name__)


class CacheError(RuntimeError):
    """The cache folder cannot be used; says which and how to choose another."""


def cache_folder() -> Path:
    """Where derived weights are kept: $VIDEOLLM_CACHE, else ~/.cache/videollm-online. Raises CacheError."""
    folder = Path(os.environ.get("VIDEOLLM_CACHE") or "~/.cache/videollm-online").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(
            f"cache folder {folder} cannot be made ({error}): set VIDEOLLM_CACHE to a writable folder"
        ) from None
    return folder


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The cached folder `name`; `build(folder)` fills it if no process has done so before.

    `name` must change whenever what `build` writes changes. An exception of `build` leaves no trace
    and reaches the caller; the next caller builds again.
    """
    target = cache_folder() / name
    if target.is_dir():
        return target
    with _locked(target.with_name(f".{name}.lock")):
        if not target.is_dir():
            for stale in target.parent.glob(f".{name}.part-*"):
                shutil.rmtree(stale, ignore_errors=True)
            with whole_folder(target) as part:
                build(part)
    return target


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends and vanishes when it raises.

    An existing `target` is replaced by two renames: a reader finds the old folder or the new one, whole, and
    only between the two none.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
    try:
        yield part
        part.chmod(0o755)  # mkdtemp's 0700 would hide it from other users of a shared folder
        for file in part.rglob("*"):
            _flush(file)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
            os.replace(target, old / "old")
            os.replace(part, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(part, target)
        _flush(target.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_whole(path: Path, parts: Iterable[str]) -> None:
    """Write a text file, in UTF-8, whole or not at all: a reader finds the old one or the new one.

    Exceptions of `parts`, and OSError, leave no trace; a killed process leaves `.NAME.part-...` beside it.
    """
    part = path.with_name(f".{path.name}.part-{os.getpid()}-{threading.get_ident()}")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.writelines(parts)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def try_lock(handle: int) -> bool:
    """Take the advisory lock of an open file or folder unless another process has it; whether it was taken.

    The kernel drops it when the file is closed or its process dies, however it dies.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def alone_in(folder: Path, refusal: Exception) -> Iterator[None]:
    """The lock of a folder, which is made if it is not there. Raises `refusal` while another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not try_lock(handle):
            raise refusal
        yield
    finally:
        os.close(handle)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock; wait for it."""
    try:
        file: TextIO = path.open("w")
    except OSError as error:
        raise CacheError(
            f"lock file {path} cannot be opened ({error}): set VIDEOLLM_CACHE to a writable folder"
        ) from None
    with file:
        if not try_lock(file.fileno()):
            log.info("waiting for another process to finish %s", path.stem.lstrip("."))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _flush(path: Path) -> None:
    """Ask the disk to keep a file or folder, so that a power cut cannot leave a named but empty one."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Videos and lists of them behind URLs.

A video is decoded from a local copy, which lives as long as it is being read: seeking over a network
would fetch it several times. So the space in use is one video for each that is being decoded.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from actors.remote import RemoteError, file_system, is_remote, reason

logger = logging.getLogger(__name__)

TRIES = 3
FIRST_PAUSE_S = 0.5


def list_files(url: str) -> list[str]:
    """URLs of all files that `url` names: a file, a pattern, or a folder with all below it, sorted.

    Raises RemoteError where there is nothing.
    """
    files, path = file_system(url)
    try:
        if any(mark in path for mark in "*["):
            found = files.glob(path)
        elif PurePosixPath(path).suffix and not url.endswith("/"):
            found = [path] if files.exists(path) else []
        else:
            found = files.find(path)
    except Exception as error:  # each file system has exceptions of its own
        raise RemoteError(f"{url} cannot be listed: {reason(error)}") from None
    if not found:
        raise RemoteError(f"{url}: there is no such file, or nothing in it")
    scheme = url.partition("://")[0]
    return sorted(name if is_remote(name) else f"{scheme}://{name.lstrip('/')}" for name in map(str, found))


@contextmanager
def local_copy(path: str, folder: str | None = None) -> Iterator[Path]:
    """The file at `path` on this machine's disk; of a URL a copy in `folder`, gone when the block ends.

    A fetch that breaks off is tried again. Raises RemoteError.
    """
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="videollm-", dir=folder) as temporary:
        name = PurePosixPath(path.partition("?")[0])
        copy = Path(temporary) / name.parent.name / name.name  # a folder's name may say what is in it
        copy.parent.mkdir(exist_ok=True)
        for tries_left in reversed(range(TRIES)):
            try:
                _fetch(path, copy)
                break
            except RemoteError:
                raise
            except Exception as error:  # each file system has exceptions of its own
                if isinstance(error, FileNotFoundError) or not tries_left:
                    raise RemoteError(f"{path} cannot be fetched: {reason(error)}") from None
                logger.warning("fetching %s again, it failed: %s", path, reason(error))
                time.sleep(FIRST_PAUSE_S * 2 ** (TRIES - tries_left))
        yield copy


def _fetch(url: str, copy: Path) -> None:
    files, path = file_system(url)
    with files.open(path, "rb") as source, copy.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)

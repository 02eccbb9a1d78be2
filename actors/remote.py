"""Files behind URLs: s3:// and gs:// through pyarrow, http(s):// and whatever else fsspec knows.

A model's folder behind a URL is copied once into the cache folder, from where every process of the machine
reads it: weights are mapped into memory, which no object store allows.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import fsspec
import pyarrow.fs
from fsspec.implementations.arrow import ArrowFSWrapper

from actors.cache import build_once

log = logging.getLogger(__name__)

BY_PYARROW = ("s3", "gs", "gcs")
STATE = ("size", "mtime", "created", "LastModified", "ETag", "generation")  # what file systems tell of a file's version


class RemoteError(OSError):
    """A URL cannot be read or listed; names it and the reason."""


def is_remote(path: str | Path) -> bool:
    """Whether `path` is a URL."""
    return "://" in str(path)


def file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """What reads `url`, and the path it is known by there. Raises RemoteError for a scheme nobody reads."""
    scheme = url.partition("://")[0]
    try:
        if scheme in BY_PYARROW:
            files, path = pyarrow.fs.FileSystem.from_uri(url.replace("gcs://", "gs://", 1))
            return ArrowFSWrapper(files), path
        files, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError, OSError) as error:
        raise RemoteError(f"{url}: {reason(error)}") from None
    return files, path


def remote_folder(url: str, patterns: Sequence[str]) -> Path:
    """A copy of the files directly in the folder behind `url` whose names match; a changed folder is copied anew.

    Raises RemoteError where it cannot be read or holds no such file, CacheError.
    """
    files, path = file_system(url.rstrip("/"))
    try:
        found = {
            PurePosixPath(str(item["name"])).name: item
            for item in files.ls(path, detail=True)
            if item["type"] == "file" and any(fnmatch(PurePosixPath(str(item["name"])).name, one) for one in patterns)
        }
    except Exception as error:  # each file system has exceptions of its own
        raise RemoteError(f"{url} cannot be listed: {reason(error)}") from None
    if not found:
        raise RemoteError(f"{url}: there is no such folder, or no file in it that is one of {', '.join(patterns)}")
    state = [url.rstrip("/"), *(f"{name} {[found[name].get(key) for key in STATE]}" for name in sorted(found))]
    version = hashlib.blake2b("\n".join(state).encode(), digest_size=8).hexdigest()

    def fetch(folder: Path) -> None:
        log.info("fetching %s files=%d", url, len(found))
        for name, item in found.items():
            try:
                with files.open(item["name"], "rb") as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            except Exception as error:
                raise RemoteError(f"{url}/{name} cannot be fetched: {reason(error)}") from None

    return build_once(f"{PurePosixPath(path).name}-{version}", fetch)


def reason(error: Exception) -> str:
    """An exception's first line, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

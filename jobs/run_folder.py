"""Where a run's files are: a folder of this machine, or of any storage that fsspec knows (s3://, gs://, ...).

Object stores have no appending and no renaming, but a file appears in them whole; on a disk a file is written
beside and renamed. A folder is complete when its last file is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import pyarrow.fs
from fsspec import AbstractFileSystem
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.local import LocalFileSystem

from actors.cache import alone_in, write_whole
from actors.config import ConfigError
from actors.remote import file_system, is_remote


class RunFolder:
    """Files by name below `url`. Raises RemoteError for a scheme nobody reads."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.remote = is_remote(url)
        if self.remote:
            self.files, path = file_system(self.url)
            self.path = str(path).rstrip("/")
        else:
            self.files, self.path = LocalFileSystem(), str(Path(url).absolute())

    def __str__(self) -> str:
        return self.url

    def name(self, *parts: str) -> str:
        """The address of a file in it, as a user would give it."""
        return "/".join([self.url, *parts])

    def exists(self, name: str) -> bool:
        return bool(self.files.exists(self._at(name)))

    def read(self, name: str) -> str:
        with self.files.open(self._at(name), "rb") as file:
            text: str = file.read().decode()
        return text

    def write(self, name: str, text: str) -> None:
        """The whole file at once: a reader sees the old or the new one."""
        self._make_parent(name)
        if not self.remote:
            write_whole(Path(self._at(name)), [text])
            return
        with self.files.open(self._at(name), "wb") as file:
            file.write(text.encode())

    def append(self, name: str, text: str) -> None:
        """Add to a file of a local folder."""
        self._make_parent(name)
        with Path(self._at(name)).open("a") as file:
            file.write(text)

    def remove(self, name: str) -> None:
        if self.exists(name):
            self.files.rm(self._at(name), recursive=True)

    def put(self, source: Path, name: str, last: str | None = None) -> None:
        """A local file or folder, with the file called `last` of it only when all others are there."""
        found = [source] if source.is_file() else [file for file in sorted(source.rglob("*")) if file.is_file()]
        for file in sorted(found, key=lambda file: file.name == last):
            place = name if file == source else f"{name}/{file.relative_to(source).as_posix()}"
            self._make_parent(place)
            self.files.put_file(str(file), self._at(place))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The right to train there, for one program at a time. Raises ConfigError; object stores know no locks."""
        if self.remote:
            yield
            return
        text = f"another program is training the run {self}: wait until it ends, or give another training.name"
        with alone_in(Path(self.path), ConfigError(text)):
            yield

    def for_ray(self) -> tuple[str, pyarrow.fs.FileSystem | None]:
        """Path and file system as Ray Train takes them."""
        if not self.remote:
            return self.path, None
        return self.path, arrow_file_system(self.files)

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}"

    def _make_parent(self, name: str) -> None:
        self.files.makedirs(str(PurePosixPath(self._at(name)).parent), exist_ok=True)


def arrow_file_system(files: AbstractFileSystem) -> pyarrow.fs.FileSystem:
    """The same storage by pyarrow's interface."""
    if isinstance(files, ArrowFSWrapper):
        return files.fs
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(files))

"""Results of a long program, kept as they come: a program that was stopped asks for what it has not got yet.

A file of JSON lines, `{"key": ..., "result": ...}`. A key is a digest of everything that decides the result,
so that what other settings have given is never taken for it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import Self

from actors.cache import try_lock


class FinishedError(RuntimeError):
    """The file is in use or no file of results; says which."""


def key_of(*parts: object) -> str:
    """A digest of parts that JSON can say."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Finished:
    """The results in `path`, which one program at a time may hold. A context manager.

    A line that a killed program left half-written is dropped. Raises FinishedError while another program
    holds the file, and for a file of something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._results: dict[str, object] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        if not try_lock(self._file.fileno()):
            self._file.close()
            raise FinishedError(f"another evaluation is writing into {path.parent}: wait, or choose another folder")
        self._read()

    def get(self, key: str) -> object | None:
        """The result with that key, None where there is none yet."""
        return self._results.get(key)

    def add(self, key: str, result: object) -> None:
        """Keep a result, which JSON can say; it survives the program from here on."""
        self._results[key] = result
        self._file.write(json.dumps({"key": key, "result": result}, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def __len__(self) -> int:
        return len(self._results)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _read(self) -> None:
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                self._results[row["key"]] = row["result"]
            except (ValueError, KeyError, TypeError):
                self._file.close()
                raise FinishedError(f"{self.path} holds no results of ours: choose another folder") from None
            whole += len(line)
        self._file.truncate(whole)

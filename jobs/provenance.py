"""What results were made from: digests of annotation files, and which code it was."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("actors", "jobs")


@lru_cache(maxsize=4096)
def file_sha256(path: str) -> str:
    """Of a file's bytes; empty for a source that is no file."""
    if not Path(path).is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_version() -> dict[str, str]:
    """The installed version, and a digest of the source itself, which also knows a copy that was changed."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((root / package).glob("*.py")):
            digest.update(f"{package}/{file.name}\0".encode() + file.read_bytes())
    try:
        installed = version("videollm-online")
    except PackageNotFoundError:  # run from a folder, as `ray job submit --working-dir` does
        installed = "not installed"
    return {"version": installed, "sha256": digest.hexdigest()}

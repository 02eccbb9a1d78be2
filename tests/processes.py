"""Processes that a test has started, however indirectly: found by a mark in their environment."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MARK = "VIDEOLLM_TEST_RUN"
LISTENING = "0A"
LOOPBACK = re.compile(r"0100007F|0{24}01000000|0{16}FFFF00000100007F")  # 127.0.0.1, ::1, 127.0.0.1 within IPv6


class Marked:
    """Put `environment` into a program's environment; all that descends from it can then be found."""

    def __init__(self) -> None:
        self.environment = {MARK: uuid.uuid4().hex}

    def processes(self) -> list[Path]:
        """The folders below /proc."""
        wanted = f"{MARK}={self.environment[MARK]}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if wanted in (folder / "environ").read_bytes():
                    found.append(folder)
            except OSError:
                continue
        return found

    def names(self) -> list[str]:
        """Name and id of each process."""
        return [f"{name.decode().strip()} {pid}" for pid, name in self._read("comm")]

    def commands(self) -> list[str]:
        """Command line of each process."""
        return [line.replace(b"\0", b" ").decode(errors="replace") for _, line in self._read("cmdline")]

    def _read(self, file: str) -> Iterator[tuple[str, bytes]]:
        """The id of each process and what that file of it holds, of those that are still there."""
        for folder in self.processes():
            with suppress(OSError):
                yield folder.name, (folder / file).read_bytes()

    def listening(self) -> dict[str, bool]:
        """Where these processes listen, as /proc writes it, and whether only this machine can reach it."""
        sockets = {}
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *_, inode = line.split()[:10]
                if state == LISTENING:
                    sockets[f"socket:[{inode}]"] = local
        found = {}
        for folder in self.processes():
            for descriptor in (folder / "fd").iterdir():
                try:
                    local = sockets.get(str(descriptor.readlink()))
                except OSError:
                    continue
                if local:
                    found[f"{(folder / 'comm').read_text().strip()} {local}"] = bool(LOOPBACK.match(local))
        return found

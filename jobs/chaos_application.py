"""The real application as chaos runs it: `serve.app` in processes of its own, a Redis of ours, a model of no size.

The model is random: a Llama of two small layers made on the spot, with the tokenizer of the embedded LLM, behind
the embedded vision encoder. What it says means nothing; when, in which order and how often it is said is what
a chaos run looks at. Everything is reached as a client reaches it, and processes by their ids.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self, TypedDict, cast

import httpx
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from actors.causal_lm import EMBEDDED, causal_lm_folder
from actors.redis_server import RedisServer
from actors.runtime import local_ray_environment
from jobs.process_usage import descendants

START_S = 300.0
STOP_S = 60.0
ROLES = ("gateways", "encoders", "llms")
# The shell becomes the application; beside it a subshell waits on the pipe from this program. A line means that
# this program ends the application itself, end of file that it is gone.
WITH_PROGRAM = """
exec 3<&0 </dev/null
{ read -r _ <&3 || kill $$; } >/dev/null 2>&1 &
exec "$@" 3<&-
"""
DURABLE = {"appendonly": "yes", "appendfsync": "always", "maxmemory": "512mb"}


class ReplicaStats(TypedDict):
    """What `/v1/stats` tells of one replica, as far as it is used here."""

    name: str
    pid: int
    sessions: int


class ChaosError(RuntimeError):
    """The application does not start, or does not come back."""


def tiny_settings(folder: Path) -> dict[str, object]:
    """The sections `model` and `engine` for a random LLM that is written into `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(causal_lm_folder(EMBEDDED))
    sizes = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    disable_progress_bar()
    LlamaForCausalLM(sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    frames = {"resolution_px": 64, "cls": True, "pooled": [1, 1], "separator": ","}
    model = {"llm": str(folder), "vision": EMBEDDED, "frames": frames, "dtype": "float32"}
    return {
        "model": model,
        # What a step of such a model takes hardly depends on its positions.
        "engine": {
            "untrained": True,
            "kv_memory_gb": 0.25,
            "token_budget": 1024,
            "window_trigger": 600,
            "window_keep": 300,
        },
    }


def end_in_order_on_signal() -> None:
    """SIGTERM ends a program as Ctrl-C does: what it has started must not outlive it."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def is_alive(pid: int) -> bool:
    """Whether a process is there and not merely waited for by its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Application:
    """`with Application(...) as app`: Redis and `serve.app`, up until the block ends."""

    def __init__(self, folder: Path, settings: Mapping[str, object], replicas: int, resume_s: float) -> None:
        self.replicas = replicas
        data = folder / "redis"
        data.mkdir()
        self.redis = RedisServer(DURABLE, data=data)
        self.data = data
        sections = {
            **settings,
            "bus": {"resume_s": resume_s, "lease_ms": 2000, "renew_ms": 500, "partitions": 4},
            "serve": dict.fromkeys(ROLES, replicas)
            | {"gateway_cpus": 0.1, "encoder_cpus": 0.1, "llm_cpus": 0.1, "admission_timeout_s": 60.0},
            "session": {"decide_by": "threshold"},
            "limits": {"sessions": 512, "sessions_per_key": 512},
        }
        self.settings = folder / "settings.yaml"
        self.settings.write_text(yaml.safe_dump(sections))
        self._log = folder / "application.log"
        self._process: subprocess.Popen[str] | None = None
        self.url = self.redis_url = self.cluster = ""

    def __enter__(self) -> Self:
        self.redis_url = self.redis.start()
        try:
            self._launch()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def stats(self) -> dict[str, list[ReplicaStats]]:
        """What every replica says of itself. Raises httpx.HTTPError where no gateway answers."""
        answer = httpx.get(f"{self.url}/v1/stats", timeout=10).raise_for_status().json()
        return cast(dict[str, list[ReplicaStats]], answer)

    def whole(self) -> bool:
        """Whether as many living replicas of each kind report as there should be; a dead one's report lasts a while."""
        try:
            found = self.stats()
        except httpx.HTTPError:
            return False
        alive = [{replica["pid"] for replica in found[role] if is_alive(replica["pid"])} for role in ROLES]
        return all(len(pids) >= self.replicas for pids in alive)

    def processes(self) -> set[int]:
        """Ids of all processes of the application and of Redis."""
        roots = [self._process.pid if self._process else None, self.redis.pid]
        return {found for root in roots if root is not None for found in descendants(root)}

    def log_tail(self, lines: int = 12) -> str:
        said = self._log.read_text(errors="replace") if self._log.is_file() else ""
        return "\n".join(said.splitlines()[-lines:])

    def _launch(self) -> None:
        local_ray_environment()
        environment = {**os.environ, "REDIS_URL": self.redis_url, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("RAY_ADDRESS", None)
        command = ["/bin/sh", "-c", WITH_PROGRAM, "sh", sys.executable, "-m", "serve.app", str(self.settings)]
        # Ray's workers write here as long as they live: a pipe that nobody reads would stop them.
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, "serve.port=0"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            said = self._log.read_text(errors="replace")
            if found := re.search(r"^ready: (\S+)", said, re.MULTILINE):
                [self.cluster] = re.findall(r"RAY_ADDRESS=(\S+)", said)[:1]
                self.url = found[1]
                return
            time.sleep(0.5)
        raise ChaosError(f"the application did not start: {self.log_tail()}")

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            left = descendants(process.pid)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()
            with suppress(BrokenPipeError):
                process.communicate("\n")
        self.redis.stop()

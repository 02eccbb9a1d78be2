"""Open-loop load on a server, as its clients see it: N WebSocket sessions that send F frames a second, come what may.

Speaks to the endpoint alone (docs/api.md), so that it measures any server. A session asks a question every so
often, which is the stated rate of speaking. Latency by stage, CPU and memory come from `/metrics`; what the
client sees of every frame and question is measured here, from the moment at which it was due: a client that
is held up, by its own machine or by a socket that takes nothing, must not make the server look faster.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
import websockets
from prometheus_client.parser import text_string_to_metric_families

from actors.video import encode_jpeg
from jobs.machine import cpu_name

START_S = 300.0
DRAIN_S = 120.0
STAGES = ("admission", "encode_queue", "encode", "decide", "total")
SHARES = (0.5, 0.95, 0.99)
QUESTION = "What do you see now?"
SIDE_PX = 224


class EndpointError(RuntimeError):
    """The server to be measured did not come up; says why."""


@dataclass(frozen=True)
class Load:
    """Every number of `sessions` in turn: `fps` frames a second each for `seconds`, a question every `ask_every_s`."""

    sessions: Sequence[int]
    fps: float
    seconds: float
    ask_every_s: float
    tokens: int


@dataclass
class Seen:
    """What one client saw: seconds from frame to decision, from question to first text; frames sent and dropped.

    `ended` once the server has said that all of it is done; `lost` says why the connection ended before.
    """

    lags: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    behind: list[int] = field(default_factory=list)
    sent: int = 0
    decided: int = 0
    dropped: int = 0
    errors: int = 0
    ended: bool = False
    lost: str | None = None


@dataclass(frozen=True)
class Result:
    """One number of sessions. `stages` has p50, p95 and p99 in seconds, upper bounds of the server's buckets.

    A share is None where there was nothing to measure. `lost` are the sessions that did not come to their end.
    """

    sessions: int
    sent: int
    decided: int
    dropped: int
    errors: int
    lag_s: dict[str, float | None]
    first_token_s: dict[str, float | None]
    frames_behind: dict[str, float | None]
    stages: dict[str, dict[str, float]]
    cpu_per_session: float
    memory_mb_per_session: float
    keeps_up: bool
    lost: tuple[str, ...] = ()


@dataclass
class ServeReport:
    """`machine` says where it was measured, `largest` how many sessions had a p99 lag of less than one frame."""

    machine: dict[str, str | int | float]
    notes: list[str]
    load: Load
    results: list[Result] = field(default_factory=list)

    @property
    def largest(self) -> int:
        return max((result.sessions for result in self.results if result.keeps_up), default=0)

    def table(self) -> str:
        load = self.load
        lines = [f"{name}: {value}" for name, value in self.machine.items()]
        lines += [
            f"load: {load.fps:g} frames/s a session for {load.seconds:g} s, a question every {load.ask_every_s:g} s, "
            f"responses of at most {load.tokens} tokens",
            "",
            f"{'N':>4} {'sent':>6} {'decided':>8} {'dropped':>8} {'lag p50':>8} {'p95':>7} {'p99':>7} {'behind':>7} "
            f"{'TTFT p50':>9} {'CPU/N':>6} {'MB/N':>7}",
        ]
        lines += [
            f"{r.sessions:>4} {r.sent:>6} {r.decided:>8} {r.dropped:>8} {_told(r.lag_s['p50']):>8} "
            f"{_told(r.lag_s['p95']):>7} {_told(r.lag_s['p99']):>7} {_told(r.frames_behind['p99'], 0):>7} "
            f"{_told(r.first_token_s['p50']):>9} "
            f"{r.cpu_per_session:>6.2f} {r.memory_mb_per_session:>7.0f}"
            for r in self.results
        ]
        for result in self.results:
            told = "  ".join(f"{stage} {bounds['p99']:g}" for stage, bounds in result.stages.items())
            lines.append(f"p99 by stage, N = {result.sessions}: {told}")
            lines += [f"lost, N = {result.sessions}: {reason}" for reason in result.lost]
        lines += [f"largest N with a p99 lag of less than a frame ({1 / load.fps:g} s): {self.largest}", *self.notes]
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**asdict(self), "largest": self.largest}, indent=1) + "\n")


def machine() -> dict[str, str | int | float]:
    return {"date": datetime.now(UTC).date().isoformat(), "cpu": cpu_name(), "cores": os.cpu_count() or 1}


def measure_all(report: ServeReport, url: str) -> None:
    """Every number of sessions until one does not keep up."""
    for sessions in report.load.sessions:
        report.results.append(asyncio.run(_measure(report.load, sessions, url)))
        if not report.results[-1].keeps_up:
            return


@contextlib.contextmanager
def endpoint(settings: str, overrides: Sequence[str], url: str | None) -> Iterator[str]:
    """The address given, or a server of our own for as long as the block lasts. Raises EndpointError."""
    if url is not None:
        yield url.rstrip("/")
        return
    command = [sys.executable, "-m", "serve.app", settings, "serve.port=0", *overrides]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        found = next((match for line in process.stdout if (match := re.match(r"ready: (\S+)", line))), None)
        if found is None:
            raise EndpointError(f"the server did not start (exit status {process.wait()}): {' '.join(command)}")
        _until_ready(found[1])
        yield found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DRAIN_S)


def _until_ready(url: str) -> None:
    deadline = time.monotonic() + START_S
    while httpx.get(f"{url}/ready", timeout=30).status_code != 200:
        if time.monotonic() > deadline:
            raise EndpointError(f"{url} was not ready after {START_S:g} s")
        time.sleep(0.5)


async def _measure(load: Load, sessions: int, url: str) -> Result:
    picture = _picture()
    before, started = await _metrics(url), time.monotonic()
    seen = await asyncio.gather(*(_session(load, url, picture, index / sessions) for index in range(sessions)))
    after, took_s = await _metrics(url), time.monotonic() - started
    gained = {key: value - before.get(key, 0.0) for key, value in after.items()}
    lags = [lag for each in seen for lag in each.lags]
    lag_s = _shares(lags)
    dropped = sum(each.dropped for each in seen)
    lost = tuple(each.lost or "it was not over in time" for each in seen if not each.ended)
    return Result(
        sessions=sessions,
        sent=sum(each.sent for each in seen),
        decided=sum(each.decided for each in seen),
        dropped=dropped,
        errors=sum(each.errors for each in seen),
        lag_s=lag_s,
        first_token_s=_shares([at for each in seen for at in each.first_tokens]),
        frames_behind=_shares([float(behind) for each in seen for behind in each.behind]),
        stages={stage: _bounds(gained, stage) for stage in STAGES},
        cpu_per_session=gained.get("videollm_process_cpu_seconds_total", 0.0) / took_s / sessions,
        memory_mb_per_session=after.get("videollm_process_resident_memory_bytes", 0.0) / 1e6 / sessions,
        keeps_up=lag_s["p99"] is not None and lag_s["p99"] < 1 / load.fps and not dropped and not lost,
        lost=lost,
    )


async def _session(load: Load, url: str, picture: bytes, offset: float) -> Seen:
    """One client: frames at their times whether the server keeps up or not; `offset` of a frame spreads clients."""
    seen = Seen()
    try:
        async with websockets.connect(f"{url.replace('http', 'ws', 1)}/v1/realtime", max_size=None) as socket:
            await _play(load, socket, picture, offset, seen)
    except* (OSError, TimeoutError, websockets.WebSocketException) as group:
        error = group.exceptions[0]
        seen.lost = f"{type(error).__name__}: {error}"
    return seen


async def _play(load: Load, socket: websockets.ClientConnection, picture: bytes, offset: float, seen: Seen) -> None:
    """All frames and questions of one client, until the session has ended."""
    due_at, asked_at = dict[float, float](), dict[str, float]()
    settings = {
        "include": ["frame_decided"],
        "max_output_tokens": load.tokens,
        "video": {"fps": load.fps, "drop_policy": "latest"},
    }
    await socket.send(json.dumps({"type": "session.update", "session": settings}))
    async with asyncio.TaskGroup() as both:
        listening = both.create_task(_listen(socket, seen, due_at, asked_at))
        start = time.monotonic() + offset / load.fps
        next_question = load.ask_every_s / 2
        for index in range(int(load.seconds * load.fps)):
            video_time = index / load.fps
            due = start + video_time
            await asyncio.sleep(due - time.monotonic())
            if video_time >= next_question:
                next_question += load.ask_every_s
                item_id = f"q{index}"
                item = {"id": item_id, "content": [{"type": "input_text", "text": QUESTION}]}
                asked_at[item_id] = due
                await socket.send(json.dumps({"type": "conversation.item.create", "item": item}))
            due_at[video_time] = due
            await socket.send(struct.pack(">Bd", 1, video_time) + picture)
            seen.sent += 1
            seen.behind.append(len(due_at))
        await socket.send(json.dumps({"type": "input_video_buffer.end"}))
        await asyncio.wait([listening], timeout=DRAIN_S)
        listening.cancel()


async def _listen(
    socket: websockets.ClientConnection, seen: Seen, due_at: dict[float, float], asked_at: dict[str, float]
) -> None:
    answers: dict[str, str] = {}
    async for text in socket:
        event, now = json.loads(text), time.monotonic()
        kind = event["type"]
        if kind == "frame_decided":
            # Frames that were dropped before this one will not be decided any more.
            for video_time in [at for at in due_at if at < event["video_time"]]:
                del due_at[video_time]
            if (at := due_at.pop(event["video_time"], None)) is not None:
                seen.lags.append(now - at)
            seen.decided += 1
        elif kind == "response.created" and event["response"].get("item_id"):
            answers[event["response"]["id"]] = event["response"]["item_id"]
        elif kind == "response.output_text.delta" and (item_id := answers.pop(event["response_id"], None)):
            if (at := asked_at.pop(item_id, None)) is not None:
                seen.first_tokens.append(now - at)
        elif kind == "error":
            seen.errors += 1
        elif kind == "session.ended":
            seen.dropped, seen.ended = event["frames"]["dropped"], True
            return


async def _metrics(url: str) -> dict[str, float]:
    """Sums over replicas by name, stage and bucket."""
    async with httpx.AsyncClient(timeout=60) as client:
        text = (await client.get(f"{url}/metrics")).raise_for_status().text
    found: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = [sample.name, *(sample.labels[name] for name in ("stage", "le") if name in sample.labels)]
            found[" ".join(key)] += sample.value
    return dict(found)


def _bounds(gained: dict[str, float], stage: str) -> dict[str, float]:
    """The smallest bucket bounds that hold each share of a stage's frames; 0 where there was none."""
    prefix = f"videollm_decision_latency_seconds_bucket {stage} "
    buckets = sorted((float(key.removeprefix(prefix)), n) for key, n in gained.items() if key.startswith(prefix))
    count = buckets[-1][1] if buckets else 0.0
    return {
        f"p{share * 100:g}": next((bound for bound, n in buckets if count and n >= share * count), 0.0)
        for share in SHARES
    }


def _shares(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p95 and p99; None without values."""
    ordered = sorted(values)
    return {
        f"p{share * 100:g}": ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None
        for share in SHARES
    }


def _told(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _picture() -> bytes:
    """A JPEG of the size of a frame with some detail in it."""
    random = np.random.default_rng(0).integers(0, 255, (SIDE_PX // 8, SIDE_PX // 8, 3), np.uint8)
    return encode_jpeg(random.repeat(8, axis=0).repeat(8, axis=1))

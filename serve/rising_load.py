"""`python -m serve.rising_load CONFIG`: live sessions come and go, replicas follow; what happened as a picture.

Starts the application with autoscaling, adds a session every few seconds up to `--sessions`, lets them
end one by one, and waits until the replicas are gone again. Every session plays frames at 2 FPS and has to
get every decision. Writes a JSON file and a plot. Exit status 1 when a session was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import struct
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import matplotlib
import websockets
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot

from actors.config import load_config
from serve.app import running
from serve.server_events import ErrorEvent, FrameDecided, SessionEnded, VideoStatus, parse_event
from serve.signals import end_at_once_on_signal, interruptible

FPS = 2.0
SETTLE_S = 60.0


@dataclass(frozen=True)
class Schedule:
    """A session more every `step_s`, all of them together for `hold_s`, then one less every `step_s`."""

    sessions: int
    step_s: float
    hold_s: float

    def span(self, number: int) -> tuple[float, float]:
        """When a session begins and ends, in seconds."""
        peak = self.sessions * self.step_s
        return number * self.step_s, peak + self.hold_s + (self.sessions - number) * self.step_s


@dataclass
class Viewer:
    """One session: what it sent, what was decided, and why it was lost if it was."""

    live: bool = False
    sent: int = 0
    decided: int = 0
    dropped: int = 0
    lag_p50: float | None = None
    lost: str | None = None


@dataclass
class Sample:
    """The state at a moment."""

    at: float
    sessions: int
    encoders: int
    llms: int
    behind: int
    lag_p50: float | None


@dataclass
class Report:
    """All of it."""

    samples: list[Sample] = field(default_factory=list)
    viewers: list[Viewer] = field(default_factory=list)

    @property
    def lost(self) -> list[str]:
        return [viewer.lost for viewer in self.viewers if viewer.lost]


async def watch(url: str, viewer: Viewer, begin_s: float, end_s: float) -> None:
    """Play a grey video from one moment to another, and count what is decided."""
    await asyncio.sleep(begin_s)
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(picture, "JPEG")
    try:
        async with websockets.connect(f"{url.replace('http', 'ws', 1)}/v1/realtime", open_timeout=60) as socket:
            viewer.live = True
            session = {"include": ["frame_decided"], "max_output_tokens": 2, "video": {"drop_policy": "block"}}
            await socket.send(json.dumps({"type": "session.update", "session": session}))
            listening = asyncio.create_task(_listen(socket, viewer))
            for number in range(int((end_s - begin_s) * FPS)):
                await socket.send(struct.pack(">Bd", 1, number / FPS) + picture.getvalue())
                viewer.sent += 1
                await asyncio.sleep(1 / FPS)
            await socket.send(json.dumps({"type": "input_video_buffer.end"}))
            async with asyncio.timeout(2 * SETTLE_S):
                await listening
    except (OSError, TimeoutError, websockets.WebSocketException) as error:
        viewer.lost = viewer.lost or f"{type(error).__name__}: {error}"
    viewer.live = False
    if viewer.decided + viewer.dropped != viewer.sent:
        viewer.lost = viewer.lost or f"{viewer.sent} frames sent, {viewer.decided} decided, {viewer.dropped} dropped"


async def _listen(socket: websockets.ClientConnection, viewer: Viewer) -> None:
    async for text in socket:
        match event := parse_event(text):
            case FrameDecided():
                viewer.decided += 1
            case VideoStatus():
                viewer.lag_p50, viewer.dropped = event.frames.lag_p50, event.frames.dropped
            case ErrorEvent() if event.error.code != "buffer_full":
                viewer.lost = f"{event.error.code}: {event.error.message}"
            case SessionEnded():
                viewer.dropped = event.frames.dropped
                return


async def sample(url: str, report: Report, started: float) -> None:
    """One look at the replicas and the sessions."""
    async with httpx.AsyncClient(timeout=30) as client:
        stats = (await client.get(f"{url}/v1/stats")).raise_for_status().json()
    live = [viewer for viewer in report.viewers if viewer.live]
    lags = sorted(viewer.lag_p50 for viewer in live if viewer.lag_p50 is not None)
    report.samples.append(
        Sample(
            at=round(time.monotonic() - started, 1),
            sessions=len(live),
            encoders=len(stats["encoders"]),
            llms=len(stats["llms"]),
            behind=sum(viewer.sent - viewer.decided - viewer.dropped for viewer in live),
            lag_p50=lags[len(lags) // 2] if lags else None,
        )
    )


async def follow(url: str, schedule: Schedule, report: Report, settle_s: float = SETTLE_S) -> None:
    """Let the load rise and fall, and look on until the replicas are down to one again or `settle_s` are over."""
    started = time.monotonic()
    report.viewers = [Viewer() for _ in range(schedule.sessions)]
    work = asyncio.gather(*(watch(url, viewer, *schedule.span(number)) for number, viewer in enumerate(report.viewers)))
    done: float | None = None
    while done is None or time.monotonic() - done < settle_s:
        await sample(url, report, started)
        if done is None and work.done():
            done = time.monotonic()
        if done is not None and report.samples[-1].llms == report.samples[-1].encoders == 1:
            break
        await asyncio.sleep(1)
    await work


def draw(report: Report, path: Path) -> None:
    """Load, replicas and lag over time, one above the other."""
    figure, (load, replicas, lag) = pyplot.subplots(3, 1, sharex=True, figsize=(8, 7), layout="constrained")
    at = [one.at for one in report.samples]
    load.step(at, [one.sessions for one in report.samples], where="post")
    load.set_ylabel("live sessions")
    for role in ("encoders", "llms"):
        replicas.step(at, [getattr(one, role) for one in report.samples], where="post", label=role)
    replicas.set_ylabel("replicas")
    replicas.legend()
    lag.plot(at, [one.behind for one in report.samples], label="frames behind live, all sessions")
    lag.set_ylabel("frames behind")
    lag.set_xlabel("seconds")
    for axis in (load, replicas, lag):
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m serve.rising_load", description="Show replicas that follow a load."
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--sessions", type=int, default=6)
    parser.add_argument("--step-s", type=float, default=8.0)
    parser.add_argument("--hold-s", type=float, default=20.0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/rising_load"))
    options = parser.parse_args(arguments)
    end_at_once_on_signal()
    report = Report()
    bounds = ["serve.port=0", "serve.max_llms=3", "serve.max_encoders=2", "serve.scaling.downscale_delay_s=10"]
    config = load_config(options.config, [*bounds, *options.overrides])
    with running(config) as url:
        schedule = Schedule(options.sessions, options.step_s, options.hold_s)
        asyncio.run(interruptible(follow(url, schedule, report)))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    draw(report, options.output.with_suffix(".png"))
    most = max(report.samples, key=lambda one: one.llms)
    print(
        f"{options.sessions} sessions, up to {most.llms} LLM and "
        f"{max(one.encoders for one in report.samples)} encoder replicas, {report.samples[-1].llms} at the end; "
        f"{sum(viewer.decided for viewer in report.viewers)} frames decided, {len(report.lost)} sessions lost"
    )
    for reason in report.lost:
        print(f"lost: {reason}", file=sys.stderr)
    return 1 if report.lost else 0


if __name__ == "__main__":
    sys.exit(main())

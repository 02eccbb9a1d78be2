"""`python -m serve.rising_load CONFIG`: live sessions come and go, replicas follow; what happened as a picture.

Starts the application with autoscaling, adds a session every few seconds up to `--sessions`, lets them
end one by one, and waits until the replicas are gone again. Every session plays frames at `--fps` and has to
get every decision. Serve takes away the newest replica first: where the oldest sessions end first, as by
default, that one still holds some, which have to move. Writes a JSON file and a plot. Exit status 1 when a
session was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import struct
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
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

SETTLE_S = 60.0


@dataclass(frozen=True)
class Schedule:
    """A session more every `step_s`, all of them together for `hold_s`, then one less every `step_s`.

    The one that came last leaves first, with `oldest_first` the one that came first.
    """

    sessions: int
    step_s: float
    hold_s: float
    fps: float = 2.0
    oldest_first: bool = False

    def span(self, number: int) -> tuple[float, float]:
        """When a session begins and ends, in seconds."""
        peak = self.sessions * self.step_s
        left = number + 1 if self.oldest_first else self.sessions - number
        return number * self.step_s, peak + self.hold_s + left * self.step_s


@dataclass
class Viewer:
    """One session: what it sent, what was decided, how late the latest was, and why it was lost if it was."""

    live: bool = False
    sent: int = 0
    decided: int = 0
    dropped: int = 0
    longest_lag_s: float = 0.0
    lost: str | None = None


class Undecided:
    """When a session's frames were sent, by their video time, as long as nothing is known of them."""

    def __init__(self) -> None:
        self._sent_at: dict[float, float] = {}

    def __len__(self) -> int:
        return len(self._sent_at)

    @property
    def age_s(self) -> float:
        """How long the oldest of them waits already."""
        return time.monotonic() - min(self._sent_at.values()) if self._sent_at else 0.0

    def add(self, video_time: float) -> None:
        self._sent_at[video_time] = time.monotonic()

    def decide(self, video_time: float) -> float:
        """The seconds a frame took; those before it that were not decided never will be."""
        lag_s = time.monotonic() - self._sent_at.get(video_time, time.monotonic())
        self._sent_at = {at: sent for at, sent in self._sent_at.items() if at > video_time}
        return lag_s


@dataclass
class Sample:
    """The state at a moment; `lag_s` is for how long the oldest undecided frame of all sessions waits.

    `moved` is how often a session has changed its LLM replica up to then, as far as the replicas have told.
    """

    at: float
    sessions: int
    encoders: int
    llms: int
    behind: int
    lag_s: float
    moved: int = 0


@dataclass
class Report:
    """All of it; `machine` says where it was, `claims` how many sessions each LLM replica took over."""

    machine: dict[str, str] = field(default_factory=dict)
    schedule: Schedule | None = None
    samples: list[Sample] = field(default_factory=list)
    viewers: list[Viewer] = field(default_factory=list)
    claims: dict[str, int] = field(default_factory=dict)

    @property
    def moved(self) -> int:
        """How often a session changed its LLM replica, as far as the replicas had time to tell of it."""
        return max(0, sum(self.claims.values()) - len(self.viewers))

    @property
    def lost(self) -> list[str]:
        return [viewer.lost for viewer in self.viewers if viewer.lost]


async def watch(url: str, viewer: Viewer, undecided: Undecided, span: tuple[float, float], fps: float) -> None:
    """Play a grey video from one moment to another, and count what is decided."""
    begin_s, end_s = span
    await asyncio.sleep(begin_s)
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(picture, "JPEG")
    try:
        async with websockets.connect(f"{url.replace('http', 'ws', 1)}/v1/realtime", open_timeout=60) as socket:
            viewer.live = True
            session = {"include": ["frame_decided"], "max_output_tokens": 2, "video": {"drop_policy": "block"}}
            await socket.send(json.dumps({"type": "session.update", "session": session}))
            listening = asyncio.create_task(_listen(socket, viewer, undecided))
            started = time.monotonic()
            for number in range(round((end_s - begin_s) * fps)):
                await asyncio.sleep(started + number / fps - time.monotonic())
                undecided.add(number / fps)
                await socket.send(struct.pack(">Bd", 1, number / fps) + picture.getvalue())
                viewer.sent += 1
            await socket.send(json.dumps({"type": "input_video_buffer.end"}))
            async with asyncio.timeout(2 * SETTLE_S):
                await listening
    except (OSError, TimeoutError, websockets.WebSocketException) as error:
        viewer.lost = viewer.lost or f"{type(error).__name__}: {error}"
    viewer.live = False
    if viewer.decided + viewer.dropped != viewer.sent:
        viewer.lost = viewer.lost or f"{viewer.sent} frames sent, {viewer.decided} decided, {viewer.dropped} dropped"


async def _listen(socket: websockets.ClientConnection, viewer: Viewer, undecided: Undecided) -> None:
    async for text in socket:
        match event := parse_event(text):
            case FrameDecided():
                viewer.decided += 1
                viewer.longest_lag_s = max(viewer.longest_lag_s, undecided.decide(event.video_time))
            case VideoStatus():
                viewer.dropped = event.frames.dropped
            case ErrorEvent() if event.error.code != "buffer_full":
                viewer.lost = f"{event.error.code}: {event.error.message}"
            case SessionEnded():
                viewer.dropped = event.frames.dropped
                return


async def sample(url: str, report: Report, undecided: list[Undecided], started: float) -> None:
    """One look at the replicas and the sessions."""
    async with httpx.AsyncClient(timeout=30) as client:
        stats = (await client.get(f"{url}/v1/stats")).raise_for_status().json()
    report.claims |= {llm["name"]: llm["claims"] for llm in stats["llms"]}
    live = [frames for viewer, frames in zip(report.viewers, undecided, strict=True) if viewer.live]
    report.samples.append(
        Sample(
            at=round(time.monotonic() - started, 1),
            sessions=len(live),
            encoders=len(stats["encoders"]),
            llms=len(stats["llms"]),
            behind=sum(map(len, live)),
            lag_s=round(max((frames.age_s for frames in live), default=0.0), 3),
            moved=report.moved,
        )
    )


async def follow(url: str, schedule: Schedule, report: Report, settle_s: float = SETTLE_S) -> None:
    """Let the load rise and fall, and look on until the replicas are down to one again or `settle_s` are over."""
    started = time.monotonic()
    report.schedule = schedule
    report.viewers = [Viewer() for _ in range(schedule.sessions)]
    undecided = [Undecided() for _ in report.viewers]
    work = asyncio.gather(
        *(
            watch(url, viewer, frames, schedule.span(number), schedule.fps)
            for number, (viewer, frames) in enumerate(zip(report.viewers, undecided, strict=True))
        )
    )
    done: float | None = None
    while done is None or time.monotonic() - done < settle_s:
        await sample(url, report, undecided, started)
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
    load.set_title(", ".join(map(str, report.machine.values())), fontsize="medium")
    for role, name, style in (("llms", "LLM", "-"), ("encoders", "encoder", "--")):
        replicas.step(at, [getattr(one, role) for one in report.samples], style, where="post", label=name)
    replicas.set_ylabel("replicas")
    replicas.yaxis.get_major_locator().set_params(integer=True)
    lag.plot(at, [one.lag_s for one in report.samples])
    lag.set_ylabel("oldest undecided frame (s)")
    lag.set_xlabel("seconds")
    moves = [
        now.at for before, now in zip(report.samples, report.samples[1:], strict=False) if now.moved > before.moved
    ]
    for axis in (replicas, lag):
        for index, moment in enumerate(moves):
            axis.axvline(moment, color="tab:red", linestyle=":", label=None if index else "sessions moved")
    replicas.legend()
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
    parser.add_argument("--sessions", type=int, default=10)
    parser.add_argument("--fps", type=float, default=2.0, help="frames per second of a session (default: 2)")
    parser.add_argument("--step-s", type=float, default=6.0)
    parser.add_argument("--hold-s", type=float, default=20.0)
    parser.add_argument(
        "--leaving", choices=["oldest", "newest"], default="oldest", help="which session ends first (default: oldest)"
    )
    parser.add_argument("--save", type=Path, default=Path("benchmarks"), metavar="FOLDER")
    parser.add_argument("--machine", default="machine", metavar="NAME", help="name in the file's name")
    options = parser.parse_args(arguments)
    end_at_once_on_signal()
    date = datetime.now(UTC).date().isoformat()
    report = Report({"date": date, "machine": options.machine, "cores": f"{os.cpu_count() or 1} cores"})
    bounds = ["serve.port=0", "serve.max_llms=3", "serve.max_encoders=2", "serve.scaling.downscale_delay_s=10"]
    config = load_config(options.config, [*bounds, *options.overrides])
    with running(config) as url:
        oldest_first = options.leaving == "oldest"
        schedule = Schedule(options.sessions, options.step_s, options.hold_s, options.fps, oldest_first)
        asyncio.run(interruptible(follow(url, schedule, report)))
    options.save.mkdir(parents=True, exist_ok=True)
    path = options.save / f"{date}-rising-load-{options.machine}"
    path.with_suffix(".json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    draw(report, path.with_suffix(".png"))
    print(
        f"{options.sessions} sessions, up to {max(one.llms for one in report.samples)} LLM and "
        f"{max(one.encoders for one in report.samples)} encoder replicas, {report.samples[-1].llms} and "
        f"{report.samples[-1].encoders} at the end; {sum(viewer.decided for viewer in report.viewers)} frames decided, "
        f"{sum(viewer.dropped for viewer in report.viewers)} dropped, longest lag "
        f"{max(viewer.longest_lag_s for viewer in report.viewers):.1f} s, {report.moved} sessions moved, "
        f"{len(report.lost)} lost"
    )
    for reason in report.lost:
        print(f"lost: {reason}", file=sys.stderr)
    print(f"saved: {path}.json and {path}.png")
    return 1 if report.lost else 0


if __name__ == "__main__":
    sys.exit(main())

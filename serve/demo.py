"""`python -m serve.demo`: the whole live path on this machine, seen from a client.

Starts Redis, Ray and the application, then does what any client would: plays a video at its real
pace through the WebSocket, asks to be told what happens, asks a question half-way, and prints what
comes back at its video time. Exit status 0, 130 after Ctrl-C, 1 with a message when something fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import websockets
from websockets.asyncio.client import ClientConnection

from actors.bus import BusError
from actors.config import Config, ConfigError, FrameConfig, load_config
from actors.redis_server import RedisServerError
from actors.tasks import end_all
from actors.video import VideoError, VideoInfo, encode_jpeg, probe, read_frames
from serve.app import REPOSITORY, StartError, running
from serve.client_events import pack_binary
from serve.server_events import ErrorEvent, FrameDecided, ItemAdded, SessionEnded, TextDone, parse_event
from serve.signals import Stopped, end_at_once_on_signal, interruptible
from serve.timeline import draw

INSTRUCTION = "Please narrate the video in real time."
QUESTION = "What has happened so far?"
SAMPLE = REPOSITORY / "tests/samples/big_buck_bunny_trailer.mp4"
MAX_OUTPUT_TOKENS = 24
LINE_EVERY_S = 10.0
REPORTED_WITHIN_S = 5.0  # replicas report about once a second

Stats = dict[str, list[dict[str, object]]]


class DemoError(RuntimeError):
    """The demo cannot go on; says why."""


@dataclass(frozen=True)
class Plan:
    """What is played: a video at `fps` for `seconds`, JPEG frames as the model sees them."""

    path: Path
    fps: float
    seconds: float
    pictures: FrameConfig
    wait_s: float

    def frames(self) -> Iterator[tuple[float, bytes]]:
        """Video time and JPEG bytes of every frame that is sent."""
        size, fit = self.pictures.resolution_px, self.pictures.fit
        for _, video_time, frame in read_frames(self.path, self.fps, size, fit, stop=self.seconds):
            yield video_time, encode_jpeg(frame, 90)


@dataclass
class Screen:
    """Lines for events; P(silent) and counts in one line that is overwritten on a terminal, now and then elsewhere."""

    terminal: bool = field(default_factory=lambda: sys.stdout.isatty())
    _last: float = 0.0
    _dirty: bool = False

    def line(self, text: str) -> None:
        if self._dirty:
            sys.stdout.write("\r\033[K")
            self._dirty = False
        print(text, flush=True)

    def progress(self, text: str) -> None:
        if self.terminal:
            sys.stdout.write(f"\r\033[K{text}")
            sys.stdout.flush()
            self._dirty = True
        elif time.monotonic() - self._last > LINE_EVERY_S:
            self._last = time.monotonic()
            print(text, flush=True)


class Viewer:
    """A client of `/v1/realtime` that plays one video and listens."""

    def __init__(self, socket: ClientConnection, plan: Plan, screen: Screen) -> None:
        self.socket = socket
        self.plan = plan
        self.screen = screen
        self.sent = 0
        self.decided = 0
        self.ended: SessionEnded | None = None

    async def run(self) -> SessionEnded:
        """Play to the end and return `session.ended`. Raises DemoError when it does not come."""
        listening = asyncio.create_task(self._listen())
        playing = asyncio.create_task(self._play())
        try:
            done, _ = await asyncio.wait({listening, playing}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            async with asyncio.timeout(self.plan.wait_s):
                await listening
        except TimeoutError:
            raise DemoError(f"the session had not ended {self.plan.wait_s:g} s after its last frame") from None
        finally:
            await end_all((listening, playing))
        if self.ended is None:
            raise DemoError("the server closed the connection before the session had ended")
        return self.ended

    async def _play(self) -> None:
        video = {"fps": self.plan.fps, "drop_policy": "latest"}
        settings = {"include": ["frame_decided"], "max_output_tokens": MAX_OUTPUT_TOKENS, "video": video}
        await self._say({"type": "session.update", "session": settings})
        await self._ask(INSTRUCTION)
        start = asyncio.get_running_loop().time()
        asked = False
        frames = self.plan.frames()
        while (frame := await asyncio.to_thread(next, frames, None)) is not None:
            video_time, image = frame
            await asyncio.sleep(start + video_time - asyncio.get_running_loop().time())
            if not asked and video_time >= self.plan.seconds / 2:
                await self._ask(QUESTION)
                asked = True
            await self.socket.send(pack_binary(video_time, image))
            self.sent += 1
        await self._say({"type": "input_video_buffer.end"})

    async def _say(self, message: dict[str, object]) -> None:
        await self.socket.send(json.dumps(message))

    async def _ask(self, text: str) -> None:
        content = [{"type": "input_text", "text": text}]
        await self._say({"type": "conversation.item.create", "item": {"content": content}})

    async def _listen(self) -> None:
        async for text in self.socket:
            match event := parse_event(text):
                case FrameDecided():
                    self.decided += 1
                    self.screen.progress(
                        f"{event.video_time:6.1f}s  P(silent) {event.p_silent:.3f}  "
                        f"sent {self.sent}  decided {self.decided}"
                    )
                case ItemAdded():
                    self.screen.line(f"{event.video_time:6.1f}s  user: {event.item.content[0].text}")
                case TextDone():
                    self.screen.line(f"{event.video_time:6.1f}s  assistant: {' '.join(event.text.split())}")
                case ErrorEvent():
                    self.screen.line(f"         error {event.error.code}: {event.error.message}")
                case SessionEnded():
                    self.ended = event
                    return


async def play(url: str, plan: Plan, screen: Screen) -> tuple[SessionEnded, Stats]:
    """Play the video against the server at `url`; `session.ended` and the server's statistics."""
    async with websockets.connect(f"{url.replace('http', 'ws', 1)}/v1/realtime", max_size=16 << 20) as socket:
        ended = await Viewer(socket, plan, screen).run()
    over, deadline = time.time(), time.monotonic() + REPORTED_WITHIN_S
    async with httpx.AsyncClient(timeout=30) as client:
        while True:
            answer = await client.get(f"{url}/v1/stats", params={"timeline": "true"})
            stats: Stats = answer.raise_for_status().json()
            workers = [*stats["encoders"], *stats["llms"]]
            told = bool(workers) and all(float(str(worker["at"])) > over for worker in workers)
            if told or time.monotonic() > deadline:
                return ended, stats
            await asyncio.sleep(0.2)


def make_plan(options: argparse.Namespace, config: Config) -> tuple[Plan, VideoInfo]:
    """What to play, after a look at the file. Raises VideoError."""
    info = probe(options.video)
    seconds = min(info.duration, options.max_seconds) if options.max_seconds else info.duration
    plan = Plan(Path(options.video), options.fps, seconds, config.model.frames, options.wait_s)
    return plan, info


def run(options: argparse.Namespace) -> None:
    """Start everything, play, report. Raises what `main` turns into a message."""
    screen = Screen()
    config = load_config(options.config, ["serve.port=0", *options.overrides])
    plan, info = make_plan(options, config)
    started = time.monotonic()
    screen.line(f"starting Redis, Ray and the application ({options.config})")
    with running(config) as url:
        screen.line(f"ready after {time.monotonic() - started:.0f} s at {url}")
        if config.model.checkpoint is None:
            screen.line("no trained checkpoint is set (model.checkpoint): what the assistant says is nonsense")
        screen.line(f"playing {plan.path.name}, {plan.seconds:.0f} of {info.duration:.0f} s at {plan.fps:g} FPS")
        ended, stats = asyncio.run(interruptible(play(url, plan, screen)))
    for line in report(ended, stats):
        screen.line(line)
    if options.timeline:
        draw(stats, options.timeline)
        screen.line(f"timeline: {options.timeline}")


def report(ended: SessionEnded, stats: Stats) -> list[str]:
    """The result in a few lines."""
    frames, encoder, llm = ended.frames, _first(stats["encoders"]), _first(stats["llms"])
    return [
        f"frames    received {frames.received}  encoded {encoder.get('encoded')}  "
        f"decided {frames.decided}  skipped {frames.skipped}  dropped {frames.dropped}",
        f"lag       p50 {_number(frames.lag_p50)} s  p99 {_number(frames.lag_p99)} s  (arrival to decision)",
        f"encoder   {_number(encoder.get('frames_per_s'))} frames/s while encoding, process {encoder.get('pid')}",
        f"LLM       {_number(llm.get('frames_per_s'))} frames/s while deciding, process {llm.get('pid')}; "
        f"{llm.get('responses')} responses, {llm.get('tokens')} tokens",
        f"ended     {ended.reason}",
    ]


def _first(replicas: list[dict[str, object]]) -> dict[str, object]:
    return replicas[0] if replicas else {}


def _number(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float | int) else "-"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serve.demo", description="Watch a video through the whole system.")
    parser.add_argument("--video", default=str(SAMPLE), help="any video file (default: a sample)")
    parser.add_argument("--config", default=str(REPOSITORY / "configs/embedded.yaml"))
    parser.add_argument("--fps", type=float, default=2.0, help="frames sent per second of video")
    parser.add_argument("--max-seconds", type=float, default=None, help="stop the video after that many seconds")
    parser.add_argument("--wait-s", type=float, default=180.0, help="longest wait for the end after the last frame")
    parser.add_argument("--timeline", type=Path, default=None, help="draw who worked when into this PNG")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    end_at_once_on_signal()
    try:
        run(options)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.status
    except (ConfigError, VideoError, StartError, DemoError, BusError, RedisServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (OSError, websockets.WebSocketException, httpx.HTTPError) as error:
        print(f"error: the connection to the application failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        sys.exit(main())

"""One video through the whole pipeline: decode, encode, Redis, LLM, text, each stage a process of its own.

The headline of VideoLLM-online (section 4.4): frames per second of a 5-minute clip with its replies, and the
memory it takes. Replies come on a schedule (scripted.py), so that every model does the same work. The stages
are also run alone, encoder first and LLM on what that left in Redis: overlap is the pipeline's rate over
that of the slower one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import multiprocessing
import os
import resource
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from actors.bus import Bus, BusConfig
from actors.config import Config, FrameConfig
from actors.messages import End, FramesDecided, SessionEnded
from actors.redis_server import RedisServer
from actors.runtime import limit_threads
from actors.video import encode_jpeg, read_frames
from jobs.scripted import REPLY_TOKENS, SETTINGS, scripted

log = logging.getLogger(__name__)

PAPER_FPS, PAPER_GB = 13.5, 18.2  # VideoLLM-online-7B-v1, 5-minute clips at 2 FPS, one A100 (section 4.4)
VERSIONS = {"live1": (None, ""), "live1plus": ((3, 3), ",")}
LIMITS = {"credits": 1 << 16, "max_queued_frames": 1 << 16, "partitions": 4}
KILOBYTES_PER_GB = 1e6


@dataclass(frozen=True)
class Clip:
    """What is watched: a video, begun anew until `seconds` are full, and one reply every `reply_every_s`."""

    video: Path
    seconds: float = 300.0
    fps: float = 2.0
    reply_every_s: float = 10.0

    @property
    def frames(self) -> int:
        return int(self.seconds * self.fps)

    @property
    def speaks(self) -> range:
        every = max(1, round(self.reply_every_s * self.fps))
        return range(every - 1, self.frames, every)

    def pictures(self, frames: FrameConfig) -> Iterator[bytes]:
        """JPEGs of all frames."""
        left = self.frames
        while left > 0:
            for _, _, image in read_frames(self.video, self.fps, frames.resolution_px, frames.fit):
                yield encode_jpeg(image, 95)
                left -= 1
                if left == 0:
                    return


@dataclass(frozen=True)
class Measured:
    """One version of the model: rates in frames per second, memory in GB of the processes' peaks."""

    version: str
    frames: int
    replies: int
    fps: float
    encoder_alone_fps: float
    llm_alone_fps: float
    overlap: float
    encoder_gb: float
    llm_gb: float
    peak_gb: float


@dataclass
class StreamReport:
    """`machine` says what was measured where; `notes` what a reader must know."""

    machine: dict[str, str | int | float]
    notes: list[str]
    measured: list[Measured] = field(default_factory=list)
    paper: dict[str, float] = field(default_factory=lambda: {"fps": PAPER_FPS, "peak_gb": PAPER_GB})

    def table(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.machine.items()]
        lines += ["", f"{'':<10} {'FPS':>7} {'encoder':>8} {'LLM':>7} {'overlap':>8} {'peak GB':>8} {'replies':>8}"]
        lines += [
            f"{m.version:<10} {m.fps:>7.2f} {m.encoder_alone_fps:>8.2f} {m.llm_alone_fps:>7.2f} {m.overlap:>8.2f} "
            f"{m.peak_gb:>8.2f} {m.replies:>8}"
            for m in self.measured
        ]
        lines += [f"{'paper':<10} {PAPER_FPS:>7.2f} {'':>8} {'':>7} {'':>8} {PAPER_GB:>8.2f}", "", *self.notes]
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def measure(config: Config, version: str, clip: Clip) -> Measured:
    """Both stages alone, then together."""
    config = _of_version(config, version)
    with RedisServer() as url:
        return asyncio.run(_measure(config, version, clip, url))


async def _measure(config: Config, version: str, clip: Clip, url: str) -> Measured:
    bus_config = _bus_config(config)
    bus = await Bus.connect(bus_config, url)
    try:
        async with _stage("llm", config, clip, url) as llm:
            fingerprint = await llm.told()
        async with _stage("encoder", config, clip, url) as encoder:
            await encoder.told()
            session_id, encode_s = await _encode_all(bus, config, clip, fingerprint)
            async with _stage("llm", config, clip, url) as llm:
                await llm.told()
                decide_s, _ = await _follow(bus, session_id, clip)
                both_id, started = await _open(bus, fingerprint)
                feeding = asyncio.create_task(_feed(bus, both_id, clip, config.model.frames))
                _, replies = await _follow(bus, both_id, clip)
                await feeding
                both_s = time.monotonic() - started
                llm_gb = await llm.end()
            encoder_gb = await encoder.end()
    finally:
        await bus.close()
    rates = clip.frames / encode_s, clip.frames / decide_s
    own_gb = _peak_gb()
    return Measured(
        version=version,
        frames=clip.frames,
        replies=replies,
        fps=clip.frames / both_s,
        encoder_alone_fps=rates[0],
        llm_alone_fps=rates[1],
        overlap=clip.frames / both_s / min(rates),
        encoder_gb=encoder_gb,
        llm_gb=llm_gb,
        peak_gb=encoder_gb + llm_gb + own_gb,
    )


async def _open(bus: Bus, fingerprint: str) -> tuple[str, float]:
    session_id = f"benchmark-{secrets.token_hex(4)}"
    await bus.open_session(session_id, fingerprint, SETTINGS)
    return session_id, time.monotonic()


async def _encode_all(bus: Bus, config: Config, clip: Clip, fingerprint: str) -> tuple[str, float]:
    """A session whose frames are all encoded while no LLM is there, and the seconds that took."""
    session_id, started = await _open(bus, fingerprint)
    await _feed(bus, session_id, clip, config.model.frames)
    while (await bus.reports()) and await _encoded(bus, session_id) < clip.frames:
        await asyncio.sleep(0.05)
    return session_id, time.monotonic() - started


async def _encoded(bus: Bus, session_id: str) -> int:
    return len(await bus.read_all_inputs(session_id)) - 1  # the end is input too


async def _feed(bus: Bus, session_id: str, clip: Clip, frames: FrameConfig) -> None:
    """Decode in a thread, one frame ahead of what is admitted; then say that there are no more."""
    pictures = clip.pictures(frames)
    seq = -1
    while (image := await asyncio.to_thread(next, pictures, None)) is not None:
        admitted = await bus.admit_frame(session_id, (seq + 1) / clip.fps, image, bulk=True)
        assert admitted is not None, "credits are above the clip's frames"
        seq = admitted
    await bus.send(session_id, End(after_seq=seq))


async def _follow(bus: Bus, session_id: str, clip: Clip) -> tuple[float, int]:
    """Seconds from the first to the last decision, and the responses."""
    started, decided, replies, last = 0.0, 0, 0, 0.0
    async for _, entry in bus.tail(session_id):
        if isinstance(entry, FramesDecided):
            started = started or time.monotonic()
            last = time.monotonic()
            decided += len(entry.times)
        replies += entry.kind == "response_ended"
        if isinstance(entry, SessionEnded):
            last = time.monotonic()
    if decided != clip.frames:
        raise RuntimeError(f"{decided} of {clip.frames} frames were decided: see the log of the stages")
    return max(last - started, 1e-6), replies


class Stage:
    """A worker in a process of its own."""

    def __init__(self, process: multiprocessing.process.BaseProcess, pipe: Connection) -> None:
        self._process = process
        self._pipe = pipe
        self._gb: float | None = None

    async def told(self) -> str:
        """What it says once it is ready. Raises RuntimeError when it has failed."""
        while not self._pipe.poll():
            if not self._process.is_alive():
                raise RuntimeError(f"the {self._process.name} process ended with {self._process.exitcode}")
            await asyncio.sleep(0.05)
        return str(self._pipe.recv())

    async def end(self) -> float:
        """Its peak memory in GB."""
        if self._gb is None:
            self._pipe.send("stop")
            self._gb = float(await self.told())
            await asyncio.to_thread(self._process.join)
        return self._gb


@contextlib.asynccontextmanager
async def _stage(kind: str, config: Config, clip: Clip, url: str) -> AsyncIterator[Stage]:
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_work, args=(kind, config, clip, url, there), name=kind, daemon=True)
    process.start()
    stage = Stage(process, here)
    try:
        yield stage
        await stage.end()
    finally:
        process.kill()


def _work(kind: str, config: Config, clip: Clip, url: str, pipe: Connection) -> None:
    """In the process: one worker until "stop"; then its peak memory."""
    asyncio.run(_run_worker(kind, config, clip, url, pipe))
    pipe.send(_peak_gb())


async def _run_worker(kind: str, config: Config, clip: Clip, url: str, pipe: Connection) -> None:
    from actors.encoder import build_encoder_worker
    from actors.engine import EngineConfig
    from actors.llm import build_llm_worker

    limit_threads(config.section("engine", EngineConfig).threads)
    bus = await Bus.connect(_bus_config(config), url)
    worker = build_encoder_worker(config, bus, kind) if kind == "encoder" else build_llm_worker(config, bus, kind)
    if kind == "llm":
        worker.engine.session_type = scripted(clip.speaks)  # type: ignore[union-attr]
    running = asyncio.create_task(worker.run())
    pipe.send(getattr(worker, "fingerprint", kind))
    while not running.done() and not pipe.poll():
        await asyncio.sleep(0.05)
    if not running.done():
        _receive_or_exit(pipe)
    worker.stop()
    await running
    await bus.close()


def _receive_or_exit(pipe: Connection) -> None:
    """End this process where the one that started it is gone: Redis went with it, and a worker would wait for Redis."""
    try:
        pipe.recv()
    except EOFError:
        os._exit(1)


def _of_version(config: Config, version: str) -> Config:
    """The models with that version's frames and a random connector: a checkpoint is made for one kind of frame."""
    pooled, separator = VERSIONS[version]
    frames = FrameConfig(
        resolution_px=config.model.frames.resolution_px, cls=True, pooled=pooled, separator=separator
    ).model_dump(mode="json")
    model = {**config.sections["model"], "frames": frames, "checkpoint": None}
    engine = {**config.sections.get("engine", {}), "untrained": True}
    return Config({**config.sections, "model": model, "engine": engine}, config.source)


def _bus_config(config: Config) -> BusConfig:
    return BusConfig.model_validate({**config.sections.get("bus", {}), **LIMITS, "reclaim_idle_ms": 60_000})


def _peak_gb() -> float:
    import torch

    on_device = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    return on_device or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KILOBYTES_PER_GB


def schedule(clip: Clip) -> str:
    """In words."""
    count = len(clip.speaks)
    return f"{count} replies of {REPLY_TOKENS} tokens, one every {clip.reply_every_s:g} s, {clip.frames} frames"

"""What the bus costs: core time and memory of frames and sessions on a real server, measured.

The core times are those of processes, not of a clock on the wall, so other work on the machine
disturbs them little. One process plays gateway, encoder and LLM replica in turn; what each of them
spends is told apart by when it works.
"""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch

from actors.bus import Bus, BusConfig, Lease
from actors.messages import FramesDecided, FrameTokens, LogEntry, SessionSettings
from actors.redis_server import RedisServer
from actors.tasks import end_all
from jobs.capacity_model import LoadConfig, RedisCosts, ServedConfig

SESSIONS = 32
FRAMES = 30
LISTENERS = 8
ANNOUNCED = 1000
CONFIG = BusConfig(partitions=16, credits=100_000, max_queued_frames=100_000, lease_ms=3_600_000)
MODEL = "capacity"
PROBE = "probe"
PATIENCE_S = 300.0


@dataclass(frozen=True)
class Comparison:
    """Memory that the formula gives and that the server says, in bytes, of `sessions` with `frames` each."""

    sessions: int
    frames: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


class Measurement:
    """One server, one connection, and what has been spent since the last look."""

    def __init__(self, bus: Bus, image: bytes, tokens: torch.Tensor) -> None:
        self._bus = bus
        self._image = image
        self._tokens = tokens

    async def memory(self) -> float:
        return await self._info("used_memory_dataset")

    async def server_s(self) -> float:
        return await self._info("used_cpu_user") + await self._info("used_cpu_sys")

    async def spent(self, work: Callable[[], Awaitable[None]]) -> tuple[float, float]:
        """Core seconds of this process and of the server."""
        server, own = await self.server_s(), _own_s()
        await work()
        return _own_s() - own, await self.server_s() - server

    async def open(self, names: list[str]) -> list[Lease]:
        for name in names:
            await self._bus.open_session(name, MODEL, SessionSettings())
        partitions = range(self._bus.config.partitions)
        return [lease for part in partitions for lease in await self._bus.claim("replica", MODEL, part, len(names))]

    async def admit(self, names: list[str], frames: int) -> None:
        for number in range(frames):
            for name in names:
                await self._bus.admit_frame(name, number / 2, self._image)

    async def encode(self, count: int) -> None:
        done = 0
        while done < count:
            for pending in await self._bus.read_frames("encoder", 16, 1000):
                tokens = FrameTokens.from_tensor(pending.frame.seq, pending.frame.time, self._tokens)
                await self._bus.publish(pending, tokens)
                done += 1

    async def decide(self, leases: list[Lease], frames: int) -> None:
        cursors = {lease.session_id: "0-0" for lease in leases}
        for partition in range(self._bus.config.partitions):
            held = {name: cursor for name, cursor in cursors.items() if self._bus.partition(name) == partition}
            while held and (items := await self._bus.read_inputs(held, 0, partition)):
                held |= {name: entry_id for name, entry_id, _ in items}
        for number in range(frames):
            for lease in leases:
                entry = FramesDecided(first_seq=number, times=[number / 2], p_silent=[0.9])
                await self._bus.append(lease, number, [entry], number + 1)

    async def follow(self, names: list[str], frames: int) -> None:
        for name in names:
            tail = cast("AsyncGenerator[tuple[int, LogEntry], None]", self._bus.tail(name))
            async with aclosing(tail):
                async for position, _ in tail:
                    if position == frames - 1:
                        break

    async def announce(self, count: int) -> None:
        for number in range(count):
            await self._bus.client.run("", ("PUBLISH", self._bus.keys.ready, f"live:{number % 16}"))

    async def _info(self, name: str) -> float:
        [info] = (await self._bus.client.infos()).values()
        return float(str(info[name]))


async def measure(load: LoadConfig, served: ServedConfig) -> tuple[RedisCosts, list[Comparison]]:
    """Costs of the bus on the embedded server; how well the formula for memory holds at other sizes."""
    image = bytes(int(load.image_kb * 1000))
    tokens = torch.zeros(1, int(served.frame_tokens_bytes / 2), dtype=torch.float16)
    with RedisServer({"maxmemory": "4gb"}) as url:
        bus = await Bus.connect(CONFIG, url)
        try:
            costs = await _costs(Measurement(bus, image, tokens), bus, len(image), served.frame_tokens_bytes)
            checks = [
                await _check(url, image, tokens, costs, sessions, frames) for sessions, frames in ((8, 60), (48, 10))
            ]
        finally:
            await bus.close()
    return costs, checks


async def _costs(work: Measurement, bus: Bus, image_bytes: int, tokens_bytes: float) -> RedisCosts:
    names, total = [f"session-{number}" for number in range(SESSIONS)], SESSIONS * FRAMES
    await work.open(["warm"])
    await work.admit(["warm"], 2)
    await work.encode(2)
    empty = await work.memory()
    leases = await work.open(names)
    opened = await work.memory()
    gateway = await work.spent(lambda: work.admit(names, FRAMES))
    queued = await work.memory()
    encoder = await work.spent(lambda: work.encode(total))
    encoded = await work.memory()
    owner = await work.spent(lambda: work.decide(leases, FRAMES))
    decided = await work.memory()
    tail = await work.spent(lambda: work.follow(names, FRAMES))
    silent = await work.spent(lambda: work.announce(ANNOUNCED))
    heard = await _with_listeners(bus, work)
    us = 1e6 / total
    return RedisCosts(
        server_us=(gateway[1] + encoder[1] + owner[1] + tail[1]) * us,
        gateway_us=(gateway[0] + tail[0]) * us,
        encoder_us=encoder[0] * us,
        owner_us=owner[0] * us,
        announce_us=max(heard[1] - silent[1], 0) / ANNOUNCED / LISTENERS * 1e6,
        hear_us=max(heard[0] - silent[0], 0) / ANNOUNCED / LISTENERS * 1e6,
        session_bytes=(opened - empty) / SESSIONS,
        queued_overhead_bytes=(queued - opened) / total - image_bytes,
        input_overhead_bytes=(encoded - opened) / total - tokens_bytes,
        log_entry_bytes=(decided - encoded) / total,
    )


async def _with_listeners(bus: Bus, work: Measurement) -> tuple[float, float]:
    """What announcements cost with encoders that hear them, all in this process."""
    heard = 0
    done = asyncio.Event()

    async def listen() -> None:
        nonlocal heard
        async for announced in bus.announcements():
            heard += announced not in (None, PROBE)
            if heard >= ANNOUNCED * LISTENERS:
                done.set()

    probe = ("PUBLISH", bus.keys.ready, PROBE)
    others = await bus.client.run("", probe)  # the bus's own encoder side listens, too
    assert isinstance(others, int)
    listeners = [asyncio.create_task(listen()) for _ in range(LISTENERS)]
    async with asyncio.timeout(PATIENCE_S):
        while await bus.client.run("", probe) != others + LISTENERS:
            await asyncio.sleep(0.01)

    async def announce() -> None:
        await work.announce(ANNOUNCED)
        await asyncio.wait_for(done.wait(), PATIENCE_S)

    try:
        return await work.spent(announce)
    finally:
        await end_all(listeners)


async def _check(
    url: str, image: bytes, tokens: torch.Tensor, costs: RedisCosts, sessions: int, frames: int
) -> Comparison:
    """The formula against a server that holds another number of sessions, with another number of frames each."""
    bus = await Bus.connect(CONFIG.model_copy(update={"prefix": f"check-{sessions}:"}), url)
    try:
        work, names = Measurement(bus, image, tokens), [f"session-{number}" for number in range(sessions)]
        before = await work.memory()
        leases = await work.open(names)
        await work.admit(names, frames)
        await work.encode(sessions * frames)
        await work.decide(leases, frames)
        used = await work.memory() - before
    finally:
        await bus.close()
    return Comparison(sessions, frames, memory_bytes(costs, tokens.numel() * 2, sessions, frames), used)


def memory_bytes(costs: RedisCosts, tokens_bytes: float, sessions: int, frames: int) -> float:
    """What sessions with so many decided frames each take in Redis, of which the tokens have so many bytes each."""
    frame = tokens_bytes + costs.input_overhead_bytes + costs.log_entry_bytes
    return sessions * (costs.session_bytes + frames * frame)


def save(path: Path, costs: RedisCosts, checks: list[Comparison], machine: str) -> None:
    told = {"machine": machine, "costs": asdict(costs), "checks": [asdict(check) for check in checks]}
    path.write_text(json.dumps(told, indent=2) + "\n")


def load_costs(path: Path) -> RedisCosts:
    """Costs that `save` wrote. Raises ValueError for another file."""
    try:
        return RedisCosts(**json.loads(path.read_text())["costs"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} has no costs of the bus ({error}): make it with `python -m jobs.capacity --redis`"
        ) from None


def _own_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

"""What a chaos run does to the application: each fault from its beginning to the moment its cause is gone.

A fault is a coroutine that returns once its cause is gone (a process replaced by nobody yet, a server that answers
again); how long sessions take from there is what the run measures. Victims are chosen by the seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress

import httpx
import websockets
from websockets.exceptions import WebSocketException

from actors.redis_address import parse
from actors.redis_client import SingleClient
from jobs.chaos_application import DURABLE, Application, ChaosError, ReplicaStats, is_alive
from jobs.chaos_client import FPS

PAUSE_S = 10.0
SLOW_OWNER_S = 5.0
FULL_S = 5.0
OVERLOAD_S = 10.0
STORM = 40
FLOOD_FPS = 20.0
DRAIN_NOTICE_S = 10

Fault = Callable[[Application, random.Random, bytes], Awaitable[str]]


async def kill_llm(app: Application, chosen: random.Random, picture: bytes) -> str:
    """SIGKILL of an LLM replica that holds sessions."""
    return await _kill(app, "llms", chosen)


async def kill_encoder(app: Application, chosen: random.Random, picture: bytes) -> str:
    """SIGKILL of an encoder, most likely in a batch."""
    return await _kill(app, "encoders", chosen)


async def kill_gateway(app: Application, chosen: random.Random, picture: bytes) -> str:
    """SIGKILL of a gateway with clients."""
    return await _kill(app, "gateways", chosen)


async def stop_owner(app: Application, chosen: random.Random, picture: bytes) -> str:
    """An LLM replica stands still for longer than its lease, then wakes up and finds itself replaced."""
    victim = await _victim(app, "llms", chosen)
    with _stopped(victim["pid"]):
        await asyncio.sleep(SLOW_OWNER_S)
    return f"pid {victim['pid']} for {SLOW_OWNER_S:g} s"


async def pause_redis(app: Application, chosen: random.Random, picture: bytes) -> str:
    """Redis stands still for ten seconds."""
    assert app.redis.pid is not None
    with _stopped(app.redis.pid):
        await asyncio.sleep(PAUSE_S)
    return f"{PAUSE_S:g} s"


async def reset_connections(app: Application, chosen: random.Random, picture: bytes) -> str:
    """Every connection to Redis is cut."""
    async with asking(app.redis_url) as client:
        killed = [await client.run("", ("CLIENT", "KILL", "TYPE", kind)) for kind in ("normal", "pubsub")]
    return f"{sum(int(str(number)) for number in killed)} connections"


async def crash_redis(app: Application, chosen: random.Random, picture: bytes) -> str:
    """Redis is killed and started again with what `appendfsync always` has kept."""
    await asyncio.to_thread(_restart_redis, app)
    return "killed, started again"


async def fill_redis(app: Application, chosen: random.Random, picture: bytes) -> str:
    """Redis has no memory left for a while."""
    async with asking(app.redis_url) as client:
        await client.run("", ("CONFIG", "SET", "maxmemory", 1 << 20))
        try:
            await asyncio.sleep(FULL_S)
        finally:
            await client.run("", ("CONFIG", "SET", "maxmemory", DURABLE["maxmemory"]))
    return f"{FULL_S:g} s"


async def drain(app: Application, chosen: random.Random, picture: bytes) -> str:
    """`serve.drain`: clients are told, sent away with 1012, and taken again once it is called off."""
    for words in (["--notice", str(DRAIN_NOTICE_S)], ["--cancel"]):
        environment = {**os.environ, "RAY_ADDRESS": app.cluster}
        command = [sys.executable, "-m", "serve.drain", *words]
        await asyncio.to_thread(
            subprocess.run, command, env=environment, timeout=180, check=False, stdout=subprocess.DEVNULL
        )
    return f"notice {DRAIN_NOTICE_S} s"


async def redeploy(app: Application, chosen: random.Random, picture: bytes) -> str:
    """Nobody is told: every replica is replaced, LLMs and encoders are one fewer, and once more, as many as before."""
    for replicas in (max(1, app.replicas - 1), app.replicas):
        fewer = [f"serve.{role}={replicas}" for role in ("encoders", "llms")]
        environment = {**os.environ, "RAY_ADDRESS": app.cluster, "REDIS_URL": app.redis_url, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "serve.redeploy", str(app.settings), *fewer]
        done = await asyncio.to_thread(
            subprocess.run, command, env=environment, timeout=600, check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise ChaosError(f"not redeployed: {done.stderr[-400:]}")
    return "twice, without notice"


async def overload(app: Application, chosen: random.Random, picture: bytes) -> str:
    """Clients that flood, that never read, and that come and go, beside those that are admitted."""
    dropped = await asyncio.gather(
        *(_stream(app, picture, FLOOD_FPS, reads) for reads in (True, True, False, False)), _storm(app, chosen)
    )
    return f"{sum(dropped)} frames of floods dropped and counted"


async def join(app: Application, chosen: random.Random, picture: bytes) -> str:
    """As many more sessions as flood in `overload`, each at its rate: what a flood is to be compared with."""
    dropped = await asyncio.gather(*(_stream(app, picture, FPS, True) for _ in range(4)))
    return f"4 within their rate, {sum(dropped)} of their frames dropped"


FAULTS: dict[str, Fault] = {
    "llm killed": kill_llm,
    "encoder killed": kill_encoder,
    "gateway killed": kill_gateway,
    "owner stopped": stop_owner,
    "redis paused": pause_redis,
    "connections reset": reset_connections,
    "redis crashed": crash_redis,
    "redis full": fill_redis,
    "drain": drain,
    "redeployed": redeploy,
    "joined": join,
    "overload": overload,
}


@contextlib.asynccontextmanager
async def asking(url: str) -> AsyncIterator[SingleClient]:
    """A connection to Redis beside those of the application. What fails raises redis-py's errors."""
    client = SingleClient(parse(url), timeout_s=10)
    try:
        yield client
    finally:
        await client.close()


def lose_data(app: Application) -> None:
    """Start Redis again with nothing in it."""
    _restart_redis(app, empty=True)


def _restart_redis(app: Application, empty: bool = False) -> None:
    assert app.redis.pid is not None
    os.kill(app.redis.pid, signal.SIGKILL)
    app.redis.stop()
    if empty:
        shutil.rmtree(app.data)
        app.data.mkdir()
    app.redis.start()


async def _kill(app: Application, role: str, chosen: random.Random) -> str:
    victim = await _victim(app, role, chosen)
    os.kill(victim["pid"], signal.SIGKILL)
    return f"pid {victim['pid']}"


async def _victim(app: Application, role: str, chosen: random.Random) -> ReplicaStats:
    """One of those with sessions, if any has some."""
    found: list[ReplicaStats] = []
    for _ in range(30):
        with suppress(httpx.HTTPError):
            found = (await asyncio.to_thread(app.stats))[role]
        found = [replica for replica in found if is_alive(replica["pid"])]  # a dead one's report lasts a while
        if found:
            busy = [replica for replica in found if replica.get("sessions")]
            return chosen.choice(sorted(busy or found, key=lambda replica: replica["pid"]))
        await asyncio.sleep(1)
    raise ChaosError(f"no {role} report: {app.log_tail()}")


@contextlib.contextmanager
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def _stream(app: Application, picture: bytes, fps: float, reads: bool) -> int:
    """A session of video that is said to be of `FPS` and comes at `fps`; how many frames the server says it dropped."""
    dropped = 0
    try:
        queued = None if reads else 1
        async with websockets.connect(_realtime(app), max_size=None, max_queue=queued, close_timeout=1) as socket:
            wishes = {
                "include": ["frame_decided"],
                "max_output_tokens": 4,
                "video": {"fps": FPS, "drop_policy": "latest"},
            }
            await socket.send(json.dumps({"type": "session.update", "session": wishes}))
            for index in range(int(OVERLOAD_S * fps)):
                await socket.send(struct.pack(">Bd", 1, index / FPS) + picture)
                await asyncio.sleep(1 / fps)
            if reads:
                await socket.send(json.dumps({"type": "input_video_buffer.end"}))
                async with asyncio.timeout(60):
                    while (event := json.loads(await socket.recv()))["type"] != "session.ended":
                        pass
                dropped = event["frames"]["dropped"]
    except (WebSocketException, OSError, TimeoutError):
        return dropped
    return dropped


async def _storm(app: Application, chosen: random.Random) -> int:
    """Connections that come and go without a word."""

    async def visit() -> None:
        await asyncio.sleep(chosen.uniform(0, OVERLOAD_S))
        with suppress(WebSocketException, OSError, TimeoutError):
            async with websockets.connect(_realtime(app), open_timeout=15):
                pass

    await asyncio.gather(*(visit() for _ in range(STORM)))
    return 0


def _realtime(app: Application) -> str:
    return f"{app.url.replace('http', 'ws', 1)}/v1/realtime"

"""Reaching Redis: what is refused at the start, and what happens while it is away, full or has lost its data."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator

import pytest
from pydantic import ValidationError
from redis.asyncio import Redis

from actors.bus import Bus, BusConfig, BusError, Lease
from actors.messages import FramesDecided, FrameSkipped, Interrupt, SessionEnded, SessionSettings
from actors.redis_server import RedisServer

pytestmark = pytest.mark.anyio


def decided(seq: int) -> FramesDecided:
    return FramesDecided(first_seq=seq, times=[seq / 2], p_silent=[0.9])


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A server that a test may stop, pause and fill."""
    server = RedisServer()
    server.start()
    yield server
    if server.pid is not None:
        os.kill(server.pid, signal.SIGCONT)
    server.stop()


def url_of(server: RedisServer) -> str:
    return f"redis://:{server._password}@127.0.0.1:{server.port}/0"


@pytest.fixture
async def own(server: RedisServer) -> AsyncIterator[Bus]:
    """A bus on that server that gives up quickly."""
    bus = await Bus.connect(BusConfig(partitions=2, retry_s=1.0), url_of(server))
    yield bus
    await bus.close()


async def refusal(url: str | None, **settings: object) -> str:
    with pytest.raises(BusError) as error:
        await Bus.connect(BusConfig.model_validate(settings), url)
    return str(error.value)


async def test_an_unreachable_server_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.bus.CONNECT_RETRY_S", 0.1)
    said = await refusal("redis://user:secret@127.0.0.1:1/0")
    assert said == "redis_unreachable: no answer from Redis at 127.0.0.1:1 (ConnectionError): is it running?"


async def test_a_wrong_password_is_refused_without_printing_it(server: RedisServer) -> None:
    for url in (f"redis://:secret@127.0.0.1:{server.port}/0", f"redis://127.0.0.1:{server.port}/0"):
        said = await refusal(url)
        assert said.startswith(f"redis_auth: Redis at 127.0.0.1:{server.port} refuses the user or password")
        assert "secret" not in said


@pytest.mark.parametrize("url", ["http://:secret@host/0", "redis://:sec#ret@host:port/0", "redis://:s@host:99999999/0"])
async def test_an_address_that_is_none_is_refused_without_printing_it(url: str) -> None:
    said = await refusal(url)
    assert said.startswith("redis_address: the Redis address is not of the form redis[s]://")
    assert "sec" not in said.replace("redis_address", "")


async def test_without_any_address_the_error_says_where_to_give_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    assert "set REDIS_URL or bus.url" in await refusal(None)


async def test_the_environment_gives_the_address_when_the_settings_do_not(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    bus = await Bus.connect(BusConfig(prefix="environment:"))
    await bus.close()


def test_settings_do_not_print_the_address() -> None:
    assert "secret" not in repr(BusConfig(url="redis://:secret@host/0"))


@pytest.mark.parametrize("settings", [{"prefix": "{a}"}, {"partitions": 0}, {"lease": 2}, {"credits": "many"}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        BusConfig.model_validate(settings)


async def test_a_policy_that_evicts_is_refused(server: RedisServer) -> None:
    async with Redis.from_url(url_of(server)) as redis:
        await redis.config_set("maxmemory-policy", "allkeys-lru")
    said = await refusal(url_of(server))
    assert "has maxmemory-policy allkeys-lru, expected noeviction" in said
    assert "CONFIG SET maxmemory-policy noeviction" in said


@pytest.mark.parametrize(("version", "accepted"), [("6.0.16", False), ("5", False), ("6.2.0", True), ("10.0", True)])
async def test_a_server_that_is_too_old_is_refused(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, version: str, accepted: bool
) -> None:
    async def info(self: object) -> dict[str, object]:
        return {"redis_version": version, "maxmemory_policy": "noeviction"}

    monkeypatch.setattr(Redis, "info", info)
    if accepted:
        await (await Bus.connect(BusConfig(), url_of(server))).close()
    else:
        assert f"is version {version}, expected 6.2 or newer" in await refusal(url_of(server))


async def test_another_number_of_partitions_is_refused_with_both(connect, redis_url: str) -> None:
    bus = await connect(partitions=4)
    said = await refusal(redis_url, prefix=bus.config.prefix, partitions=8)
    assert "has 4 partitions, bus.partitions is 8" in said
    await (await Bus.connect(BusConfig(prefix=f"{bus.config.prefix}other:", partitions=8), redis_url)).close()


async def test_the_generation_is_the_same_for_all_until_the_data_is_lost(server: RedisServer, own: Bus) -> None:
    other = await Bus.connect(own.config, url_of(server))
    before = await own.generation()
    assert await other.generation() == before
    server.stop()
    server.start()
    after = await own.generation()
    assert after != before
    assert await other.generation() == after
    await other.close()


async def test_every_call_ends_with_an_error_when_the_server_stays_away(server: RedisServer, own: Bus) -> None:
    await own.open_session("a", "model-a", SessionSettings())
    [lease] = await own.claim("replica", "model-a", own.partition("a"), 1)
    await own.admit_frame("a", 0.0, b"jpeg")
    [pending] = await own.read_frames("encoder", 1, 1000)
    tail = own.tail("a")
    waiting = [asyncio.create_task(work) for work in (anext(tail), own.read_inputs({"a": "0-0"}, 2000, 0))]
    server.stop()
    calls = [
        own.open_session("b", "model-a", SessionSettings()),
        own.session_meta("a"),
        own.admit_frame("a", 0.0, b"jpeg"),
        own.send("a", Interrupt(after_seq=-1)),
        own.touch("a"),
        own.abandon("a", "test"),
        own.read_frames("encoder", 1, 1000),
        own.publish(pending, FrameSkipped(seq=0, time=0.0, reason="test")),
        own.claim("replica", "model-a", 0, 1),
        own.renew([lease]),
        own.release(lease),
        own.append(lease, 0, [decided(0)], 1),
        own.read_log("a"),
        own.read_all_inputs("a"),
        own.trim(lease, b"", "0-0", 0),
        own.end_session(lease),
        own.generation(),
    ]
    async with asyncio.timeout(10):
        answers = await asyncio.gather(*waiting, *calls, return_exceptions=True)
    assert {getattr(answer, "code", answer) for answer in answers} == {"redis_unreachable"}
    await tail.aclose()


async def test_a_session_goes_on_after_a_short_pause_of_the_server(server: RedisServer) -> None:
    bus = await Bus.connect(BusConfig(partitions=2, retry_s=20.0, timeout_s=3.0), url_of(server))
    await bus.open_session("a", "model-a", SessionSettings())
    [lease] = await bus.claim("replica", "model-a", bus.partition("a"), 1)
    tail = bus.tail("a")
    following = asyncio.create_task(anext(tail))
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    work = asyncio.gather(bus.append(lease, 0, [decided(0)], 1), bus.admit_frame("a", 0.0, b"jpeg"))
    await asyncio.wait([asyncio.ensure_future(work)], timeout=3.5)
    assert not work.done()
    os.kill(server.pid, signal.SIGCONT)
    async with asyncio.timeout(20):
        answer, seq = await work
        assert (answer in ("ok", "duplicate"), seq) == (True, 0)
        assert await following == (0, decided(0))
    meta = await bus.session_meta("a")
    assert meta is not None
    assert (meta.position, meta.admitted) == (1, 1)
    await tail.aclose()
    await bus.close()


async def test_after_a_restart_without_data_sessions_have_expired_and_new_ones_work(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.tails.CHECK_S", 0.1)
    bus = await Bus.connect(BusConfig(partitions=2), url_of(server))
    await bus.open_session("a", "model-a", SessionSettings())
    [lease] = await bus.claim("replica", "model-a", bus.partition("a"), 1)
    assert await bus.read_frames("encoder", 1, 10) == []
    tail = bus.tail("a")
    following = asyncio.create_task(anext(tail))
    while not bus._tails:
        await asyncio.sleep(0)
    server.stop()
    server.start()
    assert await bus.renew([lease]) == [lease]
    assert await bus.append(lease, 0, [decided(0)], 1) == "stale"
    for call in (bus.admit_frame("a", 0.0, b"jpeg"), asyncio.wait_for(following, 20)):
        with pytest.raises(BusError, match="session_expired"):
            await call
    await bus.open_session("b", "model-a", SessionSettings())
    await bus.admit_frame("b", 0.0, b"jpeg")
    async with asyncio.timeout(10):
        while not (frames := await bus.read_frames("encoder", 1, 500)):
            pass
    assert frames[0].frame.session_id == "b"
    assert [item.session_id for item in await bus.claim("replica", "model-a", bus.partition("b"), 1)] == ["b"]
    await tail.aclose()
    await bus.close()


async def test_a_full_server_admits_nothing_but_lets_owners_go_on_and_make_room(server: RedisServer, own: Bus) -> None:
    await own.open_session("a", "model-a", SessionSettings())
    await own.open_session("b", "model-a", SessionSettings())
    leases = {lease.session_id: lease for part in range(2) for lease in await own.claim("replica", "model-a", part, 9)}
    await own.append(leases["a"], 0, [decided(0)], 1)
    await own.admit_frame("a", 0.0, b"jpeg")
    [pending] = await own.read_frames("encoder", 1, 1000)
    async with Redis.from_url(url_of(server)) as redis:
        await redis.config_set("maxmemory", "1")
        for call in (
            own.open_session("c", "model-a", SessionSettings()),
            own.admit_frame("a", 0.0, b"jpeg"),
            own.send("a", Interrupt(after_seq=-1)),
            own.append(leases["a"], 1, [decided(1)], 2),
            own.publish(pending, FrameSkipped(seq=0, time=0.0, reason="test")),
        ):
            with pytest.raises(BusError, match="redis_full"):
                await call
        assert await own.renew(list(leases.values())) == []
        await own.touch("a")
        assert await own.trim(leases["a"], b"window", "0-0", 1)
        assert await own.release(leases["b"])
        [again] = await own.claim("replica", "model-a", own.partition("b"), 1)
        assert await own.end_session(again)
        await redis.config_set("maxmemory", "0")
    assert await own.publish(pending, FrameSkipped(seq=0, time=0.0, reason="test")) == "ok"
    assert await own.append(leases["a"], 1, [SessionEnded(reason="done")], 2) == "ok"
    assert await own.admit_frame("a", 0.5, b"jpeg") == 1


async def test_connections_that_are_reset_are_made_again(own: Bus, server: RedisServer) -> None:
    await own.open_session("a", "model-a", SessionSettings())
    tail = own.tail("a")
    following = asyncio.create_task(anext(tail))
    reading = asyncio.create_task(own.read_frames("encoder", 1, 10_000))
    async with asyncio.timeout(20), Redis.from_url(url_of(server)) as redis:
        while len(await redis.client_list()) < 4:
            await asyncio.sleep(0.01)
        for client in await redis.client_list():
            if client["id"] != str(await redis.client_id()):
                await redis.client_kill_filter(_id=client["id"])
        await own.admit_frame("a", 0.0, b"jpeg")
        assert [pending.frame.seq for pending in await reading] == [0]
        await own.append(Lease("a", 0), 0, [decided(0)], 1)
        assert await following == (0, decided(0))
    await tail.aclose()


async def test_an_idle_bus_hardly_asks_anything(own: Bus, server: RedisServer) -> None:
    """One encoder and one tail at rest: what they ask stays far below one command a millisecond."""
    await own.open_session("a", "model-a", SessionSettings())
    tail = own.tail("a")
    following = asyncio.create_task(anext(tail))
    await own.read_frames("encoder", 1, 10)
    async with Redis.from_url(url_of(server)) as redis:
        before, start = (await redis.info("stats"))["total_commands_processed"], time.monotonic()
        await own.read_frames("encoder", 1, 1000)
        asked = (await redis.info("stats"))["total_commands_processed"] - before
        assert asked < 60 * (time.monotonic() - start)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await tail.aclose()


async def test_a_task_that_asks_again_and_again_ends_with_its_first_cancellation(own: Bus) -> None:
    """At whichever step of sending and reading it comes: Python 3.11 forgets one that comes as the sending ends."""

    async def forever() -> None:
        while True:
            await own.session_meta("a")

    for steps in range(40):
        task = asyncio.create_task(forever())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=5)
        assert task.cancelled(), f"it went on when it was cancelled after {steps} steps"

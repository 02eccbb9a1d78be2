"""Frames through the encoders' group, against a real server."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
import torch
from redis.asyncio import Redis

from actors.bus import Bus, PendingFrame
from actors.messages import Frame, FrameSkipped, FrameTokens, SessionSettings, encode

pytestmark = pytest.mark.anyio


def tokens(pending: PendingFrame) -> FrameTokens:
    frame = pending.frame
    return FrameTokens.from_tensor(frame.seq, frame.time, torch.zeros(2, 3, dtype=torch.float16))


async def opened(bus: Bus, *names: str) -> None:
    for name in names:
        await bus.open_session(name, "model-a", SessionSettings())


async def read_until(bus: Bus, consumer: str, count: int = 8) -> list[PendingFrame]:
    """The next frames that come, however long reclaiming them takes."""
    async with asyncio.timeout(10):
        while not (found := await bus.read_frames(consumer, count, 200)):
            pass
    return found


async def input_of(bus: Bus, session_id: str) -> list[object]:
    return [message for _, message in await bus.read_all_inputs(session_id)]


async def pending_count(redis: Redis, stream: str) -> int:
    return (await redis.xpending(stream, "encoders"))["pending"]


async def test_a_frame_arrives_as_it_was_admitted_with_its_seq(bus: Bus) -> None:
    await opened(bus, "a")
    await bus.admit_frame("a", 0.0, b"first")
    await bus.admit_frame("a", 0.1 + 0.2, b"second")
    found = await bus.read_frames("encoder", 8, 1000)
    assert [(pending.frame, pending.deliveries) for pending in found] == [
        (Frame(session_id="a", seq=0, time=0.0, image=b"first"), 1),
        (Frame(session_id="a", seq=1, time=0.1 + 0.2, image=b"second"), 1),
    ]


async def test_publishing_moves_a_frame_from_the_queue_to_its_session(bus: Bus, redis_url: str) -> None:
    await opened(bus, "a")
    await bus.admit_frame("a", 0.0, b"jpeg")
    [pending] = await bus.read_frames("encoder", 8, 1000)
    assert await bus.publish(pending, tokens(pending)) == "ok"
    assert await input_of(bus, "a") == [tokens(pending)]
    async with Redis.from_url(redis_url) as redis:
        assert await redis.xlen(pending.stream) == 0
        assert await pending_count(redis, pending.stream) == 0


async def test_publishing_again_changes_nothing(bus: Bus) -> None:
    await opened(bus, "a")
    await bus.admit_frame("a", 0.0, b"jpeg")
    [pending] = await bus.read_frames("encoder", 8, 1000)
    await bus.publish(pending, tokens(pending))
    assert await bus.publish(pending, FrameSkipped(seq=0, time=0.0, reason="late")) == "duplicate"
    assert await input_of(bus, "a") == [tokens(pending)]


async def test_a_result_for_another_frame_is_refused(bus: Bus) -> None:
    await opened(bus, "a")
    await bus.admit_frame("a", 0.0, b"jpeg")
    [pending] = await bus.read_frames("encoder", 8, 1000)
    with pytest.raises(ValueError, match="result of frame 1 was published for frame 0"):
        await bus.publish(pending, FrameSkipped(seq=1, time=0.0, reason="confused"))


@pytest.mark.parametrize("how", ["ended", "vanished"])
async def test_frames_of_a_session_that_is_gone_are_only_acknowledged(bus: Bus, redis_url: str, how: str) -> None:
    await opened(bus, "a")
    await bus.admit_frame("a", 0.0, b"jpeg")
    [pending] = await bus.read_frames("encoder", 8, 1000)
    async with Redis.from_url(redis_url) as redis:
        if how == "ended":
            await bus.abandon("a", "test")
        else:
            await redis.delete(*bus.session_keys("a"))
        assert await bus.publish(pending, tokens(pending)) == "gone"
        assert await redis.xlen(bus.keys.input(bus.partition("a"), "a")) == 0
        assert await redis.xlen(pending.stream) == 0
        assert await pending_count(redis, pending.stream) == 0


async def test_a_frame_wakes_an_encoder_that_waits(bus: Bus, connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.encoder_side.POLL_S", 1e6)
    encoder = await connect(reclaim_idle_ms=10**9)
    await opened(bus, "a")
    assert await encoder.read_frames("encoder", 8, 50) == []
    waiting = asyncio.create_task(encoder.read_frames("encoder", 8, 60_000))
    async with asyncio.timeout(10):
        while not encoder._news._waiters:
            await asyncio.sleep(0)
    await bus.admit_frame("a", 0.0, b"jpeg")
    assert len(await asyncio.wait_for(waiting, 10)) == 1


async def test_a_lost_announcement_delays_a_frame_but_loses_nothing(
    bus: Bus, connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.encoder_side.POLL_S", 0.1)
    encoder = await connect()
    await opened(bus, "a")
    assert await encoder.read_frames("encoder", 8, 50) == []
    await encoder.close_listener()
    monkeypatch.setattr(encoder, "_listen", lambda: asyncio.Event().wait())
    await bus.admit_frame("a", 0.0, b"jpeg")
    assert len(await asyncio.wait_for(encoder.read_frames("encoder", 8, 60_000), 10)) == 1


async def test_live_frames_come_before_recorded_ones(bus: Bus) -> None:
    await opened(bus, "a", "b")
    for seq in range(3):
        await bus.admit_frame("a", seq / 2, b"recorded", bulk=True)
        await bus.admit_frame("b", seq / 2, b"live")
    images = [[pending.frame.image for pending in await bus.read_frames("encoder", 2, 1000)] for _ in range(4)]
    assert images == [[b"live", b"live"], [b"live"], [b"recorded", b"recorded"], [b"recorded"]]


async def test_an_encoder_holds_no_more_than_it_asked_for(bus: Bus, connect) -> None:
    names = [f"session-{number}" for number in range(12)]
    await opened(bus, *names)
    for name in names:
        for seq in range(4):
            await bus.admit_frame(name, seq / 2, b"jpeg")
    assert {bus.partition(name) for name in names} == {0, 1, 2, 3}
    busy, idle = await connect(), await connect()
    assert len(await busy.read_frames("busy", 8, 1000)) == 8
    others = [len(await idle.read_frames("idle", 8, 1000)) for _ in range(5)]
    assert others == [8] * 5


async def test_all_partitions_get_their_share(bus: Bus) -> None:
    names = ["a", "b", "session-1", "session-2"]
    assert sorted(bus.partition(name) for name in names) == [0, 1, 2, 3]
    await opened(bus, *names)
    for name in names:
        for seq in range(8):
            await bus.admit_frame(name, seq / 2, b"jpeg")
    for _ in range(4):
        found = await bus.read_frames("encoder", 8, 1000)
        assert Counter(pending.frame.session_id for pending in found) == dict.fromkeys(names, 2)


async def test_two_encoders_share_the_frames_and_none_is_encoded_twice(bus: Bus, connect) -> None:
    await opened(bus, "a", "b")
    first, second, seen = await connect(), await connect(), Counter[tuple[str, int]]()

    async def encode_all(encoder: Bus, name: str) -> None:
        while seen.total() < 40:
            for pending in await encoder.read_frames(name, 3, 100):
                seen[pending.frame.session_id, pending.frame.seq] += 1
                await encoder.publish(pending, tokens(pending))

    async def admit() -> None:
        for seq in range(20):
            await bus.admit_frame("a", seq / 2, b"jpeg")
            await bus.admit_frame("b", seq / 2, b"jpeg")

    async with asyncio.timeout(20):
        await asyncio.gather(encode_all(first, "first"), encode_all(second, "second"), admit())
    assert set(seen.values()) == {1}
    for name in ("a", "b"):
        assert sorted(message.seq for message in await input_of(bus, name)) == list(range(20))


async def test_frames_of_a_dead_encoder_go_to_another(bus: Bus, connect) -> None:
    await opened(bus, "a")
    await bus.admit_frame("a", 0.0, b"jpeg")
    [lost] = await bus.read_frames("dead", 8, 1000)
    survivor = await connect(reclaim_idle_ms=50)
    [found] = await read_until(survivor, "survivor")
    assert (found.entry_id, found.frame, found.deliveries) == (lost.entry_id, lost.frame, 2)
    assert await survivor.publish(found, tokens(found)) == "ok"
    assert await bus.publish(lost, tokens(lost)) == "duplicate"
    assert await input_of(bus, "a") == [tokens(lost)]


async def test_a_frame_that_is_being_encoded_is_left_alone(bus: Bus, connect) -> None:
    await opened(bus, "a")
    await bus.admit_frame("a", 0.0, b"jpeg")
    await bus.read_frames("busy", 8, 1000)
    other = await connect(reclaim_idle_ms=60_000)
    assert await other.read_frames("other", 8, 100) == []


async def test_a_frame_that_is_held_is_idle_no_longer_and_has_not_been_delivered_again(
    bus: Bus, redis_url: str
) -> None:
    await opened(bus, "a")
    await bus.admit_frame("a", 0.0, b"jpeg")
    [pending] = await bus.read_frames("busy", 8, 1000)
    async with Redis.from_url(redis_url) as redis:
        await redis.xclaim(pending.stream, "encoders", "busy", 0, [pending.entry_id], idle=3_600_000, justid=True)
        assert await bus.hold("busy", [pending]) == 1
        [entry] = await redis.xpending_range(pending.stream, "encoders", "-", "+", 8)
    assert entry["time_since_delivered"] < 3_600_000
    assert entry["times_delivered"] == 1


async def test_a_frame_that_another_has_taken_over_or_answered_is_not_held_by_its_first_encoder(
    bus: Bus, connect, redis_url: str
) -> None:
    await opened(bus, "a")
    await bus.admit_frame("a", 0.0, b"jpeg")
    [lost] = await bus.read_frames("slow", 8, 1000)
    [found] = await read_until(await connect(reclaim_idle_ms=50), "other")
    assert await bus.hold("slow", [lost]) == 0
    async with Redis.from_url(redis_url) as redis:
        [entry] = await redis.xpending_range(found.stream, "encoders", "-", "+", 8)
    assert entry["consumer"] == b"other"
    await bus.publish(found, tokens(found))
    assert await bus.hold("other", [found]) == 0
    assert await bus.hold("other", []) == 0


async def test_a_frame_that_three_encoders_did_not_survive_is_skipped(connect, redis_url: str) -> None:
    bus = await connect(reclaim_idle_ms=30, max_deliveries=3)
    await opened(bus, "a")
    await bus.admit_frame("a", 1.5, b"poison")
    for delivery in (1, 2, 3):
        [pending] = await read_until(bus, f"encoder-{delivery}")
        assert pending.deliveries == delivery
    async with asyncio.timeout(10):
        while not await input_of(bus, "a"):
            assert await bus.read_frames("encoder-4", 8, 50) == []
    [skipped] = await input_of(bus, "a")
    assert skipped == FrameSkipped(seq=0, time=1.5, reason="3 deliveries to encoders brought no result")
    async with Redis.from_url(redis_url) as redis:
        assert await redis.xlen(pending.stream) == 0


async def test_a_message_that_cannot_be_read_is_skipped_and_the_next_one_comes(bus: Bus, redis_url: str) -> None:
    await opened(bus, "a")
    stream = bus.keys.frames(bus.partition("a"))
    bad = [b"\xc1 not msgpack", encode(FrameSkipped(seq=0, time=0.0, reason="not a frame")), b""]
    async with Redis.from_url(redis_url) as redis:
        for seq, message in enumerate(bad):
            await redis.xadd(stream, {"s": "a", "n": seq, "t": seq / 2, "m": message})
    good = Frame(session_id="a", seq=0, time=1.5, image=b"jpeg")
    async with Redis.from_url(redis_url) as redis:
        await redis.xadd(stream, {"s": "a", "n": 3, "t": 1.5, "m": encode(good)})
    [pending] = await bus.read_frames("encoder", 1, 1000)
    assert pending.frame == good.model_copy(update={"seq": 3})
    skipped = await input_of(bus, "a")
    assert [(message.seq, message.time) for message in skipped] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert "no msgpack" in skipped[0].reason
    assert "a frame_skipped message, expected one of frame" in skipped[1].reason


@pytest.mark.parametrize(
    "fields",
    [
        {"x": "y"},
        {"s": "a", "n": "-1", "t": "0", "m": "m"},
        {"s": "a", "n": "0", "t": "inf", "m": "m"},
        {"s": "a}{", "n": "0", "t": "0", "m": "m"},
        {"s": "b", "n": "0", "t": "0", "m": "m"},
        {"s": b"\xff", "n": "0", "t": "0", "m": "m"},
    ],
)
async def test_an_entry_of_no_session_is_dropped(bus: Bus, redis_url: str, fields: dict[str, str]) -> None:
    await opened(bus, "a")
    stream = bus.keys.frames(bus.partition("a"))
    async with Redis.from_url(redis_url) as redis:
        await redis.xadd(stream, fields)
        await bus.admit_frame("a", 0.0, b"jpeg")
        [pending] = await bus.read_frames("encoder", 1, 1000)
        assert pending.frame.image == b"jpeg"
        assert await redis.xlen(stream) == 1
        assert await pending_count(redis, stream) == 1
    assert await input_of(bus, "a") == []


async def test_a_vanished_group_is_made_again(bus: Bus, redis_url: str) -> None:
    await opened(bus, "a")
    await bus.admit_frame("a", 0.0, b"jpeg")
    [lost] = await bus.read_frames("encoder", 8, 1000)
    async with Redis.from_url(redis_url) as redis:
        await redis.delete(lost.stream)
    assert await bus.publish(lost, tokens(lost)) == "duplicate"
    await bus.admit_frame("a", 0.5, b"jpeg")
    [pending] = await bus.read_frames("encoder", 8, 1000)
    assert pending.frame.seq == 1


async def test_idle_consumers_without_frames_are_forgotten(
    bus: Bus, connect, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await opened(bus, "a")
    stream = bus.keys.frames(bus.partition("a"))
    await bus.admit_frame("a", 0.0, b"jpeg")
    [held] = await bus.read_frames("holder", 8, 1000)
    await bus.admit_frame("a", 0.5, b"jpeg")
    [done] = await bus.read_frames("finished", 8, 1000)
    await bus.publish(done, tokens(done))
    monkeypatch.setattr("actors.encoder_side.FORGET_S", 0.02)
    other = await connect()
    async with Redis.from_url(redis_url) as redis, asyncio.timeout(10):
        while "finished" in await names_of(redis, stream):
            other._next_reclaim = 0.0
            await other.read_frames("other", 8, 10)
        assert "holder" in await names_of(redis, stream)
    assert await bus.publish(held, tokens(held)) == "ok"


async def names_of(redis: Redis, stream: str) -> set[str]:
    return {consumer["name"].decode() for consumer in await redis.xinfo_consumers(stream, "encoders")}

"""Sessions, credits, input and following logs, against a real server."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing

import pytest
from redis.asyncio import Redis

from actors.bus import Bus, BusError
from actors.gateway_side import PartitionLog
from actors.messages import (
    End,
    FramesDecided,
    FrameSkipped,
    Interrupt,
    Query,
    QueryConsumed,
    SessionEnded,
    SessionSettings,
    SettingsChange,
    encode,
)
from actors.tails import QUEUE_ENTRIES, PartitionTails

pytestmark = pytest.mark.anyio

SETTINGS = SessionSettings(threshold=0.5, instructions="Count the cups.")


def decided(seq: int) -> FramesDecided:
    return FramesDecided(first_seq=seq, times=[seq / 2], p_silent=[0.9])


async def claimed(bus: Bus, session_id: str):
    [lease] = await bus.claim("replica", "model-a", bus.partition(session_id), 1)
    return lease


async def follow(bus: Bus, session_id: str, count: int, after: int = -1) -> list[int]:
    """Positions of the next `count` entries."""
    found = []
    async with aclosing(bus.tail(session_id, after)) as entries:
        async for position, _ in entries:
            found.append(position)
            if len(found) == count:
                break
    return found


async def test_an_opened_session_has_what_it_was_opened_with(bus: Bus) -> None:
    await bus.open_session("a", "model-a", SETTINGS)
    meta = await bus.session_meta("a")
    assert meta is not None
    assert (meta.epoch, meta.state, meta.fingerprint, meta.settings) == (0, "open", "model-a", SETTINGS)
    assert (meta.admitted, meta.decided, meta.position, meta.held) == (0, 0, 0, False)
    assert await bus.session_meta("b") is None


async def test_an_existing_id_is_refused(bus: Bus) -> None:
    await bus.open_session("a", "model-a", SETTINGS)
    with pytest.raises(BusError, match="session_exists"):
        await bus.open_session("a", "model-b", SETTINGS)


@pytest.mark.parametrize("session_id", ["", "a{b}", "a b", "x" * 129, "a/b", "ä"])
async def test_ids_that_cannot_be_keys_are_refused(bus: Bus, session_id: str) -> None:
    with pytest.raises(BusError, match="session_id"):
        await bus.open_session(session_id, "model-a", SETTINGS)
    with pytest.raises(BusError, match="session_id"):
        await bus.admit_frame(session_id, 0.0, b"jpeg")


async def test_the_partition_of_a_session_never_changes(bus: Bus) -> None:
    assert [bus.partition(name) for name in ("a", "b", "session-1", "session-2")] == [3, 1, 2, 0]


async def test_seq_counts_admitted_frames_only_and_stops_at_the_credits(connect) -> None:
    bus = await connect(credits=3)
    await bus.open_session("a", "model-a", SETTINGS)
    assert [await bus.admit_frame("a", seq / 2, b"jpeg") for seq in range(5)] == [0, 1, 2, None, None]
    lease = await claimed(bus, "a")
    await bus.append(lease, 0, [decided(0), decided(1)], decided=2)
    assert [await bus.admit_frame("a", 5.0, b"jpeg") for _ in range(3)] == [3, 4, None]


async def test_a_full_frames_stream_admits_nothing(connect) -> None:
    bus = await connect(max_queued_frames=2, partitions=1)
    for name in ("a", "b"):
        await bus.open_session(name, "model-a", SETTINGS)
    assert [await bus.admit_frame(name, 0.0, b"jpeg") for name in ("a", "b", "a")] == [0, 0, None]
    assert await bus.admit_frame("a", 0.0, b"jpeg", bulk=True) == 1
    [first, _] = await bus.read_frames("encoder", 8, 1000)
    assert first.frame.session_id == "a"


async def test_a_repeated_request_is_admitted_once(bus: Bus, connect) -> None:
    await bus.open_session("a", "model-a", SETTINGS)
    other = await connect()
    assert await bus.admit_frame("a", 0.0, b"jpeg", request=7) == 0
    assert await other.admit_frame("a", 0.0, b"jpeg", request=7) == 0
    assert await other.admit_frame("a", 0.5, b"jpeg", request=8) == 1
    with pytest.raises(BusError, match="request_late"):
        await bus.admit_frame("a", 0.0, b"jpeg", request=7)
    meta = await bus.session_meta("a")
    assert meta is not None
    assert (meta.admitted, meta.request) == (2, 8)


async def test_a_reply_that_is_lost_admits_a_frame_and_sends_a_query_once(
    bus: Bus, redis_url: str, lose_replies
) -> None:
    await bus.open_session("a", "model-a", SETTINGS)
    lose_replies(bus)
    assert [await bus.admit_frame("a", seq / 2, b"jpeg") for seq in range(3)] == [0, 1, 2]
    for name in ("first", "second"):
        await bus.send("a", Query(query_id=name, text="What is it?", after_seq=2))
    async with Redis.from_url(redis_url) as redis:
        assert await redis.xlen(bus.keys.frames(bus.partition("a"))) == 3
        assert await redis.xlen(bus.keys.input(bus.partition("a"), "a")) == 2


async def test_one_sessions_concurrent_requests_survive_lost_replies(bus: Bus, lose_replies) -> None:
    await bus.open_session("a", "model-a", SETTINGS)
    lose_replies(bus)
    assert sorted(await asyncio.gather(*(bus.admit_frame("a", 0.0, b"jpeg") for _ in range(8)))) == list(range(8))


async def test_frames_too_large_and_messages_too_large_are_refused(connect) -> None:
    bus = await connect(max_frame_bytes=10, max_message_bytes=100)
    await bus.open_session("a", "model-a", SETTINGS)
    with pytest.raises(BusError, match="frame_too_large: an image of 11 bytes, at most 10"):
        await bus.admit_frame("a", 0.0, b"x" * 11)
    with pytest.raises(BusError, match="message_too_large"):
        await bus.send("a", Query(query_id="q", text="x" * 100, after_seq=-1))


async def test_a_session_that_does_not_exist_takes_nothing(bus: Bus) -> None:
    for call in (
        bus.admit_frame("a", 0.0, b"jpeg"),
        bus.send("a", Interrupt(after_seq=-1)),
        follow(bus, "a", 1),
        bus.touch("a"),
    ):
        with pytest.raises(BusError, match="session_expired"):
            await call


async def test_no_frame_is_admitted_after_the_end_was_sent(bus: Bus) -> None:
    await bus.open_session("a", "model-a", SETTINGS)
    await bus.send("a", End(after_seq=-1))
    with pytest.raises(BusError, match="session_ended"):
        await bus.admit_frame("a", 0.0, b"jpeg")
    await bus.send("a", Interrupt(after_seq=-1))


async def test_queries_wait_in_bounded_number_until_they_are_consumed(connect) -> None:
    bus = await connect(max_pending_inputs=2)
    await bus.open_session("a", "model-a", SETTINGS)
    ask = [Query(query_id=f"q{number}", text="?", after_seq=-1) for number in range(4)]
    await bus.send("a", ask[0])
    await bus.send("a", ask[1])
    with pytest.raises(BusError, match="too_many_inputs: 2 queries or changes"):
        await bus.send("a", ask[2])
    consumed = QueryConsumed(query_id="q0", text="?", seq=-1, time=0.0)
    await bus.append(await claimed(bus, "a"), 0, [consumed], decided=0)
    await bus.send("a", ask[2])
    with pytest.raises(BusError, match="too_many_inputs"):
        await bus.send("a", ask[3])
    await bus.send("a", End(after_seq=-1))


async def test_changes_wait_in_bounded_number_until_the_log_goes_on(connect) -> None:
    bus = await connect(max_pending_inputs=2)
    await bus.open_session("a", "model-a", SETTINGS)
    await bus.send("a", Interrupt(after_seq=-1))
    await bus.send("a", SettingsChange(after_seq=-1, settings=SETTINGS))
    with pytest.raises(BusError, match="too_many_inputs"):
        await bus.send("a", Interrupt(after_seq=-1))
    await bus.append(await claimed(bus, "a"), 0, [decided(0)], decided=1)
    await bus.send("a", Interrupt(after_seq=0))


async def test_the_same_query_sent_through_two_gateways_arrives_once(bus: Bus, connect) -> None:
    await bus.open_session("a", "model-a", SETTINGS)
    query = Query(query_id="q", text="?", after_seq=-1)
    await bus.send("a", query)
    await (await connect()).send("a", query)
    assert [message for _, message in await bus.read_all_inputs("a")] == [query]


async def test_a_tail_gives_every_entry_once_in_order_and_ends_with_the_session(bus: Bus, connect) -> None:
    await bus.open_session("a", "model-a", SETTINGS)
    follower = await connect()

    async def whole() -> list[tuple[int, object]]:
        return [item async for item in follower.tail("a")]

    following = asyncio.create_task(whole())
    lease, written = await claimed(bus, "a"), []
    for seq in range(20):
        await bus.append(lease, seq, [decided(seq)], decided=seq + 1)
        written.append((seq, decided(seq)))
    await bus.append(lease, 20, [SessionEnded(reason="done")], decided=20)
    await bus.end_session(lease)
    assert await asyncio.wait_for(following, 10) == [*written, (20, SessionEnded(reason="done"))]
    assert [position async for position, _ in bus.tail("a", after=17)] == [18, 19, 20]


async def test_one_reader_follows_all_sessions_of_a_partition(connect) -> None:
    bus = await connect(partitions=1)
    names = [f"session-{number}" for number in range(12)]
    for name in names:
        await bus.open_session(name, "model-a", SETTINGS)
    leases = await bus.claim("replica", "model-a", 0, 99)
    tasks = [asyncio.create_task(follow(bus, name, 3)) for name in names for _ in range(2)]
    for position in range(3):
        for lease in leases:
            await bus.append(lease, position, [decided(position)], decided=position + 1)
    assert await asyncio.wait_for(asyncio.gather(*tasks), 10) == [[0, 1, 2]] * 24
    assert len(bus.client.readers.connection_pool._available_connections) <= 1


async def test_a_consumer_that_does_not_read_holds_up_nobody_and_misses_nothing(connect) -> None:
    bus = await connect(partitions=1)
    count = 3 * QUEUE_ENTRIES
    for name in ("slow", "quick"):
        await bus.open_session(name, "model-a", SETTINGS)
    leases = await bus.claim("replica", "model-a", 0, 2)
    async with aclosing(bus.tail("slow")) as slow:
        for lease in leases:
            await bus.append(lease, 0, [decided(0)], decided=1)
        assert (await anext(slow))[0] == 0
        for lease in leases:
            await bus.append(lease, 1, [decided(seq) for seq in range(1, count)], decided=count)
        assert await asyncio.wait_for(follow(bus, "quick", count), 20) == list(range(count))
        [tail] = bus._tails[0]._tails
        assert tail.queue.qsize() <= QUEUE_ENTRIES
        rest = [position for position, _ in [await anext(slow) for _ in range(count - 1)]]
    assert rest == list(range(1, count))


async def test_a_client_that_saw_the_end_is_told_nothing_more(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.tails.CHECK_S", 0.0)
    await bus.open_session("a", "model-a", SETTINGS)
    lease = await claimed(bus, "a")
    await bus.append(lease, 0, [SessionEnded(reason="done")], decided=0)
    await bus.end_session(lease)
    assert [item async for item in bus.tail("a", after=0)] == []


async def test_a_tail_says_when_its_session_vanishes(bus: Bus, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.tails.CHECK_S", 0.0)
    await bus.open_session("a", "model-a", SETTINGS)
    await bus.append(await claimed(bus, "a"), 0, [decided(0)], decided=1)
    async with aclosing(bus.tail("a")) as entries:
        assert (await anext(entries))[0] == 0
        async with Redis.from_url(redis_url) as redis:
            await redis.delete(*bus.session_keys("a"))
        with pytest.raises(BusError, match="session_expired"):
            await asyncio.wait_for(anext(entries), 10)


async def test_a_tail_says_when_its_log_went_back_to_an_earlier_state(connect, redis_url: str) -> None:
    """As after a restart of a Redis that writes its log to disk now and then only."""
    bus = await connect(resume_s=0.4)
    await bus.open_session("a", "model-a", SessionSettings())
    [lease] = await bus.claim("replica", "model-a", bus.partition("a"), 1)
    await bus.append(lease, 0, [decided(seq) for seq in range(3)], 3)
    tail = bus.tail("a")
    assert [(await anext(tail))[0] for _ in range(3)] == [0, 1, 2]
    async with Redis.from_url(redis_url) as redis:
        await redis.hset(bus.keys.meta(bus.partition("a"), "a"), "position", 2)
    with pytest.raises(BusError, match="session_expired: the log of session 'a' ends before 2"):
        await asyncio.wait_for(anext(tail), 20)


async def test_a_tail_refuses_a_gap_and_a_position_that_redis_never_had(bus: Bus, redis_url: str) -> None:
    await bus.open_session("a", "model-a", SETTINGS)
    await bus.append(await claimed(bus, "a"), 0, [decided(seq) for seq in range(5)], decided=5)
    with pytest.raises(BusError, match="session_expired: the log of session 'a' ends before 5"):
        await follow(bus, "a", 1, after=5)
    async with Redis.from_url(redis_url) as redis:
        await redis.xdel(bus.keys.output(bus.partition("a"), "a"), "3-0")
    with pytest.raises(BusError, match="resume_too_late"):
        await follow(bus, "a", 5, after=0)


async def test_who_asks_for_what_is_gone_leaves_others_of_the_session_undisturbed(connect, redis_url: str) -> None:
    bus = await connect(partitions=1)
    await bus.open_session("a", "model-a", SETTINGS)
    lease = await claimed(bus, "a")
    await bus.append(lease, 0, [decided(seq) for seq in range(3)], decided=3)
    following = asyncio.create_task(follow(bus, "a", 5))
    await asyncio.sleep(0.2)
    tails = bus._partition_tails(0)
    async with Redis.from_url(redis_url) as redis:
        await redis.xtrim(bus.keys.output(0, "a"), minid="3-0", approximate=False)
    late = await tails.add("a", -1)  # as one that looked at the log before it was trimmed
    with pytest.raises(BusError, match="resume_too_late"):
        await asyncio.wait_for(late.next(), 10)
    tails.remove(late)
    await bus.append(lease, 3, [decided(seq) for seq in range(3, 5)], decided=5)
    assert len(await asyncio.wait_for(following, 10)) == 5


async def test_a_log_entry_that_cannot_be_read_ends_only_its_own_tail(connect, redis_url: str) -> None:
    bus = await connect(partitions=1)
    for name in ("bad", "good"):
        await bus.open_session(name, "model-a", SETTINGS)
    good = asyncio.create_task(follow(bus, "good", 1))
    bad = asyncio.create_task(follow(bus, "bad", 1))
    async with Redis.from_url(redis_url) as redis:
        await redis.xadd(bus.keys.output(0, "bad"), {"m": encode(Interrupt(after_seq=0))}, id="1-0")
    with pytest.raises(BusError, match=r"session_damaged.*a interrupt message, expected one of frames_decided"):
        await asyncio.wait_for(bad, 10)
    lease = next(lease for lease in await bus.claim("replica", "model-a", 0, 2) if lease.session_id == "good")
    await bus.append(lease, 0, [decided(0)], decided=1)
    assert await asyncio.wait_for(good, 10) == [0]


async def test_closing_the_bus_ends_its_tails(connect) -> None:
    bus = await connect()
    await bus.open_session("a", "model-a", SETTINGS)
    following = asyncio.create_task(follow(bus, "a", 1))
    while not bus._tails:
        await asyncio.sleep(0)
    await bus.close()
    assert await asyncio.wait_for(following, 10) == []


async def test_a_session_nobody_took_can_be_abandoned_and_says_why(bus: Bus) -> None:
    await bus.open_session("a", "model-a", SETTINGS)
    assert await bus.abandon("a", "no model replica has room")
    assert [item async for item in bus.tail("a")] == [(0, SessionEnded(reason="no model replica has room"))]
    assert await bus.claim("replica", "model-a", bus.partition("a"), 9) == []
    assert await bus.abandon("a", "again")


async def test_a_session_that_a_replica_holds_is_not_abandoned(bus: Bus) -> None:
    await bus.open_session("a", "model-a", SETTINGS)
    await claimed(bus, "a")
    assert not await bus.abandon("a", "impatience")


async def test_every_session_key_expires_and_activity_prolongs_it(connect, redis_url: str) -> None:
    bus = await connect(session_ttl_s=1000)
    await bus.open_session("a", "model-a", SETTINGS)
    lease = await claimed(bus, "a")

    async def admit() -> None:
        await bus.admit_frame("a", 0.0, b"jpeg")

    async def publish() -> None:
        for pending in await bus.read_frames("encoder", 1, 1000):
            await bus.publish(pending, FrameSkipped(seq=pending.frame.seq, time=0.0, reason="test"))

    actions = [
        admit,
        publish,
        lambda: bus.send("a", Query(query_id=str(random.random()), text="?", after_seq=-1)),
        lambda: bus.append(lease, 0, [decided(0)], decided=1),
        lambda: bus.trim(lease, b"", "0-0", 0),
        lambda: bus.touch("a"),
    ]
    async with Redis.from_url(redis_url) as redis:
        for action in actions:
            for key in bus.session_keys("a"):
                await redis.pexpire(key, 100_000)
            await action()
            there = [key for key in bus.session_keys("a") if await redis.exists(key)]
            assert there
            assert all([999_000 < await redis.pttl(key) <= 1_000_000 for key in there])
        assert len(there) == 3
        await bus.end_session(lease)
        assert all([0 < await redis.pttl(key) <= 60_000 for key in there])
        with pytest.raises(BusError, match="session_ended"):
            await bus.admit_frame("a", 0.0, b"jpeg")
        await PartitionLog(bus, bus.partition("a")).check({"a": 0})
        assert all([0 < await redis.pttl(key) <= 60_000 for key in there])


async def test_onlookers_do_not_keep_a_session(bus: Bus, redis_url: str) -> None:
    await bus.open_session("a", "model-a", SETTINGS)
    partition = bus.partition("a")
    meta = bus.keys.meta(partition, "a")
    log = PartitionLog(bus, partition)
    tails = PartitionTails(log, check_s=0.05)
    async with Redis.from_url(redis_url) as redis:
        await redis.hset(meta, "seen", 1)
        onlooker = await tails.add("a", -1, onlooker=True)
        for _ in range(10):  # to read is to wait: whoever is woken looks after its sessions
            await asyncio.sleep(0.06)
            await log.wake()
        assert await redis.hget(meta, "seen") == b"1"
        client = await tails.add("a", -1)
        async with asyncio.timeout(20):
            while await redis.hget(meta, "seen") == b"1":
                await asyncio.sleep(0.02)
    assert [onlooker.finished, client.finished] == [False, False]
    await tails.close()


async def test_a_damaged_meta_is_an_error_with_the_field(bus: Bus, redis_url: str) -> None:
    await bus.open_session("a", "model-a", SETTINGS)
    async with Redis.from_url(redis_url) as redis:
        await redis.hset(bus.keys.meta(bus.partition("a"), "a"), "state", "asleep")
    with pytest.raises(BusError, match=r"session_damaged: meta of session 'a' in Redis: state: .*'asleep'"):
        await bus.session_meta("a")

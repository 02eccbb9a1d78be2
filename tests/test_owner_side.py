"""Leases, fenced writes and trimming, against a real server and, where time matters, a clock moved by hand."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from actors import scripts
from actors.bus import Bus, Lease
from actors.messages import (
    FramesDecided,
    Interrupt,
    MessageError,
    Query,
    SessionEnded,
    SessionSettings,
    encode,
)

pytestmark = pytest.mark.anyio

HAND_CLOCK = "local function now() return tonumber(redis.call('GET', 'hand-clock')) end"


def decided(seq: int) -> FramesDecided:
    return FramesDecided(first_seq=seq, times=[seq / 2], p_silent=[0.9])


async def opened(bus: Bus, *names: str, fingerprint: str = "model-a") -> None:
    for name in names:
        await bus.open_session(name, fingerprint, SessionSettings())


async def claim(bus: Bus, session_id: str, owner: str = "replica", limit: int = 9) -> list[Lease]:
    return await bus.claim(owner, "model-a", bus.partition(session_id), limit)


async def until_blocked(redis_url: str) -> None:
    """Return once a reader waits in Redis."""
    async with asyncio.timeout(10), Redis.from_url(redis_url) as redis:
        while (await redis.info("clients"))["blocked_clients"] == 0:
            pass


class Clock:
    """The scripts' clock, in milliseconds, moved by hand."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis

    async def forward(self, ms: int) -> None:
        await self.redis.incrby("hand-clock", ms)


@pytest.fixture
async def clock(redis_url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scripts, "CLOCK", HAND_CLOCK)
    async with Redis.from_url(redis_url) as redis:
        await redis.set("hand-clock", 1_000_000)
        yield Clock(redis)


async def test_the_first_claim_has_epoch_one_and_names_its_owner(bus: Bus) -> None:
    await opened(bus, "a")
    assert await claim(bus, "a") == [Lease("a", 1)]
    meta = await bus.session_meta("a")
    assert meta is not None
    assert (meta.epoch, meta.owner, meta.held) == (1, "replica", True)
    assert await claim(bus, "a", "other") == []


async def test_of_replicas_that_race_for_sessions_each_session_gets_one(bus: Bus, connect) -> None:
    names = [f"session-{number}" for number in range(10)]
    await opened(bus, *names)
    replicas = [await connect() for _ in range(3)]
    claims = await asyncio.gather(
        *(
            replica.claim(f"replica-{number}", "model-a", partition, 9)
            for number, replica in enumerate(replicas)
            for partition in range(4)
        )
    )
    assert sorted(lease.session_id for leases in claims for lease in leases) == sorted(names)


async def test_a_claim_takes_no_more_than_its_limit(connect) -> None:
    bus = await connect(partitions=1)
    await opened(bus, "a", "b", "c")
    assert [len(await claim(bus, "a", limit=2)) for _ in range(3)] == [2, 1, 0]


async def test_a_replica_claims_only_sessions_of_its_model(connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.owner_side.PAGE", 2)
    bus = await connect(partitions=1)
    await opened(bus, "a1", "a2", "a3", "a4", "a5", fingerprint="model-b")
    await opened(bus, "z")
    assert await claim(bus, "z") == [Lease("z", 1)]
    assert len(await bus.claim("replica", "model-b", 0, 9)) == 5


async def test_a_lost_reply_to_a_claim_loses_no_session(bus: Bus, lose_replies) -> None:
    await opened(bus, "a")
    lose_replies(bus)
    assert await claim(bus, "a") == [Lease("a", 1)]
    assert await bus.append(Lease("a", 1), 0, [decided(0)], 1) == "duplicate"


async def test_a_lease_that_is_renewed_lasts_and_one_that_is_not_is_taken_over(bus: Bus, connect, clock: Clock) -> None:
    bus, other = await connect(lease_ms=2000), await connect(lease_ms=2000)
    await opened(bus, "a")
    [lease] = await claim(bus, "a")
    for _ in range(3):
        await clock.forward(1900)
        assert await bus.renew([lease]) == []
        assert await claim(other, "a", "other") == []
    await clock.forward(1999)
    assert await claim(other, "a", "other") == []
    await clock.forward(1)
    assert await claim(other, "a", "other") == [Lease("a", 2)]
    assert await bus.renew([lease]) == [lease]
    assert await bus.append(lease, 0, [decided(0)], 1) == "stale"
    assert not await bus.trim(lease, b"", "0-0", 0)
    assert not await bus.release(lease)
    assert not await bus.end_session(lease)
    meta = await bus.session_meta("a")
    assert meta is not None
    assert (meta.owner, meta.held, meta.state, meta.position) == ("other", True, "open", 0)


async def test_an_expired_lease_that_nobody_took_still_writes_and_renews(connect, clock: Clock) -> None:
    bus = await connect(lease_ms=2000)
    await opened(bus, "a")
    [lease] = await claim(bus, "a")
    await clock.forward(60_000)
    assert await bus.append(lease, 0, [decided(0)], 1) == "ok"
    assert await bus.renew([lease]) == []
    assert await claim(bus, "a", "other") == []


async def test_renewing_many_tells_which_are_lost(bus: Bus) -> None:
    names = [f"session-{number}" for number in range(8)]
    await opened(bus, *names)
    leases = [lease for partition in range(4) for lease in await bus.claim("replica", "model-a", partition, 9)]
    lost = [lease for lease in leases if lease.session_id in ("session-3", "session-5")]
    for lease in lost:
        await bus.release(lease)
    gone = Lease("never-opened", 1)
    assert set(await bus.renew([*leases, gone])) == {*lost, gone}
    assert await bus.renew([]) == []


async def test_a_released_session_is_free_at_once_and_wakes_readers(bus: Bus, connect, redis_url: str) -> None:
    await opened(bus, "a")
    [lease] = await claim(bus, "a")
    other, partition = await connect(), bus.partition("a")
    await other.read_inputs({}, 100, partition)
    waiting = asyncio.create_task(other.read_inputs({}, 2000, partition))
    await until_blocked(redis_url)
    assert await bus.release(lease)
    assert await asyncio.wait_for(waiting, 1.5) == []
    [taken] = await claim(other, "a", "other")
    assert taken.epoch > lease.epoch
    assert await bus.renew([lease]) == [lease]
    assert await bus.append(lease, 0, [decided(0)], 1) == "stale"


async def test_entries_of_one_append_get_consecutive_positions(bus: Bus) -> None:
    await opened(bus, "a")
    [lease] = await claim(bus, "a")
    entries = [decided(seq) for seq in range(5)]
    assert await bus.append(lease, 0, entries[:3], decided=3) == "ok"
    assert await bus.append(lease, 3, entries[3:], decided=5) == "ok"
    assert await bus.read_log("a") == list(enumerate(entries))
    meta = await bus.session_meta("a")
    assert meta is not None
    assert (meta.position, meta.decided) == (5, 5)


async def test_an_append_is_done_once_and_only_at_the_end_of_the_log(bus: Bus) -> None:
    await opened(bus, "a")
    [lease] = await claim(bus, "a")
    assert await bus.append(lease, 0, [decided(0), decided(1)], 2) == "ok"
    assert await bus.append(lease, 0, [decided(0), decided(1)], 2) == "duplicate"
    assert await bus.append(lease, 1, [decided(1)], 2) == "duplicate"
    assert await bus.append(lease, 1, [decided(1), decided(2)], 3) == "stale"
    assert await bus.append(lease, 3, [decided(2)], 3) == "stale"
    assert await bus.append(Lease("a", 2), 2, [decided(2)], 3) == "stale"
    assert await bus.append(Lease("nobody", 1), 0, [decided(0)], 1) == "stale"
    assert await bus.read_log("a") == [(0, decided(0)), (1, decided(1))]


async def test_an_append_without_entries_only_reports_progress(bus: Bus) -> None:
    await opened(bus, "a")
    [lease] = await claim(bus, "a")
    assert await bus.append(lease, 0, [], decided=4) == "ok"
    assert await bus.append(lease, 0, [], decided=3) == "ok"
    meta = await bus.session_meta("a")
    assert meta is not None
    assert (meta.position, meta.decided) == (0, 4)


async def test_a_long_log_is_read_whole(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.owner_side.PAGE", 7)
    await opened(bus, "a")
    [lease] = await claim(bus, "a")
    for count in (7, 1, 13):
        position = len(await bus.read_log("a"))
        await bus.append(lease, position, [decided(seq) for seq in range(position, position + count)], position + count)
    assert [position for position, _ in await bus.read_log("a")] == list(range(21))


async def test_input_comes_in_order_behind_each_cursor_with_errors_as_values(bus: Bus, redis_url: str) -> None:
    await opened(bus, "a", "b")
    partition = bus.partition("a")
    query = Query(query_id="q", text="?", after_seq=-1)
    await bus.send("a", query)
    async with Redis.from_url(redis_url) as redis:
        for message in (b"garbage", encode(decided(0))):
            await redis.xadd(bus.keys.input(partition, "a"), {"m": message})
    await bus.send("a", Interrupt(after_seq=-1))
    found = await bus.read_inputs({"a": "0-0"}, 0, partition)
    assert [name for name, _, _ in found] == ["a"] * 4
    kinds = [type(message) for _, _, message in found]
    assert kinds == [Query, MessageError, MessageError, Interrupt]
    rest = await bus.read_inputs({"a": found[1][1]}, 0, partition)
    assert [entry_id for _, entry_id, _ in rest] == [entry_id for _, entry_id, _ in found[2:]]
    assert [(entry_id, type(message)) for entry_id, message in await bus.read_all_inputs("a", found[1][1])] == [
        (entry_id, type(message)) for _, entry_id, message in found[1:]
    ]
    assert await bus.read_inputs({"a": found[-1][1]}, 0, partition) == []


async def test_waiting_for_input_ends_with_the_input(bus: Bus, connect, redis_url: str) -> None:
    owner = await connect()
    await opened(bus, "a")
    await owner.read_inputs({"a": "0-0"}, 0, bus.partition("a"))
    waiting = asyncio.create_task(owner.read_inputs({"a": "0-0"}, 2000, bus.partition("a")))
    await until_blocked(redis_url)
    await bus.send("a", Interrupt(after_seq=-1))
    assert [message for _, _, message in await asyncio.wait_for(waiting, 1.5)] == [Interrupt(after_seq=-1)]


async def test_trimming_keeps_the_window_and_drops_what_lies_before(connect, clock: Clock) -> None:
    bus = await connect(resume_s=60)
    await opened(bus, "a")
    [lease] = await claim(bus, "a")
    for number in range(4):
        await bus.send("a", Query(query_id=str(number), text="?", after_seq=-1))
    ids = [entry_id for entry_id, _ in await bus.read_all_inputs("a")]
    await bus.append(lease, 0, [decided(seq) for seq in range(6)], 6)
    await clock.forward(60_000)
    await bus.append(lease, 6, [decided(seq) for seq in range(6, 9)], 9)
    await clock.forward(60_000)
    assert await bus.trim(lease, b"window", ids[2], 5)
    assert [entry_id for entry_id, _ in await bus.read_all_inputs("a")] == ids[2:]
    assert [position for position, _ in await bus.read_log("a")] == [5, 6, 7, 8]
    meta = await bus.session_meta("a")
    assert meta is not None
    assert (meta.window, meta.in_id, meta.first_position, meta.position) == (b"window", ids[2], 5, 9)
    assert await bus.append(lease, 9, [SessionEnded(reason="done")], 9) == "ok"
    assert [position async for position, _ in bus.tail("a", after=4)] == [5, 6, 7, 8, 9]


async def test_the_log_keeps_what_a_client_may_still_ask_for(connect, clock: Clock) -> None:
    bus = await connect(resume_s=60)
    await opened(bus, "a")
    [lease] = await claim(bus, "a")

    async def first_after_trim(position: int) -> int:
        await bus.trim(lease, b"", "0-0", position)
        return (await bus.read_log("a"))[0][0]

    for position in range(12):
        await bus.append(lease, position, [decided(position)], position + 1)
        kept = await first_after_trim(position)
        assert kept <= max(0, position - 6)
        assert kept >= position - 12
        await clock.forward(10_000)
    assert await first_after_trim(11) > 0


async def test_an_ended_session_can_be_read_but_not_written_claimed_or_renewed(bus: Bus) -> None:
    await opened(bus, "a")
    [lease] = await claim(bus, "a")
    await bus.append(lease, 0, [SessionEnded(reason="done")], 0)
    assert await bus.end_session(lease)
    assert await bus.end_session(lease)
    assert await bus.renew([lease]) == [lease]
    assert await bus.append(lease, 1, [decided(0)], 1) == "stale"
    await bus.release(lease)
    assert await claim(bus, "a") == []
    assert await bus.read_log("a") == [(0, SessionEnded(reason="done"))]


async def test_sessions_that_expired_leave_no_lease_behind(bus: Bus, redis_url: str) -> None:
    await opened(bus, "a")
    partition = bus.partition("a")
    async with Redis.from_url(redis_url) as redis:
        await redis.delete(*bus.session_keys("a"))
        assert await claim(bus, "a") == []
        assert await redis.zcard(bus.keys.leases(partition)) == 0

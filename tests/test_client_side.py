"""Whose a session is, which connection counts, places and drains, against a real server."""

from __future__ import annotations

import asyncio

import pytest

from actors.bus import Bus, BusError
from actors.messages import End, Interrupt, Query, SessionEnded, SessionSettings, SettingsChange, decode, encode

pytestmark = pytest.mark.anyio

SETTINGS = SessionSettings(threshold=0.5)


async def test_a_client_comes_back_at_another_gateway_and_the_old_connection_is_refused(bus: Bus, connect) -> None:
    other = await connect()
    await bus.open_session("a", "model-a", SETTINGS, "alice")
    assert await bus.admit_frame("a", 0.5, b"jpeg", connection=1, counts="{}") == 0
    assert await bus.note("a", 1, "preferences", "mine")
    meta = await other.attach("a", "alice")
    assert (meta.connection, meta.client, meta.time, meta.counts, meta.preferences) == (2, "alice", 0.5, "{}", "mine")
    with pytest.raises(BusError, match="session_taken"):
        await bus.admit_frame("a", 1.0, b"jpeg", connection=1)
    for message in (Query(query_id="q", text="?", after_seq=0), Interrupt(after_seq=0), End(after_seq=0)):
        with pytest.raises(BusError, match="session_taken"):
            await bus.send("a", message, connection=1)
    assert not await bus.note("a", 1, "counts", "old")
    assert await other.admit_frame("a", 1.0, b"jpeg", connection=2) == 1


async def test_a_session_of_another_client_looks_like_none(bus: Bus) -> None:
    await bus.open_session("a", "model-a", SETTINGS, "alice")
    said = []
    for session_id, client in (("a", "mallory"), ("b", "alice"), ("a", "")):
        with pytest.raises(BusError) as refused:
            await bus.attach(session_id, client)
        said.append(str(refused.value).replace(f"'{session_id}'", "it"))
    assert len(set(said)) == 1
    meta = await bus.session_meta("a")
    assert meta is not None
    assert meta.connection == 1


async def test_an_attachment_whose_reply_is_lost_counts_once(bus: Bus, lose_replies) -> None:
    await bus.open_session("a", "model-a", SETTINGS, "alice")
    lose_replies(bus)
    assert (await bus.attach("a", "alice")).connection == 2
    assert (await bus.attach("a", "alice")).connection == 3


async def test_a_question_that_is_asked_again_after_others_is_asked_once(bus: Bus) -> None:
    await bus.open_session("a", "model-a", SETTINGS)
    for query_id in ("one", "two", "one", "two", "ne"):
        await bus.send("a", Query(query_id=query_id, text="?", after_seq=-1))
    [lease] = await bus.claim("replica", "model-a", bus.partition("a"), 1)
    asked = [message.query_id for _, message in await bus.read_all_inputs(lease.session_id)]
    assert asked == ["one", "two", "ne"]


async def test_a_part_of_the_log_can_be_read(bus: Bus) -> None:
    await bus.open_session("a", "model-a", SETTINGS)
    [lease] = await bus.claim("replica", "model-a", bus.partition("a"), 1)
    entries = [SessionEnded(reason=str(number)) for number in range(6)]
    await bus.append(lease, 0, entries, decided=0)
    assert [position for position, _ in await bus.entries("a", 2, 3)] == [2, 3, 4]


async def test_places_are_counted_by_client_and_in_all(bus: Bus, connect) -> None:
    other = await connect()
    await bus.take_place("alice", "a", 1, 2, 60)
    await bus.take_place("alice", "a", 1, 2, 60)
    with pytest.raises(BusError, match="too_many_sessions"):
        await other.take_place("alice", "b", 1, 2, 60)
    await other.take_place("bob", "c", 1, 2, 60)
    with pytest.raises(BusError, match="sessions_full"):
        await bus.take_place("carol", "d", 1, 2, 60)
    await other.free_place("alice", "a")
    await bus.take_place("carol", "d", 1, 2, 60)


async def test_a_place_that_nobody_renews_is_free_after_a_while(bus: Bus) -> None:
    await bus.take_place("alice", "a", 1, 1, 0.05)
    async with asyncio.timeout(10):
        while True:
            try:
                await bus.take_place("alice", "b", 1, 1, 60)
                break
            except BusError:
                await asyncio.sleep(0.01)


async def test_a_drain_concerns_only_those_who_run_already(bus: Bus, connect) -> None:
    started = await bus.clock_ms()
    assert await bus.draining(started) is None
    await bus.drain(30)
    left = await (await connect()).draining(started)
    assert left is not None
    assert 0 < left <= 30
    assert await bus.draining(await bus.clock_ms() + 1) is None
    await bus.stop_draining()
    assert await bus.draining(started) is None


async def test_settings_of_a_newer_gateway_are_understood_as_far_as_known(bus: Bus) -> None:
    class Newer(SessionSettings):
        mood: str = "calm"

    await bus.open_session("a", "model-a", Newer(threshold=0.25))
    meta = await bus.session_meta("a")
    assert meta is not None
    assert meta.settings == SessionSettings(threshold=0.25)
    change = encode(SettingsChange.model_construct(after_seq=0, settings=Newer(threshold=0.125)))
    told = decode(change)
    assert isinstance(told, SettingsChange)
    assert told.settings == SessionSettings(threshold=0.125)

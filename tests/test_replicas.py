"""Reports of replicas, on a real server."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis

from actors import replicas, scripts
from actors.bus import Bus
from actors.messages import FramesDecided, QueryConsumed, ResponseEnded, ResponseStarted, ResponseTokens
from actors.meters import LLMMeters, Meters, counter, counters
from actors.replicas import LLMLoad, ReplicaReport, Reporter, least_loaded

pytestmark = pytest.mark.anyio

HAND_CLOCK = "local function now() return tonumber(redis.call('GET', 'replicas-clock')) end"


def report_of(name: str, role: str = "llm") -> ReplicaReport:
    return ReplicaReport.model_validate(
        {"role": role, "name": name, "pid": 1, "at": 0.0, "model": "m", "stats": {"frames": 3}, "metrics": "# none\n"}
    )


def values(meters: Meters) -> dict[str, float]:
    """Every sample, by name and labels."""
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in meters.registry.collect()
        for sample in family.samples
    }


async def test_any_process_reads_all_reports(connect: Callable[..., Awaitable[Bus]]) -> None:
    writer, reader = await connect(), await connect()
    await writer.report(report_of("b"))
    await writer.report(report_of("a"))
    await writer.report(report_of("c", "encoder"))
    await writer.report(report_of("a").model_copy(update={"pid": 7}))
    assert [(found.role, found.name, found.pid) for found in await reader.reports()] == [
        ("encoder", "c", 1),
        ("llm", "a", 7),
        ("llm", "b", 1),
    ]
    await writer.retire("a")
    assert [found.name for found in await reader.reports()] == ["c", "b"]


async def test_a_replica_that_reports_no_more_is_forgotten(
    connect: Callable[..., Awaitable[Bus]], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts, "CLOCK", HAND_CLOCK)
    bus = await connect()
    async with Redis.from_url(redis_url) as redis:
        await redis.set("replicas-clock", 1000)
        await bus.report(report_of("dead"))
        assert len(await bus.reports()) == 1
        await redis.incrby("replicas-clock", int(replicas.EXPIRES_S * 1000) + 1)
        assert await bus.reports() == []
        await bus.report(report_of("alive"))
        assert await redis.hkeys(bus.keys.replicas[0]) == [b"alive"]


async def test_reports_and_steps_are_bounded(bus: Bus, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "MOST_REPLICAS", 2)
    monkeypatch.setattr(replicas, "STEPS_KEPT", 3)
    for name in ("a", "b", "c"):
        await bus.report(report_of(name), [("decide", name, 0, 0, 1.0, 2.0), ("speak", name, 0, 0, 2.0, 3.0)])
    assert [found.name for found in await bus.reports()] == ["a", "b"]
    assert await bus.steps() == {
        "llm": [["speak", "a", 0, 0, 2.0, 3.0], ["decide", "b", 0, 0, 1.0, 2.0], ["speak", "b", 0, 0, 2.0, 3.0]]
    }
    async with Redis.from_url(redis_url) as redis:
        assert min([await redis.pttl(key) for key in bus.keys.replicas]) > 0


async def test_a_reporter_tells_each_step_once_and_retires(bus: Bus) -> None:
    timeline = [("decide", "s", 0, 0, 1.0, 2.0)]
    meters = Meters(lambda: [counter("things", "Things", 5)])
    reporter = Reporter(bus, "llm", "me", "model", lambda: {"timeline": list(timeline), "n": 1}, meters.registry)
    await reporter.once()
    timeline.append(("decide", "s", 1, 1, 2.0, 3.0))
    await reporter.once()  # not beside that of `running`: both would find the step untold
    async with reporter.running():
        (report,) = await bus.reports()
        assert report.stats == {"n": 1}
        found = {family.name: family for family in text_string_to_metric_families(report.metrics)}
        assert found["videollm_things"].samples[0].value == 5
        assert "videollm_process_resident_memory_bytes" in found
        assert await bus.steps() == {"llm": [list(step) for step in timeline]}
    assert await bus.reports() == []


def test_work_goes_to_the_fewest_sessions_of_those_that_keep_up_and_have_room() -> None:
    def llm(name: str, sessions: int, room: int = 8, waiting: int = 0, **other: str) -> ReplicaReport:
        stats = {"sessions": sessions, "room": room, "waiting_frames": waiting}
        return report_of(name).model_copy(update={"stats": stats, **other})

    few, more = llm("few", 1), llm("more", 5)
    beside = [llm("itself", 0), llm("full", 0, room=0), llm("slow", 0, waiting=1), llm("other model", 0, model="n")]
    found = least_loaded("itself", "m", [*beside, report_of("silent"), report_of("gateway", "gateway"), more, few])
    assert found == LLMLoad("few", 1, 8, 0)
    assert least_loaded("itself", "m", beside) is None


def test_a_decision_is_timed_from_the_frames_arrival_at_the_llm() -> None:
    meters, second_ago = LLMMeters(list), f"{int(time.time() * 1000) - 1000}-3"
    meters.appended("s", [FramesDecided(first_seq=4, times=[2.0, 2.5], p_silent=[1, 1])], {4: second_ago}, {})
    found = values(meters)
    assert found["videollm_decision_latency_seconds_count[('stage', 'decide')]"] == 1
    assert found["videollm_decision_latency_seconds_sum[('stage', 'decide')]"] >= 1


def test_the_first_token_is_timed_from_what_came_last_question_or_frame() -> None:
    meters, now = LLMMeters(list), int(time.time() * 1000)
    entries = [
        QueryConsumed(query_id="q", text="?", seq=1, time=1.0),
        ResponseStarted(response_id="r", query_id="q", seq=1, time=1.0),
    ]
    tokens = ResponseTokens(response_id="r", ids=[5], text="a")
    meters.appended("s", entries, {1: f"{now - 9000}-0"}, {"q": f"{now - 1000}-0"})
    meters.appended("s", [tokens, tokens, ResponseEnded(response_id="r", reason="eos", text="aa")], {}, {})
    found = values(meters)
    assert found["videollm_first_token_seconds_count[]"] == 1
    assert 1 <= found["videollm_first_token_seconds_sum[]"] < 9


def test_counters_without_values_are_still_declared() -> None:
    assert counters("things", "Things", []).name == "videollm_things"

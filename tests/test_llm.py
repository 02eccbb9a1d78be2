"""The LLM actor on a real Redis server with the tiny model: leases, order, takeover."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import torch

from actors import checkpoint, llm
from actors.backends import build_engine
from actors.bus import Bus, BusConfig, BusError
from actors.engine import EngineConfig
from actors.held import Held, read_window
from actors.llm import LLMWorker
from actors.messages import (
    End,
    Evicted,
    Frame,
    FramesDecided,
    FrameSkipped,
    FrameTokens,
    LogEntry,
    Query,
    QueryConsumed,
    ResponseEnded,
    ResponseStarted,
    ResponseTokens,
    SessionEnded,
    SessionSettings,
)

LOADED: dict[Path, checkpoint.Loaded] = {}
SETTINGS = SessionSettings(threshold=0.3, max_response_tokens=12)


def tokens(seq: int) -> torch.Tensor:
    """Frame tokens of a world that changes every few frames."""
    generator = torch.Generator().manual_seed(seq // 4)
    return torch.randn(10, 48, generator=generator).half()


class Live:
    """A bus, a tiny model and what clients and encoders do, without Serve."""

    def __init__(self, url: str, folder: Path, **settings: object) -> None:
        self.url = url
        self.loaded = LOADED.setdefault(folder, checkpoint.load(folder))
        self.config = BusConfig(
            prefix=secrets.token_hex(4) + ":", lease_ms=1000, renew_ms=200, partitions=4, **settings
        )
        self.workers: list[asyncio.Task[None]] = []

    async def connect(self) -> Bus:
        return await Bus.connect(self.config, self.url)

    @asynccontextmanager
    async def worker(self, name: str = "replica", **engine: object) -> AsyncIterator[LLMWorker]:
        bus = await self.connect()
        settings = EngineConfig(**{"kv_memory_gb": 0.05, **engine})
        worker = LLMWorker(
            bus,
            build_engine(self.loaded.model, self.loaded.template, settings),
            name=name,
            tokens_shape=self.loaded.model.frame_shape,
            fingerprint=self.loaded.fingerprint,
            features=self.loaded.features,
        )
        task = asyncio.create_task(worker.run())
        self.workers.append(task)
        try:
            yield worker
        finally:
            worker.stop()
            try:
                await asyncio.wait_for(task, 20)
            finally:
                await bus.close()

    async def encode(self, bus: Bus, session_id: str, count: int, start: int = 0, order: Callable = sorted) -> None:
        """Admit frames and publish their tokens, as gateway and encoder do."""
        for seq in range(start, start + count):
            await until(lambda seq=seq: bus.admit_frame(session_id, seq / 2, b"picture"))
        pending = []
        while len(pending) < count:
            pending += await bus.read_frames("encoder", count, 200)
        for one in order(pending, key=lambda one: one.frame.seq):
            frame: Frame = one.frame
            await bus.publish(one, FrameTokens.from_tensor(frame.seq, frame.time, tokens(frame.seq)))


async def until(call: Callable[[], Awaitable[object]], seconds: float = 20) -> object:
    async with asyncio.timeout(seconds):
        while (value := await call()) is None or value is False:
            await asyncio.sleep(0.01)
        return value


async def whole_log(bus: Bus, session_id: str) -> list[LogEntry]:
    async with asyncio.timeout(30):
        return [entry async for _, entry in bus.tail(session_id)]


def decided(log: list[LogEntry]) -> list[int]:
    return [
        seq for entry in log if isinstance(entry, FramesDecided) for seq in range(entry.first_seq, entry.last_seq + 1)
    ]


@pytest.fixture
def live(redis_url: str, tiny_checkpoint: Path) -> Live:
    return Live(redis_url, tiny_checkpoint)


def same(one: list[LogEntry], other: list[LogEntry]) -> None:
    """Assert that two logs agree in all that must not depend on who ran the session or how frames were grouped."""
    assert essence(one) == essence(other)
    probabilities = [[p for e in log if isinstance(e, FramesDecided) for p in e.p_silent] for log in (one, other)]
    assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-3)


def essence(log: list[LogEntry]) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for entry in log:
        if isinstance(entry, FramesDecided):
            found += [("frame", seq) for seq in range(entry.first_seq, entry.last_seq + 1)]
        elif isinstance(entry, ResponseTokens):
            found += [("token", token) for token in entry.ids]
        elif isinstance(entry, QueryConsumed | ResponseEnded | SessionEnded):
            found.append((entry.kind, getattr(entry, "text", "")))
    return found


def test_every_admitted_frame_is_decided_once_in_order(live: Live) -> None:
    async def scenario() -> None:
        bus = await live.connect()
        async with live.worker():
            for session_id in ("a", "b"):
                await bus.open_session(session_id, live.loaded.fingerprint, SETTINGS)
            await bus.send("a", Query(query_id="q", text="Please narrate.", after_seq=-1, time=0.0))
            await live.encode(bus, "a", 20, order=lambda frames, key: sorted(frames, key=key, reverse=True))
            await live.encode(bus, "b", 5)
            for session_id, count in (("a", 20), ("b", 5)):
                await bus.send(session_id, End(after_seq=count - 1))
                log = await whole_log(bus, session_id)
                assert decided(log) == list(range(count))
                assert isinstance(log[-1], SessionEnded)
            meta = await bus.session_meta("a")
            assert meta is not None
            assert (meta.admitted, meta.decided, meta.state) == (20, 20, "ended")
        await bus.close()

    asyncio.run(scenario())


def test_a_frame_of_wrong_shape_is_skipped_by_name_and_the_session_goes_on(live: Live) -> None:
    async def scenario() -> None:
        bus = await live.connect()
        async with live.worker():
            await bus.open_session("a", live.loaded.fingerprint, SETTINGS)
            await live.encode(bus, "a", 2)
            await bus.admit_frame("a", 1.0, b"picture")
            (pending,) = await bus.read_frames("encoder", 1, 1000)
            await bus.publish(pending, FrameTokens.from_tensor(2, 1.0, torch.zeros(3, 7).half()))
            await live.encode(bus, "a", 2, start=3)
            await bus.send("a", End(after_seq=4))
            log = await whole_log(bus, "a")
            (skipped,) = [entry for entry in log if isinstance(entry, FrameSkipped)]
            assert "[3, 7]" in skipped.reason
            assert "[10, 48]" in skipped.reason
            assert decided(log) == [0, 1, 3, 4]
        await bus.close()

    asyncio.run(scenario())


def test_a_released_session_is_taken_over_and_goes_on_as_if_nothing_had_happened(live: Live) -> None:
    async def run(session_id: str, takeovers: int) -> list[LogEntry]:
        bus = await live.connect()
        await bus.open_session(session_id, live.loaded.fingerprint, SETTINGS)
        await bus.send(session_id, Query(query_id="q", text="Please narrate.", after_seq=-1, time=1.0))
        for part in range(takeovers + 1):
            async with live.worker(f"replica{part}"):
                await live.encode(bus, session_id, 6, start=6 * part)
                if part == takeovers:
                    await bus.send(session_id, End(after_seq=6 * part + 5))
                    log = await whole_log(bus, session_id)
                elif part == 0:
                    await until(lambda: _decided(bus, session_id, 3))
        meta = await bus.session_meta(session_id)
        assert meta is not None
        assert meta.epoch >= takeovers
        await bus.close()
        return log

    async def _decided(bus: Bus, session_id: str, count: int) -> bool:
        meta = await bus.session_meta(session_id)
        return meta is not None and meta.decided >= count

    disturbed = asyncio.run(run("disturbed", 3))
    alone = asyncio.run(live_run(live, "alone", 24))
    same(disturbed, alone)


async def live_run(live: Live, session_id: str, count: int) -> list[LogEntry]:
    """The same stream on one replica from begin to end."""
    bus = await live.connect()
    async with live.worker():
        await bus.open_session(session_id, live.loaded.fingerprint, SETTINGS)
        await bus.send(session_id, Query(query_id="q", text="Please narrate.", after_seq=-1, time=1.0))
        await live.encode(bus, session_id, count)
        await bus.send(session_id, End(after_seq=count - 1))
        log = await whole_log(bus, session_id)
    await bus.close()
    return log


def test_a_replica_that_is_behind_hands_sessions_to_one_that_came_later_and_they_go_on_as_if_nothing_had_happened(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    live.config = live.config.model_copy(update={"lease_ms": 4000})  # for longer than a busy machine keeps one waiting
    monkeypatch.setattr(llm, "BALANCE_S", 1.2)
    monkeypatch.setattr(llm, "BEHIND", -1)  # whoever holds sessions is behind, so what stops them is the difference
    names = [f"s{number}" for number in range(6)]

    async def scenario() -> tuple[list[list[LogEntry]], list[dict[str, object]]]:
        bus = await live.connect()
        for name in names:
            await bus.open_session(name, live.loaded.fingerprint, SETTINGS)
            await bus.send(name, Query(query_id="q", text="Please narrate.", after_seq=-1, time=1.0))
        async with live.worker("early") as early:
            await until(lambda: holds(early, len(names)))
            async with live.worker("late") as late:
                for part in range(4):
                    for name in names:
                        await live.encode(bus, name, 6, start=6 * part)
                await until(lambda: holds(late, 3))
                await asyncio.sleep(2)  # it is content with that
                assert (len(early.held), len(late.held)) == (3, 3)
                for name in names:
                    await bus.send(name, End(after_seq=23))
                logs = [await whole_log(bus, name) for name in names]
                found = [early.stats(), late.stats()]
        await bus.close()
        return logs, found

    async def holds(worker: LLMWorker, count: int) -> bool:
        return len(worker.held) >= count

    logs, [early, late] = asyncio.run(scenario())
    assert (early["sessions_moved"], late["sessions_moved"]) == (3, 0)
    assert early["lost_leases"] == late["lost_leases"] == 0
    alone = asyncio.run(live_run(live, "alone", 24))
    for log in logs:
        same(log, alone)


def test_what_a_replica_had_not_written_when_it_lost_a_session_to_itself_is_not_written_later(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While appends wait, leases run out unnoticed, and the replica claims its own session."""

    async def scenario() -> list[LogEntry]:
        bus = await live.connect()
        async with live.worker() as worker:
            append, gate, waiting = worker.bus.append, asyncio.Event(), asyncio.Event()

            async def renew(leases: object) -> list[object]:
                return []

            async def slow(*what):
                if not gate.is_set():
                    waiting.set()
                    await gate.wait()
                return await append(*what)

            monkeypatch.setattr(worker.bus, "append", slow)
            monkeypatch.setattr(worker.bus, "renew", renew)
            await bus.open_session("a", live.loaded.fingerprint, SETTINGS)
            await live.encode(bus, "a", 1)
            await waiting.wait()
            await live.encode(bus, "a", 7, start=1)
            await until(lambda: has_decided(worker, 8))
            first = await bus.session_meta("a")
            await until(lambda: has_decided(worker, 16))
            again = await bus.session_meta("a")
            assert first is not None
            assert again is not None
            assert again.epoch > first.epoch
            assert again.position == 0
            monkeypatch.undo()
            gate.set()
            await bus.send("a", End(after_seq=7))
            log = await whole_log(bus, "a")
        await bus.close()
        return log

    log = asyncio.run(scenario())
    assert decided(log) == list(range(8))
    open_responses = 0
    for entry in log:
        open_responses += isinstance(entry, ResponseStarted) - isinstance(entry, ResponseEnded)
        assert open_responses in (0, 1)


def test_a_session_is_written_while_the_append_of_another_is_not_answered(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a cluster one of whose masters is away."""

    async def scenario() -> list[LogEntry]:
        bus = await live.connect()
        assert bus.partition("a") != bus.partition("b")
        async with live.worker() as worker:
            append, gate, waiting = worker.bus.append, asyncio.Event(), asyncio.Event()

            async def slow(lease, *rest):
                if lease.session_id == "b":
                    waiting.set()
                    await gate.wait()
                return await append(lease, *rest)

            monkeypatch.setattr(worker.bus, "append", slow)
            for session_id in ("a", "b"):
                await bus.open_session(session_id, live.loaded.fingerprint, SETTINGS)
            await live.encode(bus, "b", 3)
            await waiting.wait()
            await live.encode(bus, "a", 4)
            await bus.send("a", End(after_seq=3))
            assert decided(await whole_log(bus, "a")) == [0, 1, 2, 3]
            gate.set()
            await bus.send("b", End(after_seq=2))
            log = await whole_log(bus, "b")
        await bus.close()
        return log

    assert decided(asyncio.run(scenario())) == [0, 1, 2]


def test_what_is_logged_just_as_a_writer_ends_is_written_too(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a writer's last look and the moment at which another may begin."""
    session, written = SimpleSession("a"), list[LogEntry]()

    async def scenario() -> None:
        bus = await live.connect()
        engine = build_engine(live.loaded.model, live.loaded.template, EngineConfig(kv_memory_gb=0.05))
        model, shape = live.loaded.fingerprint, live.loaded.model.frame_shape
        features = live.loaded.features
        worker = LLMWorker(bus, engine, name="one", tokens_shape=shape, fingerprint=model, features=features)
        worker.held["a"] = cast("Held", SimpleSession("a", session))

        async def append(held: Held, entries: list[LogEntry], next_seq: int) -> None:
            written.extend(entries)
            if len(written) == 1:
                worker._outbox.put_nowait((session, [SessionEnded(reason="done")], 1))

        monkeypatch.setattr(worker, "_append", append)
        worker._outbox.put_nowait((session, [FramesDecided(first_seq=0, times=[0.0], p_silent=[0.9])], 1))
        appending = asyncio.create_task(worker._append_forever())
        async with asyncio.timeout(10):
            while len(written) < 2:
                await asyncio.sleep(0.01)
        worker._outbox.put_nowait(None)
        await appending
        await bus.close()

    asyncio.run(scenario())
    assert [type(entry) for entry in written] == [FramesDecided, SessionEnded]


@dataclass(eq=False)
class SimpleSession:
    """As much of a session, and of what holds one, as a writer looks at."""

    session_id: str
    session: SimpleSession | None = None


def test_what_breaks_a_writer_ends_the_replica(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        bus = await live.connect()
        async with live.worker() as worker:

            async def broken(*what):
                raise ZeroDivisionError

            monkeypatch.setattr(worker.bus, "append", broken)
            await bus.open_session("a", live.loaded.fingerprint, SETTINGS)
            await live.encode(bus, "a", 1)
            await bus.close()
            await asyncio.wait_for(live.workers[-1], 20)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(scenario())


def test_many_sessions_of_a_dead_replica_are_rebuilt_together_between_two_steps(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = [f"s{number}" for number in range(8)]

    async def scenario() -> int:
        bus = await live.connect()
        for session_id in sessions:
            await bus.open_session(session_id, live.loaded.fingerprint, SETTINGS)
            await live.encode(bus, session_id, 2)
        async with live.worker() as worker:
            reading, together = 0, 0
            read_log = worker.bus.read_log

            async def counted(session_id: str):
                nonlocal reading, together
                reading += 1
                together = max(together, reading)
                try:
                    return await read_log(session_id)
                finally:
                    reading -= 1

            monkeypatch.setattr(worker.bus, "read_log", counted)
            for session_id in sessions:
                await bus.send(session_id, End(after_seq=1))
                assert decided(await whole_log(bus, session_id)) == [0, 1]
        await bus.close()
        return together

    assert asyncio.run(scenario()) > 1


async def has_decided(worker: LLMWorker, frames: int) -> bool:
    return worker.stepper.counters["frames_decided"] >= frames


def test_a_takeover_after_evictions_and_trimming_goes_on_as_if_nothing_had_happened(live: Live) -> None:
    narrow = {"max_positions": 512, "memory_tokens": 16}

    async def run(session_id: str, parts: list[int]) -> list[LogEntry]:
        bus = await live.connect()
        await bus.open_session(session_id, live.loaded.fingerprint, SETTINGS)
        log: list[LogEntry] = []
        reading = asyncio.create_task(_collect(bus, session_id, log))
        start = 0
        for part in parts:
            async with live.worker(f"replica{start}", **narrow):
                for chunk in range(start, start + part, 30):
                    await live.encode(bus, session_id, 30, start=chunk)
                start += part
                if start == sum(parts):
                    await bus.send(session_id, End(after_seq=start - 1))
                    await asyncio.wait_for(reading, 30)
                else:
                    await until(lambda start=start: _at(bus, session_id, start - 2))
        await bus.close()
        return log

    async def _collect(bus: Bus, session_id: str, log: list[LogEntry]) -> None:
        async for _, entry in bus.tail(session_id):
            log.append(entry)

    async def _at(bus: Bus, session_id: str, count: int) -> bool:
        meta = await bus.session_meta(session_id)
        return meta is not None and meta.decided >= count

    disturbed = asyncio.run(run("disturbed", [30, 30, 30, 30]))
    alone = asyncio.run(run("alone", [120]))
    assert any(isinstance(entry, Evicted) for entry in disturbed)
    assert decided(disturbed) == list(range(120))
    same(disturbed, alone)


@pytest.mark.parametrize("trims", [0, 2])
def test_a_replica_that_dies_between_an_eviction_and_its_trim_leaves_the_trim_to_the_next(
    live: Live, monkeypatch: pytest.MonkeyPatch, trims: int
) -> None:
    """The log says Evicted already, the window in meta is that of an earlier eviction, or none."""
    narrow = {"max_positions": 512, "memory_tokens": 16}
    count = 150
    # Who is kept from renewing for as long as a lease, by a busy machine, leaves a trim to the next as well.
    live.config = live.config.model_copy(update={"lease_ms": 4000})

    async def scenario(session_id: str, dies: bool) -> tuple[list[LogEntry], list[int]]:
        bus = await live.connect()
        await bus.open_session(session_id, live.loaded.fingerprint, SETTINGS)
        await bus.send(session_id, Query(query_id="q", text="Please narrate.", after_seq=-1, time=1.0))
        windows: list[int] = []
        encoding = asyncio.create_task(encode(bus, session_id))
        if dies:
            async with live.worker("dies", **narrow) as worker:
                dead = _cut_at_trim(worker, monkeypatch, trims)
                await asyncio.wait_for(dead.wait(), 30)
            meta = await bus.session_meta(session_id)
            assert meta is not None
            windows += [window.first_seq if (window := read_window(meta)) else 0]
            windows += evictions([entry for _, entry in await bus.read_log(session_id)])
        async with live.worker("heir", **narrow):
            await encoding
            await bus.send(session_id, End(after_seq=count - 1))
            log = await whole_log(bus, session_id)
        meta = await bus.session_meta(session_id)
        assert meta is not None
        window = read_window(meta)
        assert window is not None
        left = [body.seq for _, body in await bus.read_all_inputs(session_id, "0-0") if isinstance(body, FrameTokens)]
        assert window.first_seq == min(left) == evictions(log)[-1]
        await bus.close()
        return log, windows

    async def encode(bus: Bus, session_id: str) -> None:
        for start in range(0, count, 30):
            await live.encode(bus, session_id, 30, start=start)

    cut, (before, *logged) = asyncio.run(scenario("cut", dies=True))
    assert len(logged) == trims + 1
    assert before == [0, *logged][trims] < logged[-1]
    assert evictions(cut)[: trims + 1] == logged
    whole, _ = asyncio.run(scenario("whole", dies=False))
    assert decided(cut) == list(range(count))
    assert evictions(cut) == evictions(whole)
    assert len(evictions(whole)) > trims + 1
    same(cut, whole)


def evictions(log: list[LogEntry]) -> list[int]:
    """The first frame that each eviction kept."""
    return [entry.first_seq for entry in log if isinstance(entry, Evicted)]


def _cut_at_trim(worker: LLMWorker, monkeypatch: pytest.MonkeyPatch, after: int) -> asyncio.Event:
    """Let nothing that a replica writes reach Redis, from its trim on that follows so many; tells when."""
    script, dead, left = worker.bus.script, asyncio.Event(), [None] * after

    async def cut(name: str, keys: Sequence[str], args: Sequence[str | int | float | bytes]) -> object:
        if name == "TRIM" and not left:
            dead.set()
        if dead.is_set():
            raise BusError("redis_unreachable", "the process is dead")
        if name == "TRIM":
            left.pop()
        return await script(name, keys, args)

    monkeypatch.setattr(worker.bus, "script", cut)
    return dead


def test_a_replica_claims_only_sessions_of_its_own_model(live: Live) -> None:
    async def scenario() -> None:
        bus = await live.connect()
        async with live.worker() as worker:
            await bus.open_session("other", "another-model", SETTINGS)
            await bus.open_session("mine", live.loaded.fingerprint, SETTINGS)
            await until(lambda: _claimed(worker))
            mine, other = await bus.session_meta("mine"), await bus.session_meta("other")
            assert mine is not None
            assert mine.owner == "replica"
            assert other is not None
            assert other.epoch == 0
        await bus.close()

    async def _claimed(worker: LLMWorker) -> bool:
        return worker.stats()["sessions"] == 1

    asyncio.run(scenario())


def test_settings_that_cannot_hold_end_the_session_with_the_reason(live: Live) -> None:
    async def scenario() -> None:
        bus = await live.connect()
        async with live.worker():
            await bus.open_session("a", live.loaded.fingerprint, SessionSettings(window_trigger=1_000_000))
            log = await whole_log(bus, "a")
            assert isinstance(log[-1], SessionEnded)
            assert "1000000" in log[-1].reason
        await bus.close()

    asyncio.run(scenario())


def test_a_session_whose_client_is_gone_is_ended_and_its_memory_freed(redis_url: str, tiny_checkpoint: Path) -> None:
    live = Live(redis_url, tiny_checkpoint, resume_s=1)

    async def scenario() -> None:
        bus = await live.connect()
        async with live.worker() as worker:
            await bus.open_session("a", live.loaded.fingerprint, SETTINGS)
            await live.encode(bus, "a", 2)
            await until(lambda: _ended(bus, "a"))
            await until(lambda: _free(worker))
        await bus.close()

    async def _ended(bus: Bus, session_id: str) -> bool:
        meta = await bus.session_meta(session_id)
        return meta is None or meta.state == "ended"

    async def _free(worker: LLMWorker) -> bool:
        return not worker.held and not worker.engine.sessions

    asyncio.run(scenario())


def test_a_client_is_gone_when_two_looks_in_a_row_have_missed_it(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an outage of Redis every client was silent for as long as that took."""

    async def scenario() -> list[str]:
        bus = await live.connect()
        async with live.worker() as worker:
            await bus.open_session("a", live.loaded.fingerprint, SETTINGS)
            held = await until(lambda: _held(worker))
            given_up: list[str] = []
            monkeypatch.setattr(held.session, "give_up", given_up.append)
            for longest_s in (-1, 1e6, -1):
                await worker._reap(held, longest_s)
            await worker.stepper.call(lambda: None)
            assert given_up == []
            await worker._reap(held, -1)
            await worker.stepper.call(lambda: None)
        await bus.close()
        return given_up

    async def _held(worker: LLMWorker):
        return worker.held.get("a")

    [reason] = asyncio.run(scenario())
    assert reason.startswith("client_gone")


def test_a_session_whose_owner_died_between_its_last_entry_and_its_end_is_ended_by_the_next(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        bus = await live.connect()
        await bus.open_session("a", live.loaded.fingerprint, SETTINGS)

        async def dies(*_: object) -> None:
            raise BusError("unavailable", "this replica dies now")

        with monkeypatch.context() as patched:
            patched.setattr(Bus, "end_session", dies)
            async with live.worker("first") as worker:
                await live.encode(bus, "a", 3)
                await bus.send("a", End(after_seq=2))
                log = await whole_log(bus, "a")
                assert isinstance(log[-1], SessionEnded)
                await until(lambda: _are(not worker.held))
        meta = await bus.session_meta("a")
        assert meta is not None
        assert meta.state != "ended"
        async with live.worker("second") as worker:
            async with asyncio.timeout(20):
                while (meta := await bus.session_meta("a")) is not None and meta.state != "ended":
                    await asyncio.sleep(0.02)
            await until(lambda: _are(not worker.held))
            assert worker.engine.kv_use.reserved == 0
        await bus.close()

    async def _are(so: bool) -> bool:
        return so

    asyncio.run(scenario())


def test_a_session_that_ends_while_it_is_taken_over_has_its_end_in_the_log(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> list[LogEntry]:
        bus = await live.connect()
        await bus.open_session("a", live.loaded.fingerprint, SETTINGS)
        await bus.send("a", End(after_seq=-1))
        async with live.worker() as worker:
            call = worker.stepper.call

            async def late(what: Callable[[], object]) -> object:
                found = await call(what)
                async with asyncio.timeout(20):
                    while isinstance(found, Held) and not found.session.ended:
                        await asyncio.sleep(0.01)
                return found

            monkeypatch.setattr(worker.stepper, "call", late)
            log = await whole_log(bus, "a")
        await bus.close()
        return log

    assert isinstance(asyncio.run(scenario())[-1], SessionEnded)

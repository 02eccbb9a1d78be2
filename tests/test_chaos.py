"""Faults of Redis under a whole application in one process, and a short chaos run of the real one.

The clients of jobs/chaos_client.py stream, come back, and compare what they were told with the log.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import websockets
import yaml
from application import Application, running
from live_client import picture

from actors.bus import Bus, BusConfig, BusError
from actors.messages import FrameSkipped, LogEntry, SessionSettings
from actors.redis_server import RedisServer
from jobs import chaos, chaos_faults
from jobs.chaos import _inject, main
from jobs.chaos_application import DURABLE, WITH_PROGRAM, ChaosError
from jobs.chaos_application import Application as ChaosApplication
from jobs.chaos_client import FPS, Books, ChaosClient
from jobs.chaos_faults import FAULTS, lose_data
from jobs.chaos_report import ChaosReport, Injected, Latency, share
from serve.client_events import pack_binary

DEADLINE_S = 90.0


@dataclass
class InProcess:
    """What faults need of an application."""

    url: str
    redis: RedisServer
    redis_url: str
    data: Path


@contextmanager
def application(tiny: dict[str, object], folder: Path, **settings: object) -> Iterator[InProcess]:
    server = RedisServer(DURABLE, data=folder)
    address = server.start()
    try:
        with running(tiny, address, gateways=2, resume_s=600, **settings) as app:
            yield InProcess(app.url, server, address, folder)
    finally:
        server.stop()


@asynccontextmanager
async def streaming(
    app: InProcess | Application, sessions: int = 3
) -> AsyncIterator[tuple[list[ChaosClient], list[Books]]]:
    """Clients that have decided their first frames; after the block they say the end, and the books are filled."""
    stop, found = asyncio.Event(), list[Books]()
    clients = [ChaosClient(app.url, picture(), seed, seed == 0, stop, ask_every=4) for seed in range(sessions)]
    tasks = [asyncio.create_task(client.run()) for client in clients]
    await going_on(clients, tasks)
    yield clients, found
    stop.set()
    async with asyncio.timeout(DEADLINE_S):
        found += await asyncio.gather(*tasks)


async def going_on(clients: list[ChaosClient], tasks: list[asyncio.Task[Books]] | None = None) -> None:
    """Return once every session has decided a frame that is due from now on."""
    since = time.monotonic()
    async with asyncio.timeout(DEADLINE_S):
        while any(client.books.recovery(since) is None for client in clients):
            assert not any(task.done() for task in tasks or ()), [client.books for client in clients]
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("redis paused", marks=pytest.mark.slow),
        "connections reset",
        "redis crashed",
        pytest.param("redis full", marks=pytest.mark.slow),
    ],
)
def test_sessions_outlive_a_fault_of_redis_with_nothing_missing_and_nothing_twice(
    tiny: dict[str, object], tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos_faults, "PAUSE_S", 4.5)  # longer than a lease, and than a command may take
    monkeypatch.setattr(chaos_faults, "FULL_S", 2.0)

    async def scenario(app: InProcess) -> list[Books]:
        async with streaming(app) as (clients, found):
            await FAULTS[fault](app, random.Random(0), picture())  # type: ignore[arg-type]
            await going_on(clients)
            async with asyncio.timeout(DEADLINE_S):
                while not all(client.books.asked for client in clients):
                    await asyncio.sleep(0.05)
        return found

    with application(tiny, tmp_path) as app:
        for books in asyncio.run(scenario(app)):
            assert books.sound, books
            assert books.asked
            assert books.acknowledged == len(books.decided) == len(books.due)


def test_sessions_whose_data_is_lost_end_with_a_word_and_new_ones_work(tiny: dict[str, object], tmp_path: Path) -> None:
    async def scenario(app: InProcess) -> tuple[list[Books], list[Books]]:
        clients = [ChaosClient(app.url, picture(), seed, False, asyncio.Event()) for seed in range(2)]
        tasks = [asyncio.create_task(client.run(audit=False)) for client in clients]
        await going_on(clients, tasks)
        await asyncio.to_thread(lose_data, app)
        async with asyncio.timeout(DEADLINE_S):
            ended = await asyncio.gather(*tasks)
        async with streaming(app, sessions=1) as (_, found):
            pass
        return ended, found

    with application(tiny, tmp_path) as app:
        ended, later = asyncio.run(scenario(app))
    assert [books.outcome for books in ended] == ["expired", "expired"]
    assert all("session_expired" in books.errors for books in ended)
    assert all(books.sound for books in later)


@pytest.mark.slow
def test_while_redis_is_away_nobody_storms_it(tiny: dict[str, object], tmp_path: Path) -> None:
    """Each command is tried again with pauses that grow: a whole application asks a few times a second."""

    async def scenario(app: InProcess) -> float:
        async with streaming(app, sessions=2) as (clients, _):
            port = app.redis.port
            assert port is not None
            app.redis.stop()
            attempts = 0

            async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                nonlocal attempts
                attempts += 1
                writer.close()

            server = await asyncio.start_server(refuse, "127.0.0.1", port)
            began = time.monotonic()
            await asyncio.sleep(5)
            rate = attempts / (time.monotonic() - began)
            server.close()
            await server.wait_closed()
            await asyncio.to_thread(app.redis.start)
            await going_on(clients)
        return rate

    with application(tiny, tmp_path) as app:
        rate = asyncio.run(scenario(app))
    assert 0 < rate < 100


@pytest.mark.slow
def test_ten_times_too_many_sessions_and_a_flood_leave_those_admitted_alone_and_nothing_behind(
    tiny: dict[str, object], redis_url: str
) -> None:
    flooded = 600

    async def refusal(address: str) -> str:
        async with websockets.connect(address) as socket:
            return str(json.loads(await socket.recv())["error"]["code"])

    async def flood(address: str, full: asyncio.Event) -> dict[str, int]:
        """All frames of five minutes at once; the counts at the end of the session."""
        async with websockets.connect(address, max_size=None) as socket:
            assert json.loads(await socket.recv())["type"] == "session.created"
            full.set()
            for index in range(flooded):
                await socket.send(pack_binary(index / FPS, picture()))
            await socket.send(json.dumps({"type": "input_video_buffer.end"}))
            while (event := json.loads(await socket.recv()))["type"] != "session.ended":
                pass
        return dict(event["frames"])

    async def tasks() -> int:
        return len(asyncio.all_tasks())

    async def scenario(app: Application) -> tuple[list[Books], dict[str, int], list[str]]:
        address = f"{app.url.replace('http', 'ws')}/v1/realtime"
        async with streaming(app, sessions=2) as (clients, found):
            before, full = await asyncio.to_thread(app.call, tasks()), asyncio.Event()
            flooding = asyncio.create_task(flood(address, full))
            await full.wait()
            said = await asyncio.gather(*(refusal(address) for _ in range(30)))
            counts = await flooding
            await going_on(clients)
            async with asyncio.timeout(DEADLINE_S):
                while await asyncio.to_thread(app.call, tasks()) > before:
                    await asyncio.sleep(0.05)
        return found, counts, said

    with running(tiny, redis_url, sessions=3, sessions_per_key=64) as app:
        found, counts, said = asyncio.run(scenario(app))
    for books in found:
        assert books.sound, books
        assert books.acknowledged == len(books.decided) == len(books.due)
    assert set(said) == {"sessions_full"}
    assert counts["received"] == flooded == counts["decided"] + counts["dropped"]
    assert counts["dropped"] > 0


@pytest.mark.parametrize(
    ("policy", "survives"),
    [({"appendonly": "yes", "appendfsync": "always"}, True), ({"appendonly": "no"}, False)],
    ids=["always", "none"],
)
def test_what_was_acknowledged_survives_a_killed_server_where_the_log_is_written_first(
    tmp_path: Path, policy: dict[str, str], survives: bool
) -> None:
    server = RedisServer(DURABLE | policy, data=tmp_path)
    app = InProcess("", server, server.start(), tmp_path)
    try:
        assert asyncio.run(_admitted_over_a_crash(app)) == ((True, 20) if survives else (False, None))
    finally:
        server.stop()


async def _admitted_over_a_crash(app: InProcess) -> tuple[bool, int | None]:
    """Whether the generation is the same after the server was killed, and how many frames it knows of."""
    bus = await Bus.connect(BusConfig(partitions=1), app.redis_url)
    try:
        await bus.open_session("a", "model", SessionSettings())
        before = await bus.generation()
        for seq in range(20):
            assert await bus.admit_frame("a", seq / 2, b"picture") == seq
        await FAULTS["redis crashed"](app, random.Random(0), b"")  # type: ignore[arg-type]
        meta = await bus.session_meta("a")
        return await bus.generation() == before, meta.admitted if meta else None
    finally:
        await bus.close()


def test_what_a_power_cut_takes_back_is_noticed_by_the_owner_and_by_who_was_told_more(tmp_path: Path) -> None:
    """Under `everysec` the disk may hold less than was answered: an earlier copy of the folder stands for it."""
    folder, disk = tmp_path / "redis", tmp_path / "disk"
    folder.mkdir()
    server = RedisServer(DURABLE, data=folder)
    config = BusConfig(partitions=1, resume_s=0.4)

    def entries(first: int, count: int) -> list[LogEntry]:
        return [FrameSkipped(seq=seq, time=seq / 2, reason="damaged") for seq in range(first, first + count)]

    async def scenario(url: str) -> None:
        bus = await Bus.connect(config, url)
        try:
            before = await bus.generation()
            await bus.open_session("a", "model", SessionSettings())
            [lease] = await bus.claim("replica", "model", 0, 1)
            assert await bus.append(lease, 0, entries(0, 3), 3) == "ok"
            shutil.copytree(folder, disk)
            assert await bus.append(lease, 3, entries(3, 2), 5) == "ok"
            ahead = bus.tail("a")
            assert [(await anext(ahead))[0] for _ in range(5)] == [0, 1, 2, 3, 4]
            await asyncio.to_thread(restart_with, server, folder, disk)
            assert await bus.generation() == before
            assert await bus.append(lease, 5, entries(5, 1), 6) == "stale"
            with pytest.raises(BusError, match="session_expired: the log of session 'a' ends before 4"):
                await asyncio.wait_for(anext(ahead), 20)
        finally:
            await bus.close()

    try:
        asyncio.run(scenario(server.start()))
    finally:
        server.stop()


def restart_with(server: RedisServer, folder: Path, disk: Path) -> None:
    """Kill a server and start it with what a copy of its folder holds."""
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    server.stop()
    shutil.rmtree(folder)
    shutil.copytree(disk, folder)
    server.start()


def test_the_books_tell_what_is_missing_twice_out_of_order_or_lost() -> None:
    def event(position: int, seq: int, number: int = 0, video_time: float | None = None) -> dict[str, object]:
        at = seq / FPS if video_time is None else video_time
        told = {"type": "frame_decided", "event_id": f"event_{position}_{number}", "position": position}
        return {**told, "seq": seq, "video_time": at}

    def books(*events: dict[str, object], acknowledged: int = 0) -> Books:
        client, seen = ChaosClient("", b"", 0, False, asyncio.Event()), set[str]()
        client.books.acknowledged = acknowledged
        for one in events:
            client._take(one, after=-1, seen=seen)  # type: ignore[arg-type]
        client.books.outcome = "ended"
        return client.books

    assert books(event(0, 0), event(1, 1), acknowledged=2).sound
    assert books(event(0, 0), event(0, 0)).duplicated == 1
    assert books(event(0, 0), event(1, 0)).disorder == 1
    assert books(event(1, 0), event(0, 1)).disorder == 1
    assert books(event(0, 0, video_time=9.0)).disorder == 1
    assert books(event(0, 0), acknowledged=3).lost == 2
    assert not books(event(0, 0), acknowledged=3).sound
    told = books(event(0, 0), event(1, 3), acknowledged=4)
    told.skipped, told.dropped = {1}, 1
    assert told.lost == 0
    assert told.undecided == [2]
    assert told.settled == 4
    told.due = {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0, 4: 5.0}
    assert told.recovery(1.5) == told.decided[3] - 1.5
    assert told.recovery(4.5) is None


@pytest.mark.slow
def test_a_client_that_was_away_for_long_sends_no_more_than_a_gateway_keeps(
    tiny: dict[str, object], redis_url: str
) -> None:
    class Late(random.Random):
        """The stream began a minute ago."""

        def uniform(self, a: float, b: float) -> float:
            return -60.0 if b == 1 / FPS else super().uniform(a, b)

    async def scenario(app: Application) -> Books:
        stop = asyncio.Event()
        client = ChaosClient(app.url, picture(), 1, False, stop)
        client._random = Late(1)
        task = asyncio.create_task(client.run())
        await going_on([client], [task])
        stop.set()
        async with asyncio.timeout(DEADLINE_S):
            return await task

    with running(tiny, redis_url) as app:
        books = asyncio.run(scenario(app))
    assert books.sound, books
    assert books.dropped == 0
    assert len(books.decided) > 120


def test_chaos_waits_for_all_that_stream_and_a_machine_too_slow_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos, "SETTLE_S", 0.0)
    quick, slow = (ChaosClient("http://nowhere", b"", 0, False, asyncio.Event(), fps=2) for _ in range(2))
    quick._start = slow._start = time.monotonic() - 100
    quick.books.decided = dict.fromkeys(range(199), 0.0)
    slow.books.decided = dict.fromkeys(range(100), 0.0)
    slow.books.dropped = 20
    assert quick.behind_s == pytest.approx(0.5, abs=1)
    assert slow.behind_s == pytest.approx(40, abs=1)

    async def ended() -> Books:
        return Books()

    async def scenario() -> tuple[float, float]:
        running, over = asyncio.create_task(asyncio.sleep(60, Books())), asyncio.create_task(ended())
        await asyncio.wait([over])
        found = await chaos.keeping_up([quick, slow], [running, running])
        without = await chaos.keeping_up([quick, slow], [running, over])
        running.cancel()
        return found, without

    found, without = asyncio.run(scenario())
    assert found > chaos.BEHIND_S > without


def test_a_report_tells_for_how_long_clients_were_away_after_each_fault() -> None:
    books = Books(outcome="ended", away=[(9.0, 9.5), (11.0, 12.5), (31.0, 31.25)], due={0: 10.5}, decided={0: 14.0})
    report = ChaosReport({}, [], faults=[Injected("gateway killed", "", 10.0, 10.0, whole=30.0)])
    report.add([books, Books()])
    [fault] = report.faults
    assert (fault.away, fault.recoveries, fault.stuck) == ([1.5], [4.0], 1)
    assert "1.5s" in report.table()


def test_a_report_compares_what_decisions_took_before_a_fault_and_during_it(tmp_path: Path) -> None:
    due = {index: index / FPS for index in range(40)}
    slow = {index: at + (0.1 if at < 10 else 0.25) for index, at in due.items()}
    fast = {index: at + 0.05 for index, at in due.items() if index != 39}
    books = [Books(outcome="ended", due=due, decided=decided) for decided in (slow, fast)]
    report = ChaosReport({"date": "", "cpu": "", "sessions": 2, "seed": 0}, [])
    report.faults = [
        Injected("overload", "", 10.0, 20.0, whole=21.0, calm=5.0),
        Injected("llm killed", "", 25.0, 25.0, whole=26.0, calm=22.0),
    ]
    report.add(books)
    overload, killed = report.faults
    assert overload.before == Latency(frames=20, undecided=0, p50_s=0.05, p95_s=0.1)
    assert overload.during == Latency(frames=40, undecided=1, p50_s=0.25, p95_s=0.25)
    assert killed.during == Latency() == Latency.of([])
    assert Latency.of([0.1, math.inf]) == Latency(frames=2, undecided=1, p50_s=0.1, p95_s=None)
    table = report.table().splitlines()
    [at] = [number for number, line in enumerate(table) if line.startswith("overload") and "before" in line]
    assert table[at].split() == ["overload", "before", "0.05s", "0.10s", "20", "0"]
    assert table[at + 1].split() == ["during", "0.25s", "0.25s", "40", "1"]
    report.save(tmp_path / "report")
    [saved, _] = json.loads((tmp_path / "report.json").read_text())["faults"]
    assert saved["during"] == {"frames": 40, "undecided": 1, "p50_s": 0.25, "p95_s": 0.25}
    assert (saved["calm"], saved["began"], saved["whole"]) == (5.0, 10.0, 21.0)


def test_a_fault_that_cannot_be_injected_breaks_the_promises_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def impossible(*what: object) -> str:
        raise ChaosError("not redeployed")

    monkeypatch.setitem(FAULTS, "redeployed", impossible)
    app = cast("ChaosApplication", None)
    injected = asyncio.run(_inject("redeployed", app, random.Random(0), b"", [], []))
    assert injected.what == "FAILED: not redeployed"
    report = ChaosReport({}, [], faults=[injected], works_after_loss=True)
    report.add([])
    assert not report.kept


def test_an_application_ends_with_the_program_that_started_it() -> None:
    with subprocess.Popen(["/bin/sh", "-c", WITH_PROGRAM, "sh", "sleep", "600"], stdin=subprocess.PIPE) as started:
        assert started.stdin is not None
        started.stdin.close()
        assert started.wait(timeout=60) == -signal.SIGTERM


def test_shares_of_nothing_are_no_numbers() -> None:
    assert str(share([], 0.5)) == "nan"
    assert (share([3, 1, 2], 0.5), share([1.0, 2.0], 0.99)) == (2, 2.0)


@pytest.mark.slow
def test_an_llm_replica_may_be_killed_and_redis_may_lose_data(
    tiny: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another LLM replica takes over. Encoders and gateways are killed in test_serve.py."""
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump({"model": tiny}))
    faults = ["llm killed", "redis crashed"]
    status = main(
        [
            "--sessions",
            "4",
            "--fps",
            "2",
            "--settings",
            str(settings),
            "--save",
            str(tmp_path / "report"),
            "--faults",
            *faults,
        ]
    )
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert status == 0, said
    assert sorted(fault["name"] for fault in report["faults"]) == sorted(faults)
    assert report["totals"]["survived"] == 4
    assert (tmp_path / "report.png").stat().st_size > 10_000

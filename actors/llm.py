"""LLM actor: holds the leases of its sessions, feeds their input to the engine, writes their logs.

Two threads. The event loop does all that touches Redis: claiming and renewing leases, reading
input, appending log entries, trimming. The step thread (stepper.py) owns the engine and never waits
for Redis. A KV cache is only a view of the log, so a session that is taken over is rebuilt by folding
its log (held.py), and a replica whose append is refused as stale drops the session without a word.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Iterator, Sequence
from functools import partial
from typing import Literal

from prometheus_client.core import Metric

from actors.backends import build_engine, load_model
from actors.bus import Bus, BusError, Lease, SessionMeta
from actors.config import Config
from actors.engine import Engine, EngineConfig, NoCapacity
from actors.held import Held, LostFrames, StoredEntry, StoredInput, read_window, rebuild, stream_order
from actors.messages import Evicted, LogEntry, MessageError, Query, SessionEnded, encode
from actors.meters import LLMMeters, counter, counters, gauge
from actors.replicas import Reporter, least_loaded
from actors.session import Session, SessionError
from actors.stepper import Stepper
from actors.tasks import end_all

logger = logging.getLogger(__name__)

RETRY_S = (0.05, 1.0)
BLOCK_MS = 1000
CLAIMS_A_LEASE = 4  # looks for sessions that nobody holds, in the time of a lease
TAKEOVERS_AT_ONCE = 8
BALANCE_S = 2.0  # between two looks at how much work other replicas have; they say so every second
BEHIND = 2  # frames that wait for each session: two looks in a row at more, and some sessions go elsewhere
APPENDS_AT_ONCE = 2  # of a partition, so that one whose server is away neither holds up others nor is stormed

Logged = tuple[Session, list[LogEntry], int]


class LLMWorker:
    """One replica's LLM side, hosted by Serve or a test: `run` until `stop`, `stats` at any time.

    `tokens_shape` is (N, D), what a frame's tokens must look like; `fingerprint` says which
    sessions this replica may claim, `features` which encoder its frame tokens must come from;
    `threshold` is the one its checkpoint was calibrated to, if it was.
    """

    def __init__(
        self,
        bus: Bus,
        engine: Engine,
        *,
        name: str,
        tokens_shape: tuple[int, int],
        fingerprint: str,
        features: str,
        threshold: float | None = None,
    ) -> None:
        self.bus = bus
        self.engine = engine
        self.name = name
        self.tokens_shape = tokens_shape
        self.fingerprint = fingerprint
        self.features = features
        self.threshold = threshold
        self.held: dict[str, Held] = {}
        self._taking: dict[str, Lease] = {}
        self.meters = LLMMeters(self._figures)
        self.stepper = Stepper(engine, self._hand_over, self.meters.stepped)
        self._claims = self._lost_leases = self._moved = 0
        self._outbox: asyncio.Queue[Logged | Exception | None] = asyncio.Queue()
        self._unwritten: dict[Session, tuple[list[LogEntry], int]] = {}
        self._writing: dict[Session, asyncio.Task[None]] = {}
        self._appends = [asyncio.Semaphore(APPENDS_AT_ONCE) for _ in range(bus.config.partitions)]
        self._stopping = asyncio.Event()
        self._claim_now = asyncio.Event()

    async def run(self) -> None:
        """Serve sessions until `stop`; then finish the step, write the log and release the leases.

        Raises what broke the step thread or a loop, after releasing the leases.
        """
        reporter = Reporter(self.bus, "llm", self.name, self.fingerprint, self.stats, self.meters.registry)
        async with reporter.running():
            await self._run()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        stepping = asyncio.create_task(self.stepper.run())
        appending = asyncio.create_task(self._append_forever())
        tasks = [asyncio.create_task(self._claim_forever()), asyncio.create_task(self._renew_forever())]
        tasks += [asyncio.create_task(self._read_forever(p)) for p in range(self.bus.config.partitions)]
        tasks += [asyncio.create_task(self._reap_forever()), asyncio.create_task(self._until_stopped())]
        tasks += [asyncio.create_task(self._balance_forever())]
        try:
            done, _ = await asyncio.wait([stepping, appending, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for finished in done:
                finished.result()
        finally:
            self.stepper.stop()
            await asyncio.wait([stepping])
            self._outbox.put_nowait(None)
            await asyncio.wait([appending])
            await end_all([*tasks, *self._writing.values()])
            for held in self.held.values():
                await self._guarded(self.bus.release(held.lease))

    def stop(self) -> None:
        """Ask `run` to end; may be called from any thread once it runs."""
        self._loop.call_soon_threadsafe(self._stopping.set)

    def stats(self) -> dict[str, object]:
        """Counters since the start, and the newest steps as (kind, session, first seq, last seq, start, end).

        `frames_per_s` is the rate of the newest steps that decided frames, None when there was none.
        """
        return {
            **self.stepper.counters,
            "frames_per_s": self.stepper.decision_rate(),
            "claims": self._claims,
            "lost_leases": self._lost_leases,
            "sessions_moved": self._moved,
            "sessions": len(self.held.keys() | self._taking.keys()),
            "room": self.engine.room - len(self._taking.keys() - self.held.keys()),
            "step_s": self.stepper.step_s,
            "waiting_frames": self._waiting_frames,
            "timeline": list(self.stepper.timeline),
        }

    @property
    def _waiting_frames(self) -> int:
        return sum(held.session.waiting_frames for held in list(self.held.values()))

    def _figures(self) -> list[Metric]:
        said, use = self.stepper.counters, self.engine.kv_use
        rebuilds = [({"cause": "window"}, said["evictions"]), ({"cause": "takeover"}, self._claims)]
        return [
            gauge("sessions", "Sessions that a gateway shows or an LLM replica holds", len(self.held)),
            gauge("waiting_frames", "Frames that are encoded and not decided", self._waiting_frames),
            counter("frames_decided", "Frames that are in their session's context", said["frames_decided"]),
            counter("responses", "Responses begun", said["responses"]),
            counter("response_tokens", "Tokens spoken", said["tokens"]),
            counters("rebuilds", "Contexts built anew: the window was full, or a session was taken over", rebuilds),
            counter("leases_lost", "Sessions lost to another replica", self._lost_leases),
            counter("sessions_moved", "Sessions handed to a replica with less work", self._moved),
            gauge("kv_positions_filled", "Positions of the KV memory that hold a context", use.filled),
            gauge("kv_positions_reserved", "Positions of the KV memory set aside for sessions", use.reserved),
            gauge("kv_positions", "Positions of the KV memory", use.total),
        ]

    # -- leases ---------------------------------------------------------------------------------

    async def _claim_forever(self) -> None:
        """Take over sessions nobody owns, as many as there is room for."""
        partitions = list(range(self.bus.config.partitions))
        while True:
            self._claim_now.clear()  # before looking: what comes while this looks elsewhere is not missed
            random.shuffle(partitions)
            for partition in partitions:
                if (room := self.engine.room - len(self._taking)) > 0:
                    await self._guarded(self._claim(partition, room))
            await self._take_over_all()
            await _wait(self._claim_now, self.bus.config.lease_ms / 1000 / CLAIMS_A_LEASE)

    async def _claim(self, partition: int, limit: int) -> None:
        claimed = await self.bus.claim(self.name, self.fingerprint, partition, limit)
        self._taking |= {lease.session_id: lease for lease in claimed}

    async def _take_over_all(self) -> None:
        """Rebuild the sessions just claimed, several at once: what one reads, others wait for between two steps."""
        turns = asyncio.Semaphore(TAKEOVERS_AT_ONCE)

        async def take(lease: Lease) -> None:
            async with turns:
                if self._taking.get(lease.session_id) == lease:  # else it was lost while others were rebuilt
                    await self._guarded(self._take(lease))

        leases = list(self._taking.values())
        done = await asyncio.gather(*map(take, leases), return_exceptions=True)
        for error in filter(None, done):
            raise error
        # A read that began before knows nothing of a session that came since.
        for partition in {self.bus.partition(s) for lease in leases if (s := lease.session_id) in self.held}:
            await self._guarded(self.bus.wake(partition))

    async def _take(self, lease: Lease) -> None:
        """Go on with a session claimed, end it where that is impossible, give it back where it is so here."""
        try:
            if (earlier := self.held.get(lease.session_id)) is not None:  # its lease ran out unnoticed
                await self._drop(earlier)
            await self._take_over(lease)
        except (SessionError, LostFrames, MessageError) as error:
            await self._refuse(lease, str(error))
        except (NoCapacity, BusError) as error:
            logger.warning("session=%s not taken over: %s", lease.session_id, error)
            await self._guarded(self.bus.release(lease))
        finally:
            self._taking.pop(lease.session_id, None)

    async def _take_over(self, lease: Lease) -> None:
        """Fold the session's log and input into a session of this engine."""
        meta = await self.bus.session_meta(lease.session_id)
        if meta is None:
            return
        window = read_window(meta)
        log = await self.bus.read_log(lease.session_id)
        inputs = await self.bus.read_all_inputs(lease.session_id, window.in_id if window else "0-0")
        held = await self.stepper.call(partial(self._rebuild, lease, meta, log, inputs))
        if self.held.get(lease.session_id) is not held:
            await self.stepper.call(partial(self._close, held))
            return
        if log and isinstance(log[-1][1], SessionEnded):  # who held it died between its last entry and its end
            await self._guarded(self.bus.end_session(lease))
            await self._drop(held)
            return
        self._claims += 1
        logger.info("session=%s epoch=%d entries=%d taken over", lease.session_id, lease.epoch, len(log))

    def _rebuild(
        self, lease: Lease, meta: SessionMeta, log: Sequence[StoredEntry], inputs: Sequence[StoredInput]
    ) -> Held:
        """On the step thread: the session is known to the loop before anything that its steps log."""
        held = rebuild(self.engine, lease, meta, log, inputs, self.tokens_shape)
        self._loop.call_soon_threadsafe(self._hold, held)
        return held

    def _hold(self, held: Held) -> None:
        """Count a rebuilt session among ours, unless its lease was lost meanwhile."""
        if self._taking.get(held.lease.session_id) == held.lease:
            self.held[held.lease.session_id] = held

    def _close(self, held: Held) -> None:
        """On the step thread: free what the session takes, unless another session of that id took its place."""
        if self.engine.sessions.get(held.lease.session_id) is held.session:
            self.engine.close(held.lease.session_id)

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(self.bus.config.renew_ms / 1000)
            if self.held or self._taking:
                await self._guarded(self._renew())

    async def _renew(self) -> None:
        """Prolong all leases, those of sessions being rebuilt included: that takes as long as it takes."""
        leases = [*self._taking.values(), *(held.lease for held in self.held.values())]
        for lease in await self.bus.renew(leases):
            if self._taking.get(lease.session_id) == lease:
                del self._taking[lease.session_id]
            held = self.held.get(lease.session_id)
            if held is not None and held.lease == lease:
                await self._drop(held)

    async def _balance_forever(self) -> None:
        """Hand sessions to a replica with less work while frames wait here: one that came later has none of its own."""
        behind = 0
        while True:
            await asyncio.sleep(BALANCE_S)
            behind = behind + 1 if self._waiting_frames > BEHIND * len(self.held) else 0
            if behind > 1:
                await self._guarded(self._balance())

    async def _balance(self) -> None:
        """An eighth of the difference at a time: what moves is rebuilt there, beside the sessions it has."""
        heir = least_loaded(self.name, self.fingerprint, await self.bus.reports())
        if heir is None:
            return
        surplus = len(self.held) - heir.sessions
        moving = min(heir.room, max(1, surplus // 8)) if surplus > 1 else 0
        cheapest = sorted(self.held.values(), key=lambda held: (held.session.response is not None, held.session.fed))
        for held in cheapest[:moving]:
            given = await self.bus.release(held.lease, heir.name)
            if given:
                self._moved += 1
                logger.info("session=%s handed to replica=%s", held.lease.session_id, heir.name)
            await self._drop(held, lost=not given)

    async def _reap_forever(self) -> None:
        """End sessions whose client was not heard of for as long as it may come back, and a while longer."""
        resume_s = self.bus.config.resume_s
        while True:
            await asyncio.sleep(resume_s / 4)
            for held in list(self.held.values()):
                await self._guarded(self._reap(held, resume_s))

    async def _reap(self, held: Held, resume_s: float) -> None:
        meta = await self.bus.session_meta(held.lease.session_id)
        if meta is None:
            await self._drop(held)
        elif meta.idle_ms <= resume_s * 1000:
            held.missed = False
        elif not held.missed:
            held.missed = True  # by the second look only: Redis may have been away, and with it every client
        else:
            reason = f"client_gone: nothing was heard of the client for {meta.idle_ms / 1000:.0f} s"
            self.stepper.post(partial(held.session.give_up, reason))

    async def _drop(self, held: Held, lost: bool = True) -> None:
        """Forget a session that another replica owns now, or that ended; `lost` unless we gave it away."""
        session_id = held.lease.session_id
        if self.held.get(session_id) is held:
            del self.held[session_id]
            self._lost_leases += lost and not held.session.ended
            self.meters.forget(session_id)
            await self.stepper.call(partial(self._close, held))
            self._claim_now.set()

    async def _refuse(self, lease: Lease, reason: str) -> None:
        """End a session that cannot run here or anywhere, with the reason in its log."""
        logger.warning("session=%s ended: %s", lease.session_id, reason)
        meta = await self.bus.session_meta(lease.session_id)
        if meta is not None:
            await self.bus.append(lease, meta.position, [SessionEnded(reason=reason)], meta.decided)
            await self.bus.end_session(lease)

    # -- input ----------------------------------------------------------------------------------

    async def _read_forever(self, partition: int) -> None:
        while True:
            await self._guarded(self._read(partition))

    async def _read(self, partition: int) -> None:
        """Read what came for the sessions of a partition; a read that ends early and empty means a new session."""
        cursors = {s: held.cursor for s, held in self.held.items() if self.bus.partition(s) == partition}
        start = time.monotonic()
        items = await self.bus.read_inputs(cursors, BLOCK_MS, partition)
        for session_id, entry_id, message in items:
            held = self.held.get(session_id)
            if held is not None and stream_order(held.cursor) < stream_order(entry_id):
                held.cursor = entry_id
                held.note_input(entry_id, message)
                self.stepper.post(partial(held.deliver, entry_id, message, self.tokens_shape))
        if not items and time.monotonic() - start < BLOCK_MS / 2000:
            self._claim_now.set()

    # -- the log --------------------------------------------------------------------------------

    def _hand_over(self, session_id: str, entries: list[LogEntry], next_seq: int) -> None:
        """On the step thread: what a step logged goes to the loop."""
        item = (self.engine.sessions[session_id], entries, next_seq)
        self._loop.call_soon_threadsafe(self._outbox.put_nowait, item)

    async def _append_forever(self) -> None:
        """Write what was logged: of each session in order, of many at the same time.

        What gathers while Redis answers goes out in one append a session. Raises what broke a writer.
        """
        while (item := await self._outbox.get()) is not None:
            if isinstance(item, Exception):
                raise item
            session, entries, next_seq = item
            earlier, _ = self._unwritten.get(session, ([], 0))
            self._unwritten[session] = [*earlier, *entries], next_seq
            if session not in self._writing:
                self._begin_to_write(session)
        while self._writing:
            done, _ = await asyncio.wait(self._writing.values())
            for task in done:
                task.result()
            await asyncio.sleep(0)  # for `_written`, which may begin again

    def _begin_to_write(self, session: Session) -> None:
        self._writing[session] = task = asyncio.create_task(self._write(session))
        task.add_done_callback(partial(self._written, session))

    async def _write(self, session: Session) -> None:
        """Append what one session has logged until nothing is left."""
        while session in self._unwritten:
            async with self._appends[self.bus.partition(session.session_id)]:
                entries, next_seq = self._unwritten.pop(session)
                # A session that was lost and taken over again, by this replica, begins where the log ends: what its
                # predecessor has not written by then was never said.
                held = self.held.get(session.session_id)
                if held is not None and held.session is session:
                    await self._append(held, entries, next_seq)

    def _written(self, session: Session, task: asyncio.Task[None]) -> None:
        del self._writing[session]
        if task.cancelled():
            return
        if isinstance(error := task.exception(), Exception):
            self._outbox.put_nowait(error)
        elif session in self._unwritten:  # logged between the task's last look and this
            self._begin_to_write(session)

    async def _append(self, held: Held, entries: list[LogEntry], next_seq: int) -> None:
        if await self._append_until_answered(held, entries, next_seq) == "stale":
            logger.warning("session=%s epoch=%d has another owner now", held.lease.session_id, held.lease.epoch)
            await self._drop(held)
            return
        queries = {query.query_id: at for at, query in held.commands.items() if isinstance(query, Query)}
        self.meters.appended(held.lease.session_id, entries, held.frame_ids, queries)
        first = held.position
        held.position += len(entries)
        for position, entry in enumerate(entries, first):
            held.note_entry(position, entry)
            if isinstance(entry, Evicted):
                window = held.window(entry, position)
                await self._guarded(self.bus.trim(held.lease, encode(window), window.in_id, window.out_position))
        if isinstance(entries[-1], SessionEnded):
            await self._guarded(self.bus.end_session(held.lease))
            await self._drop(held)

    async def _append_until_answered(
        self, held: Held, entries: list[LogEntry], next_seq: int
    ) -> Literal["ok", "duplicate", "stale"]:
        """Append, again and again while Redis is away: the position makes a repeat harmless."""
        for delay_s in _pauses():
            try:
                return await self.bus.append(held.lease, held.position, entries, next_seq)
            except BusError as error:
                logger.warning("session=%s append waits: %s", held.lease.session_id, error)
                if self._stopping.is_set():
                    return "stale"
                await asyncio.sleep(delay_s)
        raise AssertionError("pauses never end")

    # -- plumbing -------------------------------------------------------------------------------

    async def _until_stopped(self) -> None:
        await self._stopping.wait()

    async def _guarded(self, work: Awaitable[object]) -> None:
        """Await bus work; when Redis is away, say so and wait a moment instead of dying."""
        try:
            await work
        except BusError as error:
            logger.warning("replica=%s bus: %s", self.name, error)
            await asyncio.sleep(random.uniform(*RETRY_S))


def build_llm_worker(config: Config, bus: Bus, name: str) -> LLMWorker:
    """The worker that a settings file describes; loads the checkpoint, which takes a while."""
    settings = config.section("engine", EngineConfig)
    loaded = load_model(config)
    engine = build_engine(loaded.model, loaded.template, settings)
    return LLMWorker(
        bus,
        engine,
        name=name,
        tokens_shape=loaded.model.frame_shape,
        fingerprint=loaded.fingerprint,
        features=loaded.features,
        threshold=loaded.threshold,
    )


def _pauses() -> Iterator[float]:
    """Growing pauses with jitter, without end."""
    pause_s = RETRY_S[0]
    while True:
        yield pause_s * random.uniform(0.5, 1.5)
        pause_s = min(2 * pause_s, RETRY_S[1])


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    # Not wait_for: in Python 3.11 it may swallow a cancellation that comes with the event.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()

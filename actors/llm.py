"""LLM actor: holds the leases of its sessions, feeds their input to the engine, writes their logs.

Two threads. The event loop does all that touches Redis: claiming and renewing leases, reading
input, appending log entries, trimming. The step thread owns the engine and never waits for
Redis: it takes messages from an inbox, steps, and hands entries to the loop. A KV cache is only
a view of the log, so a session that is taken over is rebuilt by folding its log, and a replica
whose append is refused as stale drops the session without a word.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from actors.backends import build_engine
from actors.bus import Bus, BusError, Lease, SessionMeta
from actors.checkpoint import load_or_untrained
from actors.config import Config
from actors.engine import Engine, EngineConfig, NoCapacity
from actors.messages import (
    Evicted,
    FramesDecided,
    FrameSkipped,
    FrameTokens,
    InputRefused,
    LogEntry,
    MessageError,
    Query,
    QueryConsumed,
    SessionEnded,
    SessionInput,
    SettingsApplied,
    SettingsChange,
    Window,
    decode,
    encode,
)
from actors.session import Session, SessionError

logger = logging.getLogger(__name__)

TIMELINE = 4096
RETRY_S = (0.05, 2.0)
BLOCK_MS = 1000


@dataclass
class Held:
    """A session this replica owns: lease, log position, and which input its window still needs."""

    lease: Lease
    session: Session
    position: int
    cursor: str
    frame_ids: dict[int, str] = field(default_factory=dict)
    commands: dict[str, Query | SettingsChange] = field(default_factory=dict)
    consumed: list[str] = field(default_factory=list)
    decided_at: deque[tuple[int, int]] = field(default_factory=deque)
    lost: bool = False

    def note_input(self, entry_id: str, message: SessionInput) -> None:
        """Remember where a body lies, for trimming."""
        if isinstance(message, FrameTokens | FrameSkipped):
            self.frame_ids.setdefault(message.seq, entry_id)
        elif isinstance(message, Query | SettingsChange):
            self.commands[entry_id] = message

    def note_entry(self, position: int, entry: LogEntry) -> None:
        """Remember what a log entry settled."""
        if isinstance(entry, FramesDecided):
            self.decided_at.append((entry.last_seq, position))
        elif isinstance(entry, QueryConsumed | InputRefused | SettingsApplied):
            query_id = None if isinstance(entry, SettingsApplied) else entry.query_id
            for entry_id, command in self.commands.items():
                if (command.query_id if isinstance(command, Query) else None) == query_id:
                    self.consumed.append(entry_id)
                    del self.commands[entry_id]
                    break

    def window(self, entry: Evicted, position: int) -> Window:
        """What a takeover needs after this eviction; forgets what lies before it."""
        while self.decided_at and self.decided_at[0][0] < entry.first_seq:
            self.decided_at.popleft()
        self.frame_ids = {seq: at for seq, at in self.frame_ids.items() if seq >= entry.first_seq}
        needed = [*self.frame_ids.values(), *self.commands]
        in_id = min(needed, key=stream_order) if needed else self.cursor
        self.consumed = [at for at in self.consumed if stream_order(at) >= stream_order(in_id)]
        return Window(
            first_seq=entry.first_seq,
            out_position=min(self.decided_at[0][1] if self.decided_at else position, position),
            in_id=in_id,
            consumed=self.consumed,
            recent=self.session.recent,
            settings=self.session.settings,
        )


class LLMWorker:
    """One replica's LLM side, hosted by Serve or a test: `run` until `stop`, `stats` at any time.

    `tokens_shape` is (N, D), what a frame's tokens must look like; `fingerprint` says which
    sessions this replica may claim.
    """

    def __init__(
        self, bus: Bus, engine: Engine, *, name: str, tokens_shape: tuple[int, int], fingerprint: str, max_sessions: int
    ) -> None:
        self.bus = bus
        self.engine = engine
        self.name = name
        self.tokens_shape = tokens_shape
        self.fingerprint = fingerprint
        self.max_sessions = max_sessions
        self.held: dict[str, Held] = {}
        self.counters = dict.fromkeys(
            ("frames_decided", "frames_skipped", "responses", "tokens", "evictions", "steps", "claims", "lost_leases"),
            0,
        )
        self.step_s = 0.0
        self.timeline: deque[tuple[str, str, int, int, float, float]] = deque(maxlen=TIMELINE)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outbox: asyncio.Queue[tuple[str, list[LogEntry], int] | None] = asyncio.Queue()
        self._stopping = asyncio.Event()
        self._claim_now = asyncio.Event()
        self._step_stop = threading.Event()
        self._step_ended = False

    async def run(self) -> None:
        """Serve sessions until `stop`; then finish the step, write the log and release the leases.

        Raises what broke the step thread or a loop, after releasing the leases.
        """
        self._loop = asyncio.get_running_loop()
        stepper = self._loop.run_in_executor(None, self._step_forever)
        appending = asyncio.create_task(self._append_forever())
        tasks = [asyncio.create_task(self._claim_forever()), asyncio.create_task(self._renew_forever())]
        tasks += [asyncio.create_task(self._read_forever(p)) for p in range(self.bus.config.partitions)]
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            done, _ = await asyncio.wait([stepper, stopping, appending, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for finished in done - {stopping}:
                finished.result()
        finally:
            self._step_stop.set()
            self._inbox.put(lambda: None)
            await asyncio.wait([stepper])
            self._step_ended = True
            self._take_inbox(wait=False)
            self._outbox.put_nowait(None)
            await asyncio.wait([appending])
            await _cancel([stopping, *tasks])
            for held in self.held.values():
                await self._quietly(self.bus.release(held.lease))

    def stop(self) -> None:
        """Ask `run` to end; may be called from any thread once it runs."""
        self._loop.call_soon_threadsafe(self._stopping.set)

    def stats(self) -> dict[str, object]:
        """Counters since the start, and the newest steps as (kind, session, first seq, last seq, start, end)."""
        return {
            **self.counters,
            "sessions": len(self.held),
            "step_s": self.step_s,
            "waiting_frames": sum(held.session.waiting_frames for held in list(self.held.values())),
            "timeline": list(self.timeline),
        }

    # -- leases ---------------------------------------------------------------------------------

    async def _claim_forever(self) -> None:
        """Take over sessions nobody owns, as many as there is room for."""
        interval_s = self.bus.config.lease_ms / 2000
        partitions = list(range(self.bus.config.partitions))
        while True:
            random.shuffle(partitions)
            for partition in partitions:
                free = self.max_sessions - len(self.held)
                if free <= 0:
                    break
                await self._guarded(self._claim(partition, free))
            self._claim_now.clear()
            await _wait(self._claim_now, interval_s)

    async def _claim(self, partition: int, limit: int) -> None:
        for lease in await self.bus.claim(self.name, self.fingerprint, partition, limit):
            try:
                await self._take_over(lease)
            except (NoCapacity, BusError) as error:
                logger.warning("session=%s not taken over: %s", lease.session_id, error)
                await self._quietly(self.bus.release(lease))
            except (SessionError, LostFrames) as error:
                await self._refuse(lease, str(error))

    async def _take_over(self, lease: Lease) -> None:
        """Fold the session's log and input into a session of this engine."""
        meta = await self.bus.session_meta(lease.session_id)
        if meta is None:
            return
        window = read_window(meta)
        settings = window.settings if window else meta.settings
        first = window.out_position if window else 0
        log = [(position, entry) for position, entry in await self.bus.read_log(lease.session_id) if position >= first]
        inputs = await self.bus.read_all_inputs(lease.session_id, window.in_id if window else "0-0")
        held = await self._on_step_thread(lambda: self._rebuild(lease, settings, window, log, inputs))
        held.position = meta.position
        self.held[lease.session_id] = held
        self.counters["claims"] += 1
        logger.info("session=%s epoch=%d entries=%d taken over", lease.session_id, lease.epoch, len(log))

    def _rebuild(self, lease, settings, window, log, inputs) -> Held:
        session = self.engine.open(lease.session_id, settings)
        held = Held(lease, session, 0, window.in_id if window else "0-0")
        try:
            if window:
                session.recent = list(window.recent)
                held.consumed = list(window.consumed)
            for entry_id, message in inputs:
                held.cursor = entry_id
                if entry_id not in held.consumed:
                    if not isinstance(message, MessageError):
                        held.note_input(entry_id, message)
                    self._deliver(held, entry_id, message)
            known = set(held.frame_ids)
            session.restore(entry for _, entry in log)
            for position, entry in log:
                held.note_entry(position, entry)
                if isinstance(entry, FramesDecided):
                    first = max(entry.first_seq, window.first_seq if window else 0)
                    missing = set(range(first, entry.last_seq + 1)) - known
                    if missing:
                        raise LostFrames(
                            f"session_expired: frames {sorted(missing)[:5]} of the window are gone from Redis"
                        )
        except Exception:
            self.engine.close(lease.session_id)
            raise
        return held

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(self.bus.config.renew_ms / 1000)
            if self.held:
                await self._guarded(self._renew())

    async def _renew(self) -> None:
        for lease in await self.bus.renew([held.lease for held in self.held.values()]):
            await self._drop(lease.session_id)

    async def _drop(self, session_id: str) -> None:
        """Forget a session that another replica owns now, or that ended."""
        held = self.held.pop(session_id, None)
        if held is not None:
            held.lost = True
            self.counters["lost_leases"] += not held.session.ended
            await self._on_step_thread(lambda: self.engine.close(session_id))
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
        cursors = {
            session_id: held.cursor
            for session_id, held in self.held.items()
            if self.bus.partition(session_id) == partition
        }
        start = time.monotonic()
        items = await self.bus.read_inputs(cursors, BLOCK_MS, partition)
        for session_id, entry_id, message in items:
            held = self.held.get(session_id)
            if held is None or not (stream_order(held.cursor) < stream_order(entry_id)):
                continue
            held.cursor = entry_id
            if not isinstance(message, MessageError):
                held.note_input(entry_id, message)
            self._inbox.put(lambda held=held, at=entry_id, message=message: self._deliver(held, at, message))
        if not items and time.monotonic() - start < BLOCK_MS / 2000:
            self._claim_now.set()

    def _deliver(self, held: Held, entry_id: str, message: SessionInput | MessageError) -> None:
        """On the step thread: one input into its session."""
        session_id = held.lease.session_id
        if isinstance(message, MessageError):
            logger.error("session=%s input=%s ignored: %s", session_id, entry_id, message)
            return
        if isinstance(message, FrameTokens):
            try:
                held.session.add_frame(message.seq, message.time, message.tensor(self.tokens_shape))
            except MessageError as error:
                logger.error("session=%s frame=%d skipped: %s", session_id, message.seq, error)
                held.session.skip_frame(message.seq, message.time, str(error))
        elif isinstance(message, FrameSkipped):
            held.session.skip_frame(message.seq, message.time, message.reason)
        else:
            held.session.add(message)

    # -- steps ----------------------------------------------------------------------------------

    def _step_forever(self) -> None:
        """The step thread: inbox, one step, entries to the loop; sleeps only when there is nothing to do."""
        idle = False
        while not self._step_stop.is_set():
            self._take_inbox(wait=idle)
            start = time.time()
            results = self.engine.step()
            idle = self.engine.idle
            if not idle:
                self._account(results, start)
            for session_id, entries in results:
                held_session = self.engine.sessions[session_id]
                item = (session_id, entries, held_session.next_seq)
                self._loop.call_soon_threadsafe(self._outbox.put_nowait, item)

    def _take_inbox(self, wait: bool) -> None:
        if wait:
            self._inbox.get()()
        for _ in itertools.repeat(None):
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                return

    def _account(self, results: list[tuple[str, list[LogEntry]]], start: float) -> None:
        end = time.time()
        self.counters["steps"] += 1
        self.step_s += end - start
        for session_id, entries in results:
            for entry in entries:
                if isinstance(entry, FramesDecided):
                    self.counters["frames_decided"] += len(entry.times)
                    self.timeline.append(("decide", session_id, entry.first_seq, entry.last_seq, start, end))
                elif entry.kind == "response_tokens":
                    self.counters["tokens"] += 1
                    seq = self.engine.sessions[session_id].next_seq - 1
                    self.timeline.append(("speak", session_id, seq, seq, start, end))
                elif entry.kind == "response_started":
                    self.counters["responses"] += 1
                elif isinstance(entry, FrameSkipped):
                    self.counters["frames_skipped"] += 1
                elif isinstance(entry, Evicted):
                    self.counters["evictions"] += 1

    # -- the log --------------------------------------------------------------------------------

    async def _append_forever(self) -> None:
        while (item := await self._outbox.get()) is not None:
            session_id, entries, decided = item
            await self._append_until_answered(session_id, entries, decided)

    async def _append_until_answered(self, session_id: str, entries: list[LogEntry], decided: int) -> None:
        """Append, again and again while Redis is away: the position makes a repeat harmless."""
        for delay_s in _backoff():
            held = self.held.get(session_id)
            if held is None:
                return
            try:
                answer = await self.bus.append(held.lease, held.position, entries, decided)
                break
            except BusError as error:
                logger.warning("session=%s append waits: %s", session_id, error)
                await asyncio.sleep(delay_s)
        if answer == "stale":
            logger.warning("session=%s epoch=%d is owned by another replica now", session_id, held.lease.epoch)
            await self._drop(session_id)
            return
        first = held.position
        held.position += len(entries)
        for position, entry in enumerate(entries, first):
            held.note_entry(position, entry)
            if isinstance(entry, Evicted):
                await self._guarded(self._trim(held, entry, position))
        if isinstance(entries[-1], SessionEnded):
            await self._guarded(self.bus.end_session(held.lease))
            await self._drop(session_id)

    async def _trim(self, held: Held, entry: Evicted, position: int) -> None:
        """Keep in Redis what the window and clients that resume still need."""
        window = held.window(entry, position)
        await self.bus.trim(held.lease, encode(window), window.in_id, window.out_position)

    # -- plumbing -------------------------------------------------------------------------------

    async def _on_step_thread(self, action: Callable[[], object]):
        """Run `action` between two steps and await its result; here and now once the thread has ended."""
        if self._step_ended:
            return action()
        future: Future = Future()

        def run() -> None:
            try:
                future.set_result(action())
            except BaseException as error:
                future.set_exception(error)

        self._inbox.put(run)
        return await asyncio.wrap_future(future)

    async def _guarded(self, work) -> None:
        """Await bus work; when Redis is away, say so and wait a moment instead of dying."""
        try:
            await work
        except BusError as error:
            logger.warning("replica=%s bus: %s", self.name, error)
            await asyncio.sleep(random.uniform(*RETRY_S))

    async def _quietly(self, work) -> None:
        try:
            await work
        except BusError as error:
            logger.warning("replica=%s bus: %s", self.name, error)


class LostFrames(RuntimeError):
    """Frames that the session's window needs are no longer in Redis."""


def read_window(meta: SessionMeta) -> Window | None:
    """Where a takeover starts; None when nothing was trimmed yet."""
    if not meta.window:
        return None
    window = decode(meta.window)
    if not isinstance(window, Window):
        raise MessageError(f"the window in a session's meta is a {window.kind} message")
    return window


def build_llm_worker(config: Config, bus: Bus, name: str) -> LLMWorker:
    """The worker that a settings file describes; loads the checkpoint, which takes a while."""
    settings = config.section("engine", EngineConfig)
    loaded = load_or_untrained(config.model, settings.device)
    engine = build_engine(loaded.model, loaded.template, settings)
    return LLMWorker(
        bus,
        engine,
        name=name,
        tokens_shape=loaded.model.frame_shape,
        fingerprint=loaded.fingerprint,
        max_sessions=settings.max_sessions,
    )


def stream_order(entry_id: str) -> tuple[int, int]:
    """The order of Redis stream ids."""
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)


def _backoff():
    delay_s = RETRY_S[0]
    while True:
        yield delay_s * random.uniform(0.5, 1.5)
        delay_s = min(2 * delay_s, RETRY_S[1])


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    """End tasks, asking again: a connection that is being read may swallow a cancellation."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=1)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    # Not wait_for: in Python 3.11 it may swallow a cancellation that comes with the event.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()

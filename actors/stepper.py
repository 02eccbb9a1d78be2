"""The step thread: it alone touches the engine, and it never waits for anything but work.

The event loop posts actions (input, opening, closing) that run between two steps, and gets what each
step logged through a callback. Counters and a short timeline tell what the thread did.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from actors.engine import Engine
from actors.messages import (
    Evicted,
    FramesDecided,
    FrameSkipped,
    LogEntry,
    ResponseEnded,
    ResponseStarted,
    ResponseTokens,
)

TIMELINE = 4096

ResultT = TypeVar("ResultT")
Logged = Callable[[str, list[LogEntry], int], None]
Stepped = Callable[[int, float], None]


class Stepper:
    """Steps `engine` in a thread of its own; `logged` gets (session, entries, next undecided seq) there.

    `stepped` gets the number of sessions that a step served, and its seconds.
    """

    def __init__(self, engine: Engine, logged: Logged, stepped: Stepped = lambda sessions, seconds: None) -> None:
        self.engine = engine
        self.counters = dict.fromkeys(
            ("frames_decided", "frames_skipped", "responses", "duplicates", "tokens", "evictions", "steps"), 0
        )
        self.step_s = 0.0
        self.timeline: deque[tuple[str, str, int, int, float, float]] = deque(maxlen=TIMELINE)
        self._logged = logged
        self._stepped = stepped
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._ended = False

    async def run(self) -> None:
        """Step until `stop`; what is posted afterwards runs at once. Raises what the engine raised."""
        ended: Future[None] = Future()
        ended.set_running_or_notify_cancel()
        # A daemon: a replica whose Ray node has died exits, and must not wait for a thread that waits for work.
        threading.Thread(target=self._step, args=(ended,), name="steps", daemon=True).start()
        try:
            await asyncio.wrap_future(ended)
        finally:
            self._ended = True
            self._take(wait=False)

    def stop(self) -> None:
        """Let `run` return after the step in progress."""
        self._stopping.set()
        self._inbox.put(lambda: None)

    def decision_rate(self) -> float | None:
        """Frames per second of the newest steps that decided frames; None when there was none."""
        steps = [step for step in list(self.timeline) if step[0] == "decide"]
        busy_s = sum(end - start for *_, start, end in steps)
        return sum(last - first + 1 for _, _, first, last, _, _ in steps) / busy_s if busy_s else None

    def post(self, action: Callable[[], None]) -> None:
        """Run `action` between two steps."""
        self._inbox.put(action)

    async def call(self, action: Callable[[], ResultT]) -> ResultT:
        """Run `action` between two steps and give its result."""
        if self._ended:
            return action()
        future: Future[ResultT] = Future()

        def run() -> None:
            try:
                future.set_result(action())
            except BaseException as error:
                future.set_exception(error)

        self._inbox.put(run)
        return await asyncio.wrap_future(future)

    def _step(self, ended: Future[None]) -> None:
        try:
            self._step_until_stopped()
        except BaseException as error:
            ended.set_exception(error)
        else:
            ended.set_result(None)

    def _step_until_stopped(self) -> None:
        idle = False
        while not self._stopping.is_set():
            self._take(wait=idle)
            start = time.time()
            results = self.engine.step()
            idle = self.engine.idle
            if not idle:
                self.counters["steps"] += 1
                self.step_s += time.time() - start
                self._stepped(len(results), time.time() - start)
            for session_id, entries in results:
                next_seq = self.engine.sessions[session_id].next_seq
                self._count(session_id, entries, next_seq - 1, start)
                self._logged(session_id, entries, next_seq)

    def _take(self, wait: bool) -> None:
        """Run what is in the inbox; with `wait`, wait for something."""
        if wait:
            self._inbox.get()()
        for _ in itertools.repeat(None):
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                return

    def _count(self, session_id: str, entries: list[LogEntry], last_seq: int, start: float) -> None:
        end = time.time()
        for entry in entries:
            match entry:
                case FramesDecided():
                    self.counters["frames_decided"] += len(entry.times)
                    self.timeline.append(("decide", session_id, entry.first_seq, entry.last_seq, start, end))
                case ResponseTokens():
                    self.counters["tokens"] += len(entry.ids)
                    self.timeline.append(("speak", session_id, last_seq, last_seq, start, end))
                case ResponseStarted():
                    self.counters["responses"] += 1
                case ResponseEnded():
                    self.counters["duplicates"] += entry.reason == "duplicate"
                case FrameSkipped():
                    self.counters["frames_skipped"] += 1
                case Evicted():
                    self.counters["evictions"] += 1

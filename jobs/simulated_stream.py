"""Live sessions on a clock that only measured steps advance: the lag of a stream without waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from actors.engine import StepResult
from actors.messages import FramesDecided, LogEntry, ResponseEnded
from jobs.scripted import FPS, SETTINGS, PlacedEngine, count, place


class SimulatedStream:
    """`sessions` streams of `frames` frames at FPS on one engine; all times in ms.

    A frame's lag is the time from its arrival to its decision. `behind` holds the lags of frames that came
    while their own session was speaking, or while frames before them waited for that; `others` the rest.
    `lived` is, for every session, the log of what it has behind it; without, sessions are new.
    """

    def __init__(
        self,
        engine: PlacedEngine,
        sessions: int,
        frames: int,
        frame: torch.Tensor,
        lived: Sequence[Sequence[LogEntry]] = (),
    ) -> None:
        self.engine, self.frame = engine, frame
        self.now = 0.0
        self.steps: list[float] = []
        self.behind: list[float] = []
        self.others: list[float] = []
        self.log: list[LogEntry] = []
        self._spoke_until = dict.fromkeys((f"s{i}" for i in range(sessions)), -1.0)
        between = 1000 / FPS
        next_seq = [count(log)[0] for log in lived] or [0] * sessions
        self._arrivals = sorted(
            (between * (number + index / sessions), f"s{index}", next_seq[index] + number)
            for index in range(sessions)
            for number in range(frames)
        )
        self._arrived = {(session_id, seq): at for at, session_id, seq in self._arrivals}
        for index, session_id in enumerate(self._spoke_until):
            if lived:
                place(engine, session_id, lived[index], frame)
            else:
                engine.open(session_id, SETTINGS)

    def run(self, timed_step: Callable[[PlacedEngine], tuple[float, StepResult]]) -> None:
        """Until everything is decided; `timed_step` steps the engine and says how many ms it took."""
        while True:
            while self._arrivals and self._arrivals[0][0] <= self.now:
                _, session_id, seq = self._arrivals.pop(0)
                self.engine.sessions[session_id].add_frame(seq, seq / FPS, self.frame)
            spent, result = timed_step(self.engine)
            if self.engine.idle:
                if not self._arrivals:
                    return
                self.now = self._arrivals[0][0]
                continue
            self.now += spent
            self.steps.append(spent)
            for session_id, entries in result:
                self._note(session_id, entries)

    def _note(self, session_id: str, entries: list[LogEntry]) -> None:
        self.log += entries
        for entry in entries:
            if isinstance(entry, ResponseEnded):
                self._spoke_until[session_id] = self.now
            elif isinstance(entry, FramesDecided):
                for seq in range(entry.first_seq, entry.last_seq + 1):
                    arrived = self._arrived[session_id, seq]
                    waited = arrived <= self._spoke_until[session_id]
                    (self.behind if waited else self.others).append(self.now - arrived)

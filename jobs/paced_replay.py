"""Recorded frames at their own pace: the stream goes on while the model computes.

A frame comes at its time of the video, on a clock that only measured steps advance, so that nobody waits
for the video. What the model says at a frame is heard when its first words are there, and not at the
frame's time; frames that come meanwhile wait. As at the gateway, at most so many wait undecided, and of
those that come then only the newest is kept. Encoding, which other processes do beside it, is not counted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from actors.engine import Engine
from actors.messages import End, FramesDecided, LogEntry, ResponseEnded, ResponseTokens
from actors.session import Session
from jobs.replay import Recording, Transcript, Utterance


@dataclass
class Paced:
    """What was heard at the stream's pace: `said` has the times at which the first words were there.

    `lags_s` is how long after a frame its decision came, of every decided one; `dropped` are the times of
    frames that found no room. The `transcript` has everything at the times of its frames.
    """

    transcript: Transcript
    said: list[Utterance] = field(default_factory=list)
    lags_s: list[float] = field(default_factory=list)
    dropped: list[float] = field(default_factory=list)


def replay_paced(
    engine: Engine, recording: Recording, credits: int, clock: Callable[[], float] = time.perf_counter
) -> Paced:
    """Play one recording alone on the engine; `credits` frames may wait undecided, `clock` (s) times the steps."""
    player = _Player(engine.open(recording.name, recording.settings), recording, credits)
    try:
        while not player.paced.transcript.ended:
            player.feed()
            began = clock()
            result = engine.step()
            if not engine.idle:
                player.now += clock() - began
            for _, entries in result:
                player.note(entries)
            if engine.idle:
                player.wait()
    finally:
        engine.close(recording.name)
    return player.paced


class _Player:
    """One open session, the frames that have not come yet, and the time it is in the stream."""

    def __init__(self, session: Session, recording: Recording, credits: int) -> None:
        self.session = session
        self.credits = credits
        self.coming: deque[tuple[float, torch.Tensor]] = deque(
            pair for chunk in recording.chunks for pair in zip(chunk.times, chunk.tokens, strict=True)
        )
        self.held: tuple[float, torch.Tensor] | None = None
        self.pushed = 0
        self.now = 0.0
        self.paced = Paced(Transcript(recording.name))
        self._ending = False
        self._heard_at: float | None = None
        for number, question in enumerate(recording.questions):
            session.add(question.query(number))

    def feed(self) -> None:
        """Admit what has come by now, as far as there are credits, and the end after the last frame."""
        if self.held is not None and self._admits(self.held):
            self.held = None
        while self.coming and self.coming[0][0] <= self.now:
            frame = self.coming.popleft()
            if self.held is None and self._admits(frame):
                continue
            if self.held is not None:
                self.paced.dropped.append(self.held[0])
            self.held = frame
        if not self.coming and self.held is None and not self._ending:
            self.session.add(End(after_seq=self.pushed - 1))
            self._ending = True

    def wait(self) -> None:
        """Until the next frame comes: there is nothing else to do."""
        if self.coming:
            self.now = max(self.now, self.coming[0][0])

    def note(self, entries: list[LogEntry]) -> None:
        """What a step has logged, which is there now."""
        transcript = self.paced.transcript
        for entry in entries:
            if isinstance(entry, FramesDecided):
                self.paced.lags_s += [self.now - at for at in entry.times]
            elif isinstance(entry, ResponseTokens) and entry.text and self._heard_at is None:
                self._heard_at = self.now
            turns = len(transcript.turns)
            transcript.note([entry])
            for turn in transcript.turns[turns:]:
                if isinstance(turn, Utterance):
                    heard_at = self.now if self._heard_at is None else self._heard_at
                    self.paced.said.append(replace(turn, time=heard_at))
            if isinstance(entry, ResponseEnded):
                self._heard_at = None

    def _admits(self, frame: tuple[float, torch.Tensor]) -> bool:
        """Whether there is a credit for a frame, which then is the session's."""
        if self.session.waiting_frames >= self.credits:
            return False
        self.session.add_frame(self.pushed, *frame)
        self.pushed += 1
        return True

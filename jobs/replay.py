"""Recorded frames through the session and the engine that serve, to their end.

What narration and evaluation share. Frames go into a `Session` as fast as they come, so the engine
appends many at once as if silent; what is decided and said is the same as live, only sooner. The
answers of the model stay in its context. The session log that a live client would be sent becomes a
`Transcript`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from actors.engine import Engine
from actors.messages import (
    End,
    Evicted,
    FramesDecided,
    InputRefused,
    LogEntry,
    Query,
    QueryConsumed,
    ResponseEnded,
    ResponseStarted,
    SessionEnded,
    SessionSettings,
)
from actors.session import Session

WAITING_FRAMES = 32  # kept ready for a session, so that the engine can append many at once


@dataclass(frozen=True)
class FrameChunk:
    """Consecutive frames: video time in seconds of each, and their tokens (F, N, D)."""

    times: Sequence[float]
    tokens: torch.Tensor


@dataclass(frozen=True)
class Question:
    """What the user says at `time` seconds of the video: at the first frame at or after it.

    An `opening` is said before the first frame, where training has an instruction.
    """

    text: str
    time: float = 0.0
    opening: bool = False

    def query(self, number: int) -> Query:
        """As a session takes it."""
        time = None if self.opening else self.time
        return Query(query_id=f"question-{number}", text=self.text, after_seq=-1, time=time)


@dataclass(frozen=True)
class Recording:
    """One stream to replay. Chunks are taken one after another, when the engine needs frames."""

    name: str
    chunks: Iterable[FrameChunk]
    questions: Sequence[Question] = ()
    settings: SessionSettings = field(default_factory=SessionSettings)


@dataclass(frozen=True)
class Utterance:
    """Something the assistant said after the frame at `time`; of its own accord when `question` is None.

    `complete` is false where the length limit cut it.
    """

    time: float
    text: str
    question: str | None = None
    complete: bool = True


@dataclass
class Transcript:
    """What happened in one stream: time and P(silent) of every frame, and the turns in context order.

    `suppressed` counts responses that said nothing or the same as before, where the settings drop those;
    `refused` says why a question was not put to the model. `spoke` are the frames at which the model spoke
    of its own accord, `asked` those at which the user spoke, so that it had no choice (-1: before the first).
    """

    name: str
    times: list[float] = field(default_factory=list)
    p_silent: list[float] = field(default_factory=list)
    turns: list[Question | Utterance] = field(default_factory=list)
    suppressed: int = 0
    evictions: int = 0
    refused: list[str] = field(default_factory=list)
    spoke: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    ended: bool = False
    _started: ResponseStarted | None = field(default=None, repr=False)

    @property
    def questions(self) -> list[Question]:
        return [turn for turn in self.turns if isinstance(turn, Question)]

    @property
    def utterances(self) -> list[Utterance]:
        return [turn for turn in self.turns if isinstance(turn, Utterance)]

    def note(self, entries: Iterable[LogEntry]) -> None:
        """Fold log entries, in their order."""
        for entry in entries:
            match entry:
                case FramesDecided():
                    self.times += entry.times
                    self.p_silent += entry.p_silent
                case QueryConsumed():
                    self.turns.append(Question(entry.text, entry.time, opening=entry.seq < 0))
                    self.asked.append(entry.seq)
                case ResponseStarted():
                    self._started = entry
                    if entry.query_id is None:
                        self.spoke.append(entry.seq)
                case ResponseEnded() if self._started is not None:
                    self._note_response(self._started, entry)
                case InputRefused():
                    self.refused.append(entry.reason)
                case Evicted():
                    self.evictions += 1
                case SessionEnded():
                    self.ended = True

    def _note_response(self, started: ResponseStarted, response: ResponseEnded) -> None:
        text = response.text.strip()
        if not text or response.reason == "duplicate":
            self.suppressed += 1
            return
        question = self.questions[-1].text if started.query_id is not None else None
        self.turns.append(Utterance(started.time, text, question, response.reason != "length"))


Decided = Callable[[Transcript], None]


def replay(
    engine: Engine, recordings: Iterable[Recording], at_once: int = 1, decided: Decided | None = None
) -> Generator[Transcript, None, None]:
    """Transcripts of all recordings as they end, `at_once` of them sharing the engine's steps.

    `decided` is called after every step with each transcript that grew. What a recording's chunks raise
    is raised here; all sessions are closed then, and at the end.
    """
    waiting = iter(recordings)
    playing: dict[str, _Player] = {}
    try:
        while True:
            while len(playing) < at_once and (recording := next(waiting, None)) is not None:
                playing[recording.name] = _Player(engine.open(recording.name, recording.settings), recording)
            if not playing:
                return
            for player in playing.values():
                player.feed()
            for name, entries in engine.step():
                transcript = playing[name].transcript
                transcript.note(entries)
                if decided is not None:
                    decided(transcript)
                if transcript.ended:
                    engine.close(name)
                    del playing[name]
                    yield transcript
    finally:
        for name in playing:
            engine.close(name)


class _Player:
    """One open session and where its frames come from."""

    def __init__(self, session: Session, recording: Recording) -> None:
        self.session = session
        self.chunks = iter(recording.chunks)
        self.transcript = Transcript(recording.name)
        self.pushed = 0
        self.complete = False
        for number, question in enumerate(recording.questions):
            session.add(question.query(number))

    def feed(self) -> None:
        """Keep frames waiting while there are any; nothing more is needed while the session speaks."""
        while not self.complete and self.session.response is None and self.session.waiting_frames < WAITING_FRAMES:
            chunk = next(self.chunks, None)
            if chunk is None:
                self.session.add(End(after_seq=self.pushed - 1))
                self.complete = True
                return
            for time, tokens in zip(chunk.times, chunk.tokens, strict=True):
                self.session.add_frame(self.pushed, time, tokens)
                self.pushed += 1

"""One session that a replica owns: how it is rebuilt from Redis, and what of Redis it still needs.

A takeover folds the log and the input that trimming left into a session of the engine. After an
eviction the owner says in a `Window` where the next takeover would start, and trims what lies before.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from actors.bus import Lease, SessionMeta
from actors.engine import Engine
from actors.messages import (
    End,
    Evicted,
    FramesDecided,
    FrameSkipped,
    FrameTokens,
    InputRefused,
    Interrupt,
    LogEntry,
    MessageError,
    Query,
    QueryConsumed,
    ResponseEnded,
    ResponseStarted,
    ResponseTokens,
    SessionInput,
    SettingsApplied,
    SettingsChange,
    Window,
    decode,
)
from actors.session import REMEMBERED_RESPONSES, Session

logger = logging.getLogger(__name__)

AHEAD_CHARACTERS = 16_384  # of questions about later that a window carries; others keep their place in the input

StoredInput = tuple[str, SessionInput | MessageError]
StoredEntry = tuple[int, LogEntry]


class LostFrames(RuntimeError):
    """Frames that the session's window needs are no longer in Redis."""


@dataclass(frozen=True)
class Told:
    """What a log says up to some entry that a context does not.

    How many responses there were, their tokens, the latest spontaneous ones; the frame that comes next, and the video
    time of the last that was decided.
    """

    next_seq: int = 0
    clock: float = 0.0
    responses: int = 0
    spoken: int = 0
    recent: tuple[str, ...] = ()
    settled: int = 0  # changes of settings that were applied or refused
    asked: bool = False  # the open one, or the last

    def after(self, entry: LogEntry) -> Told:
        """With one entry more, as `Session.apply` counts."""
        match entry:
            case FramesDecided():
                return replace(self, next_seq=entry.last_seq + 1, clock=entry.times[-1])
            case FrameSkipped():
                return replace(self, next_seq=entry.seq + 1)
            case ResponseStarted():
                number = int(entry.response_id.rpartition("-")[2])
                return replace(self, responses=number + 1, asked=entry.query_id is not None)
            case ResponseTokens():
                return replace(self, spoken=self.spoken + len(entry.ids))
            case SettingsApplied() | InputRefused(query_id=None):
                return replace(self, settled=self.settled + 1)
            case ResponseEnded() if not self.asked:
                return replace(self, recent=(*self.recent, entry.text)[-REMEMBERED_RESPONSES:])
        return self


@dataclass
class Held:
    """Lease, session and log position; `cursor` is the last input entry read.

    `frame_ids` tells in which input entry a frame's body lies, `commands` which queries and settings
    have not been acted on (the end of input is one of them), `consumed` which have although trimming left them,
    `decided_at` the last frame and position of every log entry that decided frames of the window, with what had been
    told before, and `told` what has been told by now. `missed`: the last look for its client found that nothing was
    heard of it for too long.
    """

    lease: Lease
    session: Session
    position: int
    cursor: str
    frame_ids: dict[int, str] = field(default_factory=dict)
    commands: dict[str, Query | SettingsChange | End] = field(default_factory=dict)
    consumed: list[str] = field(default_factory=list)
    decided_at: deque[tuple[int, int, Told]] = field(default_factory=deque)
    told: Told = Told()
    missed: bool = False

    def note_input(self, entry_id: str, message: SessionInput | MessageError) -> None:
        """Remember where a body lies, for trimming."""
        if isinstance(message, FrameTokens | FrameSkipped):
            self.frame_ids.setdefault(message.seq, entry_id)
        elif isinstance(message, Query | SettingsChange | End):
            self.commands[entry_id] = message

    def note_entry(self, position: int, entry: LogEntry) -> None:
        """Remember what a log entry settled."""
        if isinstance(entry, FramesDecided):
            self.decided_at.append((entry.last_seq, position, self.told))
        elif isinstance(entry, QueryConsumed | InputRefused | SettingsApplied):
            settled = None if isinstance(entry, SettingsApplied) else entry.query_id
            for entry_id, command in self.commands.items():
                if isinstance(command, End):
                    continue
                if (command.query_id if isinstance(command, Query) else None) == settled:
                    self.consumed.append(entry_id)
                    del self.commands[entry_id]
                    break
        self.told = self.told.after(entry)

    def window(self, entry: Evicted, position: int) -> Window:
        """What a takeover needs after this eviction; forgets what lies before it."""
        while self.decided_at and self.decided_at[0][0] < entry.first_seq:
            self.decided_at.popleft()
        self.frame_ids = {seq: at for seq, at in self.frame_ids.items() if seq >= entry.first_seq}
        timed, room = dict[str, Query](), AHEAD_CHARACTERS
        for at, one in self.commands.items():
            if isinstance(one, Query) and one.time is not None and len(one.text) <= room:
                timed[at], room = one, room - len(one.text)
        needed = [*self.frame_ids.values(), *(self.commands.keys() - timed.keys())]
        in_id = min(needed, key=stream_order) if needed else self.cursor
        self.consumed = [at for at in self.consumed if stream_order(at) >= stream_order(in_id)]
        _, out_position, told = self.decided_at[0] if self.decided_at else (0, position, self.told)
        return Window(
            first_seq=entry.first_seq,
            out_position=min(out_position, position),
            in_id=in_id,
            consumed=self.consumed,
            ahead=[(at, query) for at, query in timed.items() if stream_order(at) < stream_order(in_id)],
            recent=list(told.recent),
            responses=told.responses,
            spoken=told.spoken,
            next_seq=told.next_seq,
            clock=told.clock,
            settled=self.told.settled - told.settled,
            settings=self.session.settings,
        )

    def deliver(self, entry_id: str, message: SessionInput | MessageError, tokens_shape: tuple[int, int]) -> None:
        """Put one input into the session. Tokens of another shape than (N, D) become a skipped frame."""
        session = self.session
        if isinstance(message, MessageError):
            logger.error("session=%s input=%s ignored: %s", session.session_id, entry_id, message)
        elif isinstance(message, FrameTokens):
            try:
                session.add_frame(message.seq, message.time, message.tensor(tokens_shape))
            except MessageError as error:
                logger.error("session=%s frame=%d skipped: %s", session.session_id, message.seq, error)
                session.skip_frame(message.seq, message.time, str(error))
        elif isinstance(message, FrameSkipped):
            session.skip_frame(message.seq, message.time, message.reason)
        else:
            session.add(message)


def read_window(meta: SessionMeta) -> Window | None:
    """Where a takeover starts; None when nothing was trimmed yet. Raises MessageError for damaged bytes."""
    if not meta.window:
        return None
    window = decode(meta.window)
    if not isinstance(window, Window):
        raise MessageError(f"the window in a session's meta is a {window.kind} message")
    return window


def rebuild(
    engine: Engine,
    lease: Lease,
    meta: SessionMeta,
    log: Sequence[StoredEntry],
    inputs: Sequence[StoredInput],
    tokens_shape: tuple[int, int],
) -> Held:
    """A session of `engine` that goes on where the log ends. To be called on the engine's thread.

    Raises NoCapacity and SessionError as `engine.open` does, LostFrames when a frame of the window has no body.
    """
    window = read_window(meta)
    first_seq = window.first_seq if window else 0
    session = engine.open(lease.session_id, window.settings if window else meta.settings)
    held = Held(lease, session, meta.position, window.in_id if window else "0-0")
    try:
        if window:
            told = Told(window.next_seq, window.clock, window.responses, window.spoken, tuple(window.recent))
            held.told = told
            session.recent, session.responses, session.spoken = told.recent, told.responses, told.spoken
            session.next_seq, session.clock = told.next_seq, told.clock
            held.consumed = list(window.consumed)
            for number in range(window.settled):  # nobody delivers these again: others are not to go in their place
                change = SettingsChange(after_seq=-1, settings=window.settings)
                held.note_input(f"0-{number}", change)
                session.add(change)
            for entry_id, query in window.ahead:
                held.note_input(entry_id, query)
                session.add(query)
        for entry_id, message in inputs:
            held.cursor = entry_id
            if entry_id not in held.consumed:
                held.note_input(entry_id, message)
                held.deliver(entry_id, message, tokens_shape)
        kept = [(position, entry) for position, entry in log if not window or position >= window.out_position]
        _check_bodies(held, [entry for _, entry in kept], first_seq)
        session.restore(entry for _, entry in kept)
        speaking = session.response.response_id if session.response is not None else None
        for _, message in inputs:
            if isinstance(message, Interrupt) and speaking is not None and message.response_id == speaking:
                session.add(message)
        for position, entry in kept:
            held.note_entry(position, entry)
    except Exception:
        engine.close(lease.session_id)
        raise
    return held


def _check_bodies(held: Held, log: Sequence[LogEntry], first_seq: int) -> None:
    decided = {s for e in log if isinstance(e, FramesDecided) for s in range(e.first_seq, e.last_seq + 1)}
    lost = sorted(seq for seq in decided - held.frame_ids.keys() if seq >= first_seq)
    if lost:
        raise LostFrames(f"session_expired: the tokens of {len(lost)} frames from {lost[0]} on are gone from Redis")


def stream_order(entry_id: str) -> tuple[int, int]:
    """The order of Redis stream ids."""
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)

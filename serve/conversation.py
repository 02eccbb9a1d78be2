"""One client's session as the gateway sees it: frames admitted by credits, the log as events.

The gateway keeps nothing that Redis does not hold, apart from the frames that wait for a credit: what
it knows of its client beyond the log it notes there, so that any gateway goes on when the client
comes back. A session is attached to its client's newest connection; the bus refuses the older ones.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from actors.bus import Bus, BusError
from actors.config import Fit
from actors.gateway_side import resume_too_late
from actors.messages import (
    End,
    FramesDecided,
    FrameSkipped,
    InputRefused,
    Interrupt,
    LogEntry,
    Query,
    ResponseEnded,
    ResponseStarted,
    SessionSettings,
    SettingsApplied,
    SettingsChange,
)
from actors.messages import SessionEnded as SessionEndedEntry
from serve.client_events import ClientError, DropPolicy, SessionPatch
from serve.counts import Counts, NotedCounts, Outcome
from serve.frame_buffer import FrameBuffer, check_frame_time
from serve.keys import LOCAL
from serve.limits import TokenBucket
from serve.metrics import GatewayMeters
from serve.preferences import Preferences, patched, shown
from serve.recording import Asked, Changed, Finished, Interrupted, Opened, Recorder
from serve.server_events import ServerEvent, SessionEnded, SessionInfo, Statistics, Usage
from serve.translation import Translator

log = logging.getLogger(__name__)

CLIENTS_MISTAKES = ("too_many_inputs", "message_too_large")
GONE = ("session_ended", "session_expired")
PAGE = 64


@contextmanager
def suppress_gone() -> Iterator[None]:
    """Input for a session that has just ended is nobody's mistake: its log says how it ended."""
    try:
        yield
    except BusError as error:
        if error.code not in GONE:
            raise


async def open_response(bus: Bus, session_id: str, first: int, behind: int) -> tuple[int, ResponseStarted] | None:
    """Which response is open behind log entries [first, behind), and the position where it began."""
    while behind > first:
        low = max(first, behind - PAGE)
        for position, entry in reversed(await bus.entries(session_id, low, behind - low)):
            if isinstance(entry, ResponseStarted):
                return position, entry
            if isinstance(entry, ResponseEnded | FramesDecided):
                return None
        behind = low
    return None


async def end_at_once(
    bus: Bus, session_id: str, after_seq: int, speaking: str | None, connection: int | None = None
) -> None:
    """End the input and cut whatever is spoken: by now, or the response `speaking` by who takes the session over."""
    with suppress_gone():
        await bus.send(session_id, End(after_seq=after_seq), connection)
        for response_id in {None, speaking}:
            await bus.send(session_id, Interrupt(after_seq=after_seq, response_id=response_id), connection)


class Conversation:
    """A session from its first message, or from where its client comes back, to its last event.

    `counts` are this session's, `totals` the gateway's. `bulk` marks recorded video, which
    encoders take after live frames. `max_live` bounds undecided frames where the newest wins: all the
    credits would be seconds of lag. Such video is taken at `live_speed` times its fps at most, on average, so that
    what comes faster than time goes by takes nothing from others. `resumable` says that the session outlives the
    connection. `record` is the folder of recordings (recording.py), `fit` is only told to clients.
    """

    def __init__(
        self,
        bus: Bus,
        fingerprint: str,
        fit: Fit,
        totals: Counts,
        defaults: SessionSettings,
        meters: GatewayMeters,
        *,
        max_waiting: int,
        max_live: int,
        live_speed: float,
        bulk: bool = False,
        client: str = LOCAL,
        record: Path | None = None,
    ) -> None:
        self.id = f"sess_{uuid.uuid4().hex}"
        self.client = client
        self.settings = defaults
        self.include: frozenset[str] = frozenset()
        self.counts = Counts()
        self.opened = False
        self.ended = False
        self.resumable = False
        self.opened_at = time.time()
        self.taken = asyncio.Event()
        self._bus = bus
        self._fingerprint = fingerprint
        self._fit = fit
        self._totals = totals
        self._meters = meters
        self._max_live = max_live
        self._live_speed = live_speed
        self._pace: TokenBucket | None = None
        self._bulk = bulk
        self._frames = FrameBuffer("block" if bulk else "latest", max_waiting, self._dropped)
        self._received_at: dict[int, float] = {}
        self._next_undecided = 0
        self._finishing = False
        self._end_said = False
        self._connection = 1
        self._after = self._counted = -1
        self._first = 0
        self._asked = False
        self._speaking: str | None = None  # the response that is open as far as the log was read
        self._in_force: SessionSettings | None = None
        self._changes = 0  # of settings, on which the model has not decided
        self._answered = -1  # the log position of its last decision on one
        self._record = record

    @property
    def drop_policy(self) -> DropPolicy:
        return self._frames.policy

    @property
    def info(self) -> SessionInfo:
        """Settings as the client chose them last."""
        return self.info_of(self.settings)

    @property
    def statistics(self) -> Statistics:
        through = self._frames.through if self._frames.through >= 0 else None
        return self.counts.statistics(len(self._frames), through)

    @property
    def most_inputs(self) -> int:
        """Questions that may wait for the model, and changes of settings."""
        return self._bus.config.max_pending_inputs

    @property
    def _recorder(self) -> Recorder | None:
        return Recorder(self._record, self.id) if self._record else None

    @property
    def behind(self) -> int:
        """Frames that came and are not decided."""
        return len(self._frames) + max(0, self.counts.admitted - self._next_undecided)

    @property
    def lag_s(self) -> float:
        """How long ago the oldest frame came that is not decided; 0 where none waits, or is meant to: no live video."""
        if self.drop_policy == "block" or not self._received_at:
            return 0.0
        return time.monotonic() - min(self._received_at.values())

    def info_of(self, settings: SessionSettings) -> SessionInfo:
        """Those settings as clients see them."""
        return shown(self.id, self._fingerprint, self._fit, settings, self.include, self.drop_policy)

    async def open(self) -> None:
        """Create the session's log. Settings given before are those it starts with."""
        self.opened = True  # before the answer: a client that leaves meanwhile must not leave a session behind
        await self._bus.open_session(self.id, self._fingerprint, self.settings, self.client)
        self._in_force = self.settings
        if self._recorder is not None:
            self._recorder.add(Opened(settings=self.settings, include=sorted(self.include)))
        await self._note_preferences()

    async def resume(self, session_id: str, after: int | None) -> None:
        """Go on with a session of this client after log position `after`, else with all of the log that is there.

        Raises BusError `session_expired` for a session that is not there or not this client's,
        `resume_too_late` when what follows `after` was trimmed.
        """
        meta = await self._bus.attach(session_id, self.client)
        self.id, self._connection, self._first = session_id, meta.connection, meta.first_position
        self._after = self._first - 1 if after is None else after
        if self._after + 1 < self._first:
            raise resume_too_late(session_id, self._after, self._first)
        if self._after >= meta.position:
            text = f"after is {after}, the log of session {session_id!r} ends at {meta.position - 1}"
            raise BusError("bad_position", text)
        self.settings, self.opened, self.resumable = meta.settings, True, True
        known = Preferences.model_validate_json(meta.preferences) if meta.preferences else None
        if known is not None:
            self.settings, self.include, self.opened_at = known.settings, frozenset(known.include), known.opened
            self._frames.policy = known.drop_policy
            self._in_force = known.in_force
        self._in_force = self._in_force or self.settings
        if known is not None and known.changes is not None:
            self._answered, self._changes = known.answered, known.changes
        else:  # noted by a gateway of an older version, or not at all
            self._answered, self._changes = self._after, int(self.settings != self._in_force)
        noted = NotedCounts.model_validate_json(meta.counts or "{}")
        self._frames.continue_after(max(meta.time, noted.through))
        self.counts.admitted = meta.admitted
        self.counts.decided, self.counts.skipped, self._counted = noted.decided, noted.skipped, noted.position
        self.counts.dropped.update(noted.dropped)
        self.counts.received = meta.admitted + self.counts.dropped.total()
        self._next_undecided = noted.decided + noted.skipped
        self._finishing = self._end_said = meta.state != "open"

    async def update(self, patch: SessionPatch) -> bool:
        """Change settings; those of the gateway at once, those of the model once the next frame is decided.

        True when the model's settings change in the middle of the session, so that the log will tell.
        """
        before, settings = self.settings, patched(self.settings, patch)
        changed = settings != before
        if changed and self.opened and self._changes >= self.most_inputs:  # none is applied while a response is spoken
            text = f"{self._changes} changes of settings wait already, no more are taken: wait for session.updated"
            raise ClientError("too_many_inputs", text)
        self.settings = settings  # before it is sent: the model's answer may overtake that of Redis
        if changed and self.opened:
            self._changes += 1
            try:
                await self._say(SettingsChange(after_seq=self.counts.admitted - 1, settings=settings))
            except Exception:
                self.settings, self._changes = before, self._changes - 1
                if not self._changes and self._in_force is not None:  # what was there before may be refused by now
                    self.settings = self._in_force
                raise
        if patch.include is not None:
            self.include = frozenset(patch.include)
        if patch.video is not None and patch.video.drop_policy is not None:
            self._frames.policy = patch.video.drop_policy
        if self.opened:
            await self._note_preferences()
        return changed and self.opened

    def offer(self, video_time: float | None, image: bytes) -> None:
        """Take a frame, which is admitted when there is a credit. Raises as `times_of`, and for a full buffer."""
        (taken,) = self.times_of([(video_time, image)])
        self._count("received")
        self._frames.add(taken, image)

    def times_of(self, frames: Sequence[tuple[float | None, bytes]]) -> list[float]:
        """The times that frames would have if they were offered now, those without one a frame after the one before.

        Raises ClientError for a bad time or a picture that is too large, and behind the end of input.
        """
        if self._finishing and frames:
            raise ClientError("ended", "a frame after input_video_buffer.end, which was the last message for frames")
        last, times = self._frames.last_time, list[float]()
        for video_time, image in frames:
            if video_time is None:
                video_time = last + 1 / self.settings.fps if last >= 0 else 0.0
            check_frame_time(video_time, last)
            if len(image) > self._bus.config.max_frame_bytes:
                limit = self._bus.config.max_frame_bytes
                raise ClientError("too_big", f"picture of {len(image)} bytes, at most {limit} are allowed")
            last = video_time
            times.append(video_time)
        return times

    def refuse(self, reason: str) -> None:
        """Count a frame that is dropped for `reason` before anybody looked at it."""
        self._count("received")
        self._dropped(reason)

    async def ask(self, text: str, video_time: float | None, item_id: str | None = None) -> str:
        """A question about now or at a moment of the video; its id. The same id again is the same question."""
        query_id = item_id or f"item_{uuid.uuid4().hex}"
        await self._say(Query(query_id=query_id, text=text, after_seq=self.counts.admitted - 1, time=video_time))
        self._asked = True
        return query_id

    async def respond(self, text: str | None, otherwise: str) -> None:
        """Ask `text`; without it, `otherwise` unless a question was asked, which is answered anyway."""
        if text is not None or not self._asked:
            await self.ask(text or otherwise, None)
        self._asked = False

    async def interrupt(self, response_id: str | None = None) -> None:
        """Stop that response, or the one that is being spoken."""
        named = response_id or self._speaking
        await self._say(Interrupt(after_seq=self.counts.admitted - 1, response_id=named))

    def finish(self) -> None:
        """No more frames: `feed` sends the end once those that wait are admitted."""
        self._finishing = True
        self._frames.note_change()

    async def leave(self, reason: str = "client left") -> None:
        """Let the session end as soon as it can, because its client is gone or nobody took it."""
        self._frames.clear()
        if not self.opened or self.ended or self.taken.is_set() or await self._bus.abandon(self.id, reason):
            return
        await end_at_once(self._bus, self.id, self.counts.admitted - 1, self._speaking, self._connection)

    async def note_counts(self) -> None:
        """Keep the counts for the gateway where the client may come back, before it is told them."""
        if self.opened and not self.ended:
            await self._bus.note(self.id, self._connection, "counts", self._noted())

    async def check(self) -> None:
        """See whether the client has connected elsewhere since: `taken` is set then."""
        if self.opened and not self.ended:
            meta = await self._bus.session_meta(self.id)
            if meta is not None and meta.connection != self._connection:
                self.taken.set()

    async def room(self) -> None:
        """Return when few frames wait, so that a reader of recorded video runs no further ahead."""
        while len(self._frames) >= min(self._frames.max_waiting, 4):
            await self._frames.change()

    async def feed(self) -> None:
        """Admit waiting frames while there are credits, until `finish`; then send the end."""
        with suppress_gone():
            while not (self._finishing and not self._frames):
                await self._admit_next()
            if not self._end_said:
                await self._bus.send(self.id, End(after_seq=self.counts.admitted - 1), self._connection)
                if self._recorder is not None:
                    self._recorder.add(Finished())

    async def _admit_next(self) -> None:
        """Admit the frame that waits longest, or wait for a frame or for a credit."""
        if not self._frames:
            await self._frames.change()
            return
        frame = self._frames.take()
        seq = None
        if self.drop_policy == "block" or self._may_admit_live():
            noted = self._noted(frame.time)
            seq = await self._bus.admit_frame(
                self.id, frame.time, frame.image, bulk=self._bulk, connection=self._connection, counts=noted
            )
        if seq is None:
            self._frames.give_back(frame)
            await self._frames.change()
            return
        if self._recorder is not None:
            self._recorder.frame(frame.time, frame.image)
        self._frames.admitted(frame)
        self._count("admitted")
        self._meters.stage("admission", time.monotonic() - frame.received)
        # The decision may overtake the answer to the admission when this process was busy.
        if seq >= self._next_undecided:
            self._received_at[seq] = frame.received

    def _may_admit_live(self) -> bool:
        per_s = self._live_speed * self.settings.fps
        if self._pace is None or self._pace.per_s != per_s:
            self._pace = TokenBucket(per_s, self._max_live, first=2)  # more only to make up for a pause
        if self.counts.admitted - self._next_undecided >= self._max_live:
            return False
        return self._pace.take() or (self._finishing and not self._frames)  # the last one need not wait

    async def placed(self) -> bool:
        """Whether an LLM replica holds the session, or none needs to any more."""
        meta = await self._bus.session_meta(self.id)
        return meta is None or meta.held or meta.state == "ended"

    async def events(self) -> AsyncIterator[ServerEvent]:
        """The session's events to `session.ended`, in log order, from where its client wants to go on.

        An event's id is its position and its number among the events of that entry, so it is the same
        for every gateway. Entries before that are read where an open response or the counts need them.
        """
        start = await self._response_start()
        begin = max(self._first, min(start, self._counted + 1))
        translator, position_told, number = Translator(), -1, 0
        async for position, entry in self._bus.tail(self.id, begin - 1):
            self._settle(position, entry)
            if isinstance(entry, ResponseStarted):
                self._speaking = entry.response_id
            elif isinstance(entry, ResponseEnded):
                self._speaking = None
            await self._take_back(position, entry)
            if position < start:
                continue
            hold = self.settings.suppress_duplicates
            told = list(translator.events(position, entry, self.include, self.info_of, hold))
            if isinstance(entry, SessionEndedEntry):
                usage = Usage(input_tokens=entry.positions - entry.spoken, output_tokens=entry.spoken)
                ended = SessionEnded(position=position, reason=entry.reason, frames=self.statistics, usage=usage)
                told.append(ended)
            for event in told:
                at = position if event.position is None else event.position
                number = number + 1 if at == position_told else 0
                position_told = at
                if at > self._after:
                    event = event.model_copy(update={"event_id": f"event_{at}_{number}"})
                    if self._recorder is not None:
                        self._recorder.event(event)
                    yield event

    async def _take_back(self, position: int, entry: LogEntry) -> None:
        """Return to the settings in force when the model refuses others: what is changed next goes on from those.

        While more changes are under way it is left to the answer to the last of them.
        """
        refused = isinstance(entry, InputRefused) and entry.query_id is None
        if position <= self._answered or not (refused or isinstance(entry, SettingsApplied)):
            return
        self._answered = position
        self._changes = max(0, self._changes - 1)
        if isinstance(entry, SettingsApplied):
            self._in_force = entry.settings
        if not self._changes and self._in_force is not None:
            self.settings = self._in_force
        await self._note_preferences()

    async def _response_start(self) -> int:
        """Where the response began that is open at `after`; the position behind `after` when none is."""
        behind = self._after + 1
        started = await open_response(self._bus, self.id, self._first, behind)
        return behind if started is None else started[0]

    async def _say(self, message: Query | Interrupt | SettingsChange) -> None:
        """Send input to the model. Raises ClientError when it is too much or too large."""
        try:
            await self._bus.send(self.id, message, self._connection)
        except BusError as error:
            if error.code in CLIENTS_MISTAKES:
                raise ClientError(error.code, str(error)) from None
            if error.code == "session_ended":
                raise ClientError("ended", "the session has ended and takes no more input") from None
            raise
        if self._recorder is not None:
            self._recorder.add(_recorded(message))

    def _settle(self, position: int, entry: LogEntry) -> None:
        """Count the frames of an entry that are done and let the next ones in."""
        if position <= self._counted:
            return
        self._counted = position
        if isinstance(entry, FramesDecided):
            for seq in range(entry.first_seq, entry.last_seq + 1):
                self._done(seq, "decided")
        elif isinstance(entry, FrameSkipped):
            self._done(entry.seq, "skipped")
        elif isinstance(entry, SessionEndedEntry):
            self.ended = True

    def _done(self, seq: int, outcome: Outcome) -> None:
        self._count(outcome)
        self._next_undecided = seq + 1
        received = self._received_at.pop(seq, None)
        if received is not None:
            lag = time.monotonic() - received
            self.counts.lags.append(lag)
            self._totals.lags.append(lag)
            waits = self.drop_policy == "block"  # on purpose: for its turn
            self._meters.stage("total_recorded" if waits else "total", lag)
        self._frames.note_change()

    def _noted(self, through: float | None = None) -> str:
        counts = NotedCounts(
            dropped=dict(self.counts.dropped),
            through=self._frames.through if through is None else through,
            decided=self.counts.decided,
            skipped=self.counts.skipped,
            position=self._counted,
        )
        return counts.model_dump_json()

    async def _note_preferences(self) -> None:
        chosen = Preferences(
            settings=self.settings,
            in_force=self._in_force,
            changes=self._changes,
            answered=self._answered,
            include=sorted(self.include),
            drop_policy=self.drop_policy,
            opened=self.opened_at,
        )
        await self._bus.note(self.id, self._connection, "preferences", chosen.model_dump_json())

    def _dropped(self, reason: str) -> None:
        self._meters.frame("dropped", reason)
        for counts in (self.counts, self._totals):
            counts.dropped[reason] += 1

    def _count(self, outcome: Outcome) -> None:
        self._meters.frame(outcome)
        for counts in (self.counts, self._totals):
            counts.add(outcome)


def _recorded(message: Query | Interrupt | SettingsChange) -> Asked | Changed | Interrupted:
    """Input as a line of a recording."""
    if isinstance(message, Query):
        return Asked(id=message.query_id, text=message.text, video_time=message.time)
    return Changed(settings=message.settings) if isinstance(message, SettingsChange) else Interrupted()

"""One client's session as the gateway sees it: frames admitted by credits, the log as events.

The gateway keeps nothing that the log does not hold, apart from the frames that wait for a credit
and the counts. Dropping happens here and only here, before a frame gets its number: with `latest`
the newest frame wins, with `block` frames wait, up to a bound.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pydantic import ValidationError

from actors.bus import Bus, BusError
from actors.messages import (
    End,
    FramesDecided,
    FrameSkipped,
    Interrupt,
    Query,
    SessionSettings,
    SettingsChange,
)
from actors.messages import SessionEnded as SessionEndedEntry
from serve.client_events import ClientError, DropPolicy, SessionPatch, check_time
from serve.server_events import ServerEvent, SessionEnded, SessionInfo, Statistics, VideoInfo
from serve.translation import Translator

log = logging.getLogger(__name__)

CREDIT_POLL_S = 0.2
OWNER_POLL_S = 0.1
CLIENTS_MISTAKES = ("too_many_inputs", "message_too_large")
GONE = ("session_ended", "session_expired")
LAGS_KEPT = 4096


class NoCapacity(Exception):
    """No LLM replica took the session in time."""


@dataclass
class Counts:
    """Frames by what became of them, and the lags of the latest decisions in seconds."""

    received: int = 0
    admitted: int = 0
    decided: int = 0
    skipped: int = 0
    dropped: int = 0
    lags: deque[float] = field(default_factory=lambda: deque(maxlen=LAGS_KEPT))

    def statistics(self, waiting: int = 0) -> Statistics:
        """As it is told to clients."""
        return Statistics(
            received=self.received,
            admitted=self.admitted,
            waiting=waiting,
            decided=self.decided,
            skipped=self.skipped,
            dropped=self.dropped,
            lag_p50=percentile(self.lags, 0.50),
            lag_p99=percentile(self.lags, 0.99),
        )


@contextmanager
def suppress_gone() -> Iterator[None]:
    """Input for a session that has just ended is nobody's mistake: its log says how it ended."""
    try:
        yield
    except BusError as error:
        if error.code not in GONE:
            raise


def percentile(values: deque[float], share: float) -> float | None:
    """Smallest value that at least `share` of all values do not exceed; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True)
class WaitingFrame:
    """A frame without a number yet. `received` is the monotonic moment of its arrival."""

    time: float
    image: bytes
    received: float


class Conversation:
    """A session from its first message to its last event.

    `counts` are this session's, `totals` the gateway's. `bulk` marks recorded video, which
    encoders take after live frames. `max_live` bounds undecided frames where the newest wins: all the
    credits would be seconds of lag.
    """

    def __init__(
        self,
        bus: Bus,
        fingerprint: str,
        totals: Counts,
        defaults: SessionSettings,
        *,
        max_waiting: int,
        max_live: int,
        bulk: bool = False,
    ) -> None:
        self.id = f"sess_{uuid.uuid4().hex}"
        self.settings = defaults
        self.drop_policy: DropPolicy = "block" if bulk else "latest"
        self.include: frozenset[str] = frozenset()
        self.counts = Counts()
        self.opened = False
        self.ended = False
        self._bus = bus
        self._fingerprint = fingerprint
        self._totals = totals
        self._max_waiting = max_waiting
        self._max_live = max_live
        self._bulk = bulk
        self._waiting: deque[WaitingFrame] = deque()
        self._received_at: dict[int, float] = {}
        self._next_undecided = 0
        self._last_time = -1.0
        self._starved = False
        self._finishing = False
        self._changed = asyncio.Event()

    @property
    def info(self) -> SessionInfo:
        """Settings in force, as clients see them."""
        return SessionInfo(
            id=self.id,
            instructions=self.settings.instructions,
            max_output_tokens=self.settings.max_response_tokens,
            include=sorted(self.include),
            video=VideoInfo(fps=self.settings.fps, threshold=self.settings.threshold, drop_policy=self.drop_policy),
        )

    @property
    def statistics(self) -> Statistics:
        return self.counts.statistics(len(self._waiting))

    async def open(self) -> None:
        """Create the session's log. Settings given before are those it starts with."""
        self.opened = True  # before the answer: a client that leaves meanwhile must not leave a session behind
        await self._bus.open_session(self.id, self._fingerprint, self.settings)

    async def update(self, patch: SessionPatch) -> bool:
        """Change settings; those of the gateway at once, those of the model once the next frame is decided.

        True when the model's settings change in the middle of the session, so that the log will tell.
        """
        settings = _patched(self.settings, patch)
        if patch.include is not None:
            self.include = frozenset(patch.include)
        if patch.video is not None and patch.video.drop_policy is not None:
            self.drop_policy = patch.video.drop_policy
        if settings == self.settings:
            return False
        self.settings = settings
        if self.opened:
            await self._say(SettingsChange(after_seq=self.counts.admitted - 1, settings=settings))
        return self.opened

    def offer(self, video_time: float, image: bytes) -> None:
        """Take a frame; it is admitted when there is a credit. Raises ClientError for a bad time or a full buffer."""
        if self._finishing:
            raise ClientError("ended", "a frame after input_video_buffer.end, which was the last message for frames")
        check_time(video_time)
        if len(image) > self._bus.config.max_frame_bytes:
            limit = self._bus.config.max_frame_bytes
            raise ClientError("too_big", f"picture of {len(image)} bytes, at most {limit} are allowed")
        if video_time <= self._last_time:
            raise ClientError(
                "bad_time",
                f"video_time is {video_time}, expected more than the {self._last_time} of the frame before",
                "video_time",
            )
        self._count("received")
        if self.drop_policy == "block" and len(self._waiting) >= self._max_waiting:
            self._count("dropped")
            raise ClientError(
                "buffer_full",
                f"{len(self._waiting)} frames wait already and the frame at {video_time} s was dropped: "
                "send no faster than input_video_buffer.status shows frames decided",
            )
        self._last_time = video_time
        self._waiting.append(WaitingFrame(video_time, image, time.monotonic()))
        self._keep_newest()
        self._changed.set()

    async def ask(self, text: str, video_time: float | None, item_id: str | None = None) -> str:
        """A question about now or at a moment of the video; its id."""
        query_id = item_id or f"item_{uuid.uuid4().hex}"
        await self._say(Query(query_id=query_id, text=text, after_seq=self.counts.admitted - 1, time=video_time))
        return query_id

    async def interrupt(self) -> None:
        """Stop the response that is being spoken."""
        await self._say(Interrupt(after_seq=self.counts.admitted - 1))

    def finish(self) -> None:
        """No more frames: `feed` sends the end once those that wait are admitted."""
        self._finishing = True
        self._changed.set()

    async def leave(self, reason: str = "client left") -> None:
        """Let the session end as soon as it can, because its client is gone or nobody took it."""
        self._waiting.clear()
        if not self.opened or self.ended or await self._bus.abandon(self.id, reason):
            return
        with suppress_gone():
            await self._bus.send(self.id, Interrupt(after_seq=self.counts.admitted - 1))
            await self._bus.send(self.id, End(after_seq=self.counts.admitted - 1))

    async def room(self) -> None:
        """Return when few frames wait, so that a reader of recorded video runs no further ahead."""
        while len(self._waiting) >= min(self._max_waiting, 4):
            await self._await_change()

    async def feed(self) -> None:
        """Admit waiting frames while there are credits, until `finish`; then send the end."""
        with suppress_gone():
            while not (self._finishing and not self._waiting):
                await self._admit_next()
            await self._bus.send(self.id, End(after_seq=self.counts.admitted - 1))

    async def _admit_next(self) -> None:
        """Admit the frame that waits longest, or wait for a frame or for a credit."""
        if not self._waiting:
            await self._await_change()
            return
        frame = self._waiting.popleft()
        seq = None
        if self.drop_policy == "block" or len(self._received_at) < self._max_live:
            seq = await self._bus.admit_frame(self.id, frame.time, frame.image, bulk=self._bulk)
        self._starved = seq is None
        if seq is None:
            self._waiting.appendleft(frame)
            self._keep_newest()
            await self._await_change()
        else:
            self._count("admitted")
            # The decision may overtake the answer to the admission when this process was busy.
            if seq >= self._next_undecided:
                self._received_at[seq] = frame.received

    async def owned(self, timeout_s: float) -> None:
        """Return once an LLM replica holds the session. Raises NoCapacity after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            meta = await self._bus.session_meta(self.id)
            if meta is None or meta.held or meta.state == "ended":
                return
            await asyncio.sleep(OWNER_POLL_S)
        raise NoCapacity(f"no model replica took the session within {timeout_s:g} s: all are full or down, try later")

    async def events(self) -> AsyncIterator[ServerEvent]:
        """The session's events from the first to `session.ended`, in log order."""
        translator = Translator()
        async for position, entry in self._bus.tail(self.id):
            if isinstance(entry, FramesDecided):
                for seq in range(entry.first_seq, entry.last_seq + 1):
                    self._settle(seq, "decided")
            elif isinstance(entry, FrameSkipped):
                self._settle(entry.seq, "skipped")
            for event in translator.events(position, entry, self.include, self.info, self.settings.suppress_duplicates):
                yield event
            if isinstance(entry, SessionEndedEntry):
                self.ended = True
                yield SessionEnded(position=position, reason=entry.reason, frames=self.statistics)

    async def _say(self, message: Query | Interrupt | SettingsChange) -> None:
        """Send input to the model. Raises ClientError when it is too much or too large."""
        try:
            await self._bus.send(self.id, message)
        except BusError as error:
            if error.code in CLIENTS_MISTAKES:
                raise ClientError(error.code, str(error)) from None
            raise

    def _settle(self, seq: int, outcome: str) -> None:
        """Count a frame that is done and let the next one in."""
        self._count(outcome)
        self._next_undecided = seq + 1
        received = self._received_at.pop(seq, None)
        if received is not None:
            lag = time.monotonic() - received
            self.counts.lags.append(lag)
            self._totals.lags.append(lag)
        self._changed.set()

    def _keep_newest(self) -> None:
        """With `latest`, drop all but the newest waiting frame while there is no credit."""
        keep = 1 if self._starved else self._max_waiting
        while self.drop_policy == "latest" and len(self._waiting) > keep:
            self._waiting.popleft()
            self._count("dropped")

    def _count(self, name: str) -> None:
        for counts in (self.counts, self._totals):
            setattr(counts, name, getattr(counts, name) + 1)

    async def _await_change(self) -> None:
        """Sleep until a frame came, one was decided or the end was announced; look again now and then."""
        try:
            async with asyncio.timeout(CREDIT_POLL_S if self._waiting else None):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()


def _patched(settings: SessionSettings, patch: SessionPatch) -> SessionSettings:
    """`settings` with what `patch` gives. Raises ClientError when they do not fit together."""
    video = patch.video
    window = video.window if video else None
    changes = {
        "instructions": patch.instructions,
        "max_response_tokens": patch.max_output_tokens,
        "threshold": video.threshold if video else None,
        "fps": video.fps if video else None,
        "window_trigger": window.trigger if window else None,
        "window_keep": window.keep if window else None,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return SessionSettings.model_validate({**settings.model_dump(), **given})
    except ValidationError as error:
        raise ClientError("bad_value", error.errors()[0]["msg"], "session") from None

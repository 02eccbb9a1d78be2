"""A client that streams, loses its connection, comes back and keeps books; and what its books say at the end.

It sends frames at their times and says the end when told to. After every disconnection it resumes behind
the last log entry it has surely seen whole, with growing and random pauses in between, and sends what
was not acknowledged once more. At the end it asks for the whole log and compares.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import struct
import time
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlencode

import websockets
from pydantic import JsonValue
from websockets.exceptions import WebSocketException

from actors.tasks import end_all

FPS = 2.0
IN_FLIGHT = 16  # frames that are sent and not decided: a gateway drops what exceeds its bound, after a long absence
LONGEST_PAUSE_S = 1.0
QUIET_S = 90.0
NORMAL_END = "end of input"
FINAL = ("session_expired", "resume_too_late", "bad_position")

Event = dict[str, JsonValue]
Outcome = Literal["ended", "ended early", "expired", "refused", "hung"]


@dataclass
class Books:
    """What one client saw. Times are monotonic; frames are known by their number, `due` when each was to be sent.

    `away` holds when a connection was lost and when the session was there again at the next, for each that was.
    """

    outcome: Outcome = "hung"
    session_id: str = ""
    away: list[tuple[float, float]] = field(default_factory=list)
    due: dict[int, float] = field(default_factory=dict)
    decided: dict[int, float] = field(default_factory=dict)
    told: dict[str, int] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    heard: list[str] = field(default_factory=list)
    acknowledged: int = 0
    skipped: set[int] = field(default_factory=set)
    dropped: int = 0
    errors: list[str] = field(default_factory=list)
    connections: int = 0
    duplicated: int = 0
    missing: int = 0
    disorder: int = 0

    @property
    def lost(self) -> int:
        """Frames that the server answered for and neither decided, skipped with a reason, nor counted as dropped."""
        return max(0, len(self.undecided) - self.dropped)

    @property
    def settled(self) -> int:
        """How many frames the server has decided, skipped or dropped."""
        return len(self.decided) + len(self.skipped - self.decided.keys()) + self.dropped

    @property
    def undecided(self) -> list[int]:
        """Frames that the server answered for and neither decided nor skipped."""
        return [index for index in range(self.acknowledged) if index not in self.decided and index not in self.skipped]

    @property
    def unanswered(self) -> int:
        """Questions that are not in the log exactly once."""
        return sum(self.heard.count(question) != 1 for question in self.asked)

    @property
    def sound(self) -> bool:
        """It ended as a session should, and nothing is missing, twice or lost."""
        return self.outcome == "ended" and not (
            self.duplicated or self.missing or self.disorder or self.lost or self.unanswered
        )

    def recovery(self, since: float) -> float | None:
        """Seconds from a moment until a frame due after it was decided; None while none was."""
        later = itertools.takewhile(lambda item: item[1] >= since, reversed(self.due.items()))
        index = min((index for index, _ in later if index in self.decided), default=None)
        return None if index is None else self.decided[index] - since

    def latencies(self, since: float, until: float) -> list[float]:
        """Seconds from the moment at which a frame was due to its decision, of those due between two moments.

        Infinite for a frame that was never decided.
        """
        due = [(index, at) for index, at in self.due.items() if since <= at < until]
        return [self.decided.get(index, math.inf) - at for index, at in due]


class Final(Exception):
    """The server says that there is nothing to come back to."""


class ChaosClient:
    """One session of `fps` frames a second from first frame to audit. `stop` lets it say the end."""

    def __init__(
        self,
        url: str,
        picture: bytes,
        seed: int,
        talks: bool,
        stop: asyncio.Event,
        ask_every: int = 12,
        fps: float = FPS,
    ) -> None:
        self.url = url
        self.fps = fps
        self.books = Books()
        self._picture = picture
        self._random = random.Random(seed)
        self._talks = talks
        self._ask_every = ask_every
        self._stop = stop
        self._session_id: str | None = None
        self._last = -1
        self._next = 0
        self._ended = False
        self._ending_at: int | None = None
        self._lost_at: float | None = None
        self._heard = asyncio.Event()
        self._start = time.monotonic()

    @property
    def behind_s(self) -> float:
        """Seconds of video that are due and not decided, skipped or dropped."""
        return time.monotonic() - self._start - self.books.settled / self.fps

    async def run(self, audit: bool = True) -> Books:
        """Stream until `stop`, then to the end of the session; then compare with its log."""
        try:
            await self._until_ended()
            self.books.outcome = "ended early" if self._ending_at is None else "ended"
            if audit:
                await self._audit()
        except Final as error:
            self.books.outcome = "expired" if str(error) == "session_expired" else "refused"
        except TimeoutError:
            self.books.outcome = "hung"
        return self.books

    async def _until_ended(self) -> None:
        """Raises Final, and TimeoutError when nothing has come for long."""
        pause_s, heard_at = 0.05, time.monotonic()
        self._start = heard_at + self._random.uniform(0, 1 / self.fps)
        while not self._ended:
            before = len(self.books.told)
            try:
                async with asyncio.timeout(QUIET_S):
                    socket = await websockets.connect(self._address(self._last - 1), max_size=None, open_timeout=15)
                async with socket:
                    self.books.connections += 1
                    await self._stream(socket)
            except (WebSocketException, OSError, TimeoutError) as error:
                self._note(f"{type(error).__name__}")
            if self._lost_at is None:
                self._lost_at = time.monotonic()
            if len(self.books.told) > before:
                pause_s, heard_at = 0.05, time.monotonic()
            elif time.monotonic() - heard_at > QUIET_S:
                raise TimeoutError
            if not self._ended:
                await asyncio.sleep(pause_s * self._random.uniform(0.5, 1.5))
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _stream(self, socket: websockets.ClientConnection) -> None:
        """One connection, until either side ends it."""
        after = self._last - 1
        created = await self._receive(socket)
        if created["type"] != "session.created":
            return
        session = created["session"]
        assert isinstance(session, dict)
        resumed = self._session_id is not None
        self._session_id = self.books.session_id = str(session["id"])
        if resumed:
            while (event := await self._receive(socket))["type"] != "input_video_buffer.status":
                if event["type"] == "error":
                    return
            self._acknowledge(event)
            self._next = self.books.acknowledged
            if self._lost_at is not None:
                self.books.away.append((self._lost_at, time.monotonic()))
        else:
            await socket.send(json.dumps({"type": "session.update", "session": self._wishes()}))
        self._lost_at = None
        sending = asyncio.create_task(self._send(socket))
        seen: set[str] = set()
        try:
            while not self._ended:
                self._take(await self._receive(socket), after, seen)
                self._heard.set()
        finally:
            await end_all([sending])

    def _wishes(self) -> dict[str, JsonValue]:
        """A random model speaks at every frame or, at the threshold 0, when it is asked only."""
        threshold = 0.5 if self._talks else 0.0
        video: dict[str, JsonValue] = {"fps": self.fps, "drop_policy": "block", "threshold": threshold}
        return {"include": ["frame_decided"], "max_output_tokens": 4 if self._talks else 12, "video": video}

    async def _send(self, socket: websockets.ClientConnection) -> None:
        for question in sorted(self.books.asked - set(self.books.heard)):
            await self._ask(socket, question)
        while True:
            index = self._next
            if self._ending_at is None and self._stop.is_set():
                self._ending_at = max(index, len(self.books.due))
            if self._ending_at is not None and index >= self._ending_at:
                await socket.send(json.dumps({"type": "input_video_buffer.end"}))
                return
            due = self._start + index / self.fps
            self.books.due.setdefault(index, due)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            while index - self.books.settled >= IN_FLIGHT:
                self._heard.clear()
                await self._heard.wait()
            if index % self._ask_every == self._ask_every - 1 and f"q{index}" not in self.books.asked:
                self.books.asked.add(f"q{index}")
                await self._ask(socket, f"q{index}")
            await socket.send(struct.pack(">Bd", 1, index / self.fps) + self._picture)
            self._next = index + 1

    async def _ask(self, socket: websockets.ClientConnection, question: str) -> None:
        part = {"type": "input_text", "text": "What do you see now?"}
        await socket.send(json.dumps({"type": "conversation.item.create", "item": {"id": question, "content": [part]}}))

    async def _receive(self, socket: websockets.ClientConnection) -> Event:
        """The next event. Raises Final for one that says that the session is gone."""
        async with asyncio.timeout(QUIET_S):
            event: Event = json.loads(await socket.recv())
        if event["type"] == "error":
            error = event["error"]
            assert isinstance(error, dict)
            self._note(str(error["code"]))
            if error["code"] == "frame_skipped":
                self.books.skipped.add(round(_float(error["video_time"]) * self.fps))
            if error["code"] in FINAL:
                if self.books.told or self.books.acknowledged:
                    raise Final(error["code"])
                self._session_id, self._next = None, 0  # it died before its first message was taken
        return event

    def _take(self, event: Event, after: int, seen: set[str]) -> None:
        """Enter an event into the books."""
        kind, event_id = event["type"], str(event["event_id"])
        if kind == "input_video_buffer.status":
            self._acknowledge(event)
        if "position" not in event or event["position"] is None:
            return
        position = event["position"]
        assert isinstance(position, int)
        self.books.duplicated += position <= after or event_id in seen
        self.books.disorder += position < self._last and event_id not in self.books.told
        seen.add(event_id)
        first_time = event_id not in self.books.told
        self.books.told[event_id] = position
        self._last = max(self._last, position)
        if not first_time:
            return
        if kind == "frame_decided":
            index = _number(event["seq"])
            self.books.disorder += index in self.books.decided or event["video_time"] != index / self.fps
            self.books.decided[index] = time.monotonic()
        elif kind == "conversation.item.added":
            item = event["item"]
            assert isinstance(item, dict)
            self.books.heard.append(str(item["id"]))
        elif kind == "session.ended":
            self._ended = True
            self._acknowledge(event)  # the last frames: a status comes once a second, and none after this
            if event["reason"] != NORMAL_END:
                self._note(str(event["reason"]))

    def _acknowledge(self, event: Event) -> None:
        frames = event["frames"]
        assert isinstance(frames, dict)
        self.books.dropped = max(self.books.dropped, _number(frames["dropped"]))
        if frames.get("through") is not None:
            self.books.acknowledged = max(self.books.acknowledged, round(_float(frames["through"]) * self.fps) + 1)

    async def _audit(self) -> None:
        """Ask for the whole log once more: what it holds and was never told is missing, and the reverse is wrong."""
        for attempt in range(20):
            try:
                async with asyncio.timeout(QUIET_S), websockets.connect(self._address(-1), max_size=None) as socket:
                    whole: dict[str, int] = {}
                    while (event := json.loads(await socket.recv()))["type"] != "session.ended":
                        if event.get("position") is not None:
                            whole[event["event_id"]] = event["position"]
                    whole[event["event_id"]] = event["position"]
            except (WebSocketException, OSError, TimeoutError):
                await asyncio.sleep(0.1 * (attempt + 1))
                continue
            self.books.missing = len(set(whole) - set(self.books.told))
            self.books.disorder += len(set(self.books.told) - set(whole))
            self.books.disorder += sorted(whole.values()) != list(whole.values())
            return
        self._note("audit impossible")
        self.books.missing += 1

    def _address(self, after: int) -> str:
        query = {} if self._session_id is None else {"session_id": self._session_id, "after": max(-1, after)}
        return f"{self.url.replace('http', 'ws', 1)}/v1/realtime?{urlencode(query)}"

    def _note(self, what: str) -> None:
        if len(self.books.errors) < 200:
            self.books.errors.append(what)


def _number(value: JsonValue) -> int:
    assert isinstance(value, int)
    return value


def _float(value: JsonValue) -> float:
    assert isinstance(value, int | float)
    return float(value)

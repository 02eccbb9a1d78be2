"""The gateway's state: its bus connection, its sessions and their limits, and what it can tell about them.

Knows nothing of Ray and nothing of HTTP, so that tests drive the same object that Serve hosts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.core import Metric
from pydantic import Field

from actors.bus import Bus, BusError
from actors.config import Fit, Section
from actors.messages import SessionSettings
from actors.meters import gauge
from actors.replicas import ReplicaReport, Reporter
from actors.tasks import end_all
from serve.autoscaling import ScalingConfig
from serve.client_events import ClientError
from serve.conversation import Conversation
from serve.counts import Counts
from serve.keys import LOCAL
from serve.limits import LimitsConfig
from serve.metrics import GatewayMeters

log = logging.getLogger(__name__)

WATCH_S = 1.0
PLACES_S = 10.0
FULL = ("sessions_full", "too_many_sessions")

Stats = dict[str, list[dict[str, object]]]


class ServeConfig(Section):
    """Where the application listens, how it is spread over the machine, and how a session's frames wait.

    `num_cpus` of a deployment is what Ray reserves for one replica, not what it may use: threads
    are set by the sections of encoder and engine. `max_live_frames` of a session are undecided at most
    where the newest frame wins, and of such video `live_speed` times its fps is taken; `max_waiting_frames` wait in the
    gateway where none is dropped. With `max_encoders` or `max_llms` their number follows the load (`scaling`), from
    `encoders` and `llms` up. A session that no LLM has taken within `admission_timeout_s` is refused; as long as fewer
    LLMs are there than `max_llms`, it waits for the next one to start, `start_timeout_s` at most.
    `prompt` is asked for a client that wants a response without having asked anything. `record` is a folder
    into which all sessions are recorded.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    gateways: int = Field(default=1, ge=1)
    encoders: int = Field(default=1, ge=1)
    llms: int = Field(default=1, ge=1)
    max_encoders: int | None = Field(default=None, ge=1)
    max_llms: int | None = Field(default=None, ge=1)
    scaling: ScalingConfig = ScalingConfig()
    gateway_cpus: float = Field(default=0.2, ge=0)
    encoder_cpus: float = Field(default=0.6, ge=0)
    llm_cpus: float = Field(default=1.0, ge=0)
    encoder_gpus: float = Field(default=0.0, ge=0)
    llm_gpus: float = Field(default=0.0, ge=0)
    max_waiting_frames: int = Field(default=64, ge=1)
    max_live_frames: int = Field(default=8, ge=1)
    live_speed: float = Field(default=1.25, ge=1)
    admission_timeout_s: float = Field(default=20.0, gt=0)
    start_timeout_s: float = Field(default=120.0, gt=0)
    status_interval_s: float = Field(default=1.0, gt=0)
    prompt: str = Field(default="What do you see now?", min_length=1)
    record: str | None = None
    shutdown_timeout_s: float = Field(default=5.0, ge=0)


class Full(Exception):
    """There is no place for another session; `code` says whose limit it is."""

    def __init__(self, text: str, code: str = "sessions_full") -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Resume:
    """A session that its client wants to go on with, after log position `after`."""

    session_id: str
    after: int | None


class Gateway:
    """All sessions of one gateway replica.

    `defaults` is what a session has until its client says otherwise. `name` is the replica's in its
    reports, `reporter` makes them, and `streams` says which sources it reads (streams.py).
    """

    def __init__(
        self,
        bus: Bus,
        fingerprint: str,
        fit: Fit,
        config: ServeConfig,
        defaults: SessionSettings | None = None,
        limits: LimitsConfig | None = None,
        name: str | None = None,
    ) -> None:
        self.bus = bus
        self.fingerprint = fingerprint
        self.fit = fit
        self.config = config
        self.limits = limits or LimitsConfig()
        self.defaults = defaults or SessionSettings()
        self.totals = Counts()
        self.started = time.monotonic()
        self.created = int(time.time())
        self.meters = GatewayMeters(self._figures)
        self.reporter = Reporter(
            bus, "gateway", name or f"gateway-{bus.name}", fingerprint, self._stats, self.meters.registry
        )
        self.streams: Callable[[], list[dict[str, object]]] = list
        self.closes_in: float | None = None
        self.closing = asyncio.Event()
        self._conversations: set[Conversation] = set()
        self._watching: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def conversation(
        self, bulk: bool = False, client: str = LOCAL, resume: Resume | None = None
    ) -> AsyncIterator[Conversation]:
        """A session of `client` (its name in keys.py) while that is there, a new one unless it resumes one.

        It ends with the block unless it is `resumable`. Raises Full, and BusError where it cannot be resumed.
        """
        if len(self._conversations) >= self.limits.connections:
            raise Full(f"{len(self._conversations)} clients are connected, the most this gateway takes: try later")
        conversation = Conversation(
            self.bus,
            self.fingerprint,
            self.fit,
            self.totals,
            self.defaults,
            self.meters,
            max_waiting=self.config.max_waiting_frames,
            max_live=self.config.max_live_frames,
            live_speed=self.config.live_speed,
            bulk=bulk,
            client=client,
            record=Path(self.config.record) if self.config.record else None,
        )
        if resume is not None:
            await conversation.resume(resume.session_id, resume.after)
        await self._take_place(conversation)
        self._conversations.add(conversation)
        try:
            yield conversation
        finally:
            self._conversations.discard(conversation)
            await asyncio.shield(self._leave(conversation))

    def check_question(self, text: str) -> str:
        """The text itself. Raises ClientError when it is longer than a question may be."""
        if len(text) > self.limits.question_chars:
            raise ClientError(
                "question_too_long",
                f"question of {len(text)} characters, at most {self.limits.question_chars} are allowed",
                "text",
            )
        if not text.strip():
            raise ClientError("bad_value", "question is empty, expected text", "text")
        return text

    async def reports(self) -> list[ReplicaReport]:
        """What all replicas said last, this one right now. Raises BusError."""
        await self.reporter.once()
        return await self.bus.reports()

    async def stats(self) -> Stats:
        """What every replica says of itself, by role. Raises BusError."""
        found: Stats = {"gateways": [], "encoders": [], "llms": []}
        for report in await self.reports():
            # Whose streams are read where, and from what, is their clients' business: GET /v1/streams.
            stats = {name: value for name, value in report.stats.items() if name != "streams"}
            told: dict[str, object] = {"name": report.name, "pid": report.pid, "at": report.at, **stats}
            found[f"{report.role}s"].append(told)
        return found

    def _stats(self) -> dict[str, object]:
        return {
            "sessions": len(self._conversations),
            # Nobody is connected for what the server reads itself.
            "connections": len(self._conversations) - sum(one["status"] == "running" for one in self.streams()),
            "uptime_s": round(time.monotonic() - self.started, 1),
            "frames": self.totals.statistics().model_dump(),
            "streams": self.streams(),
            "draining": self.closes_in is not None,
        }

    def _figures(self) -> list[Metric]:
        behind = [conversation.behind for conversation in self._conversations]
        lag_s = max((conversation.lag_s for conversation in self._conversations), default=0.0)
        return [
            gauge("sessions", "Sessions that a gateway shows or an LLM replica holds", len(behind)),
            gauge("frames_behind_live", "Frames that came and are not decided, of all sessions", sum(behind)),
            gauge("frames_behind_live_max", "The same of the session that is furthest behind", max(behind, default=0)),
            gauge("lag_seconds_max", "Age of the oldest frame of live video that is not decided", lag_s),
        ]

    async def draining_connections(self) -> int:
        """Sessions that gateways still show which were told to let their clients go, as they reported last."""
        gateways = [report.stats for report in await self.reports() if report.role == "gateway"]
        draining = [stats for stats in gateways if stats.get("draining") is not False]
        return sum(int(str(stats.get("connections", stats["sessions"]))) for stats in draining)

    async def free_place(self, conversation: Conversation) -> None:
        """The session is over, or was never begun."""
        await self.bus.free_place(conversation.client, conversation.id)

    async def start(self) -> None:
        """Begin to look after sessions. A drain that was announced before concerns other gateways."""
        self._watching = asyncio.create_task(self._watch(await self.bus.clock_ms()))

    async def close(self) -> None:
        """Stop looking after sessions."""
        if self._watching is not None:
            await end_all([self._watching])

    async def _watch(self, since_ms: int) -> None:
        """See now and then who has connected elsewhere and whether this gateway shall let its clients go."""
        next_places = time.monotonic() + PLACES_S
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                self.closes_in = await self.bus.draining(since_ms)
                for conversation in list(self._conversations):
                    await conversation.check()
                    if time.monotonic() >= next_places:
                        await self._take_place(conversation)
                if time.monotonic() >= next_places:
                    next_places = time.monotonic() + PLACES_S
            except (BusError, Full) as error:
                log.warning("sessions not looked after: %s", error)
            if self.closes_in is None:
                self.closing.clear()
            else:
                self.closing.set()

    async def _take_place(self, conversation: Conversation) -> None:
        """Count a session, for longer than its client may stay away. Raises Full."""
        limits, keep_s = self.limits, self.bus.config.resume_s + 2 * PLACES_S
        try:
            await self.bus.take_place(
                conversation.client, conversation.id, limits.sessions_per_key, limits.sessions, keep_s
            )
        except BusError as error:
            if error.code in FULL:
                raise Full(str(error), error.code) from None
            raise

    async def _leave(self, conversation: Conversation) -> None:
        try:
            if conversation.resumable and not conversation.ended:
                await conversation.note_counts()
                return
            await conversation.leave()
            if not conversation.taken.is_set():
                await self.free_place(conversation)
        except Exception:
            log.exception("session=%s could not be ended; it expires by itself", conversation.id)

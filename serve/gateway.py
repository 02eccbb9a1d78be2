"""The gateway's state: its bus connection, its sessions and their limits, and what it can tell about them.

Knows nothing of Ray and nothing of HTTP, so that tests drive the same object that Serve hosts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from pydantic import Field

from actors.bus import Bus
from actors.config import Section
from actors.messages import SessionSettings
from serve.client_events import ClientError
from serve.conversation import Conversation, Counts
from serve.keys import LOCAL
from serve.limits import LimitsConfig

log = logging.getLogger(__name__)

WorkerStats = Callable[[], Awaitable[dict[str, object]]]


class ServeConfig(Section):
    """Where the application listens, how it is spread over the machine, and how a session's frames wait.

    `num_cpus` of a deployment is what Ray reserves for one replica, not what it may use: threads
    are set by the sections of encoder and engine. `max_live_frames` of a session are undecided at most
    where the newest frame wins, `max_waiting_frames` wait in the gateway where none is dropped.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    gateways: int = Field(default=1, ge=1)
    encoders: int = Field(default=1, ge=1)
    llms: int = Field(default=1, ge=1)
    gateway_cpus: float = Field(default=0.2, ge=0)
    encoder_cpus: float = Field(default=0.6, ge=0)
    llm_cpus: float = Field(default=1.0, ge=0)
    encoder_gpus: float = Field(default=0.0, ge=0)
    llm_gpus: float = Field(default=0.0, ge=0)
    max_waiting_frames: int = Field(default=64, ge=1)
    max_live_frames: int = Field(default=8, ge=1)
    admission_timeout_s: float = Field(default=20.0, gt=0)
    status_interval_s: float = Field(default=1.0, gt=0)
    shutdown_timeout_s: float = Field(default=5.0, ge=0)


class Full(Exception):
    """The gateway holds as many sessions as it may."""


class Gateway:
    """All sessions of one gateway replica.

    `defaults` is what a session has until its client says otherwise. `workers` are named calls that
    return a worker's statistics.
    """

    def __init__(
        self,
        bus: Bus,
        fingerprint: str,
        config: ServeConfig,
        defaults: SessionSettings | None = None,
        workers: dict[str, WorkerStats] | None = None,
        limits: LimitsConfig | None = None,
    ) -> None:
        self.bus = bus
        self.fingerprint = fingerprint
        self.config = config
        self.limits = limits or LimitsConfig()
        self.defaults = defaults or SessionSettings()
        self.totals = Counts()
        self.started = time.monotonic()
        self._workers = workers or {}
        self._conversations: set[Conversation] = set()

    @asynccontextmanager
    async def conversation(self, bulk: bool = False, client: str = LOCAL) -> AsyncIterator[Conversation]:
        """A session of `client` (its name in keys.py) while that is there; it ends with the block. Raises Full."""
        if len(self._conversations) >= self.limits.sessions:
            raise Full(f"{len(self._conversations)} sessions are open, the most this gateway takes: try later")
        conversation = Conversation(
            self.bus,
            self.fingerprint,
            self.totals,
            self.defaults,
            max_waiting=self.config.max_waiting_frames,
            max_live=self.config.max_live_frames,
            bulk=bulk,
        )
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

    async def stats(self, timeline: bool = False) -> dict[str, dict[str, object]]:
        """Counts of this gateway and what each worker says of itself, an error text where it does not answer.

        With `timeline` the workers' memory of their latest work is in it, some thousand entries.
        """
        names = list(self._workers)
        answers = await asyncio.gather(*(self._ask(self._workers[name]) for name in names))
        if not timeline:
            answers = [{key: value for key, value in answer.items() if key != "timeline"} for answer in answers]
        gateway: dict[str, object] = {
            "pid": os.getpid(),
            "sessions": len(self._conversations),
            "uptime_s": round(time.monotonic() - self.started, 1),
            "frames": self.totals.statistics().model_dump(),
        }
        return {"gateway": gateway, **dict(zip(names, answers, strict=True))}

    @staticmethod
    async def _ask(worker: WorkerStats) -> dict[str, object]:
        try:
            async with asyncio.timeout(5):
                return await worker()
        except Exception as error:  # statistics are for people: one dead worker must not hide the others
            log.warning("no statistics from a worker: %s", error)
            return {"error": f"{type(error).__name__}: {error}"}

    @staticmethod
    async def _leave(conversation: Conversation) -> None:
        try:
            await conversation.leave()
        except Exception:
            log.exception("session=%s could not be ended; it expires by itself", conversation.id)

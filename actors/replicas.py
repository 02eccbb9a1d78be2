"""Who works on a bus: every replica reports about once a second what it is and what it has measured.

Reports expire, so a replica that died is soon missing from them: they are what tells a gateway that an
encoder or an LLM is there, and what makes the statistics and metrics of all replicas readable at any
gateway. The latest steps of encoders and LLMs go into one bounded list beside them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from prometheus_client import CollectorRegistry, generate_latest
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from actors.session_log import BusError, LogConnection
from actors.tasks import end_all

log = logging.getLogger(__name__)

REPORT_S = 1.0
EXPIRES_S = 5.0
MOST_REPLICAS = 256
STEPS_KEPT = 8192

Role = Literal["gateway", "encoder", "llm"]
Stats = dict[str, object]


class ReplicaReport(BaseModel):
    """One replica: `stats` is for people, `metrics` Prometheus text, `model` the fingerprint of what it runs."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    role: Role
    name: str
    pid: int
    at: float
    model: str
    stats: dict[str, JsonValue]
    metrics: str


@dataclass(frozen=True)
class LLMLoad:
    """What an LLM replica reports of its sessions: how many it holds, how many more it would take."""

    name: str
    sessions: int
    room: int
    waiting_frames: int


def least_loaded(name: str, model: str, reports: Sequence[ReplicaReport]) -> LLMLoad | None:
    """The LLM replica besides `name` with the fewest sessions of those that have room and keep up, if any has."""
    others = [report for report in reports if (report.role, report.model) == ("llm", model) and report.name != name]
    loads = filter(None, map(_llm_load, others))
    able = [load for load in loads if load.room > 0 and load.waiting_frames <= load.sessions]
    return min(able, key=lambda load: load.sessions, default=None)


def _llm_load(report: ReplicaReport) -> LLMLoad | None:
    """None of one that does not say it: another version, while replicas are replaced."""
    counts = [report.stats.get(key) for key in ("sessions", "room", "waiting_frames")]
    return LLMLoad(report.name, *cast(list[int], counts)) if all(isinstance(count, int) for count in counts) else None


class ReplicaSide(LogConnection):
    """What any replica says of itself, and what any may read."""

    async def report(self, report: ReplicaReport, steps: Sequence[Sequence[object]] = ()) -> None:
        """Leave a report, and the steps since the last one, for as long as reports count."""
        told = [json.dumps([report.role, *step]) for step in steps]
        await self.script(
            "REPORT",
            self.keys.replicas,
            [report.name, report.model_dump_json(), int(EXPIRES_S * 1000), MOST_REPLICAS, STEPS_KEPT, *told],
        )

    async def retire(self, name: str) -> None:
        """Take a report back: its replica ends."""
        await self.script("RETIRE", self.keys.replicas, [name])

    async def reports(self) -> list[ReplicaReport]:
        """Of all replicas that are there, in order of role and name."""
        answer = await self.script("REPORTS", self.keys.replicas, [MOST_REPLICAS])
        assert isinstance(answer, list)
        found = []
        for raw in answer:
            try:
                found.append(ReplicaReport.model_validate_json(raw))
            except ValidationError as error:
                log.warning("a report of another version was left out: %s", error.errors()[0]["msg"])
        return sorted(found, key=lambda report: (report.role, report.name))

    async def steps(self) -> dict[str, list[list[object]]]:
        """The latest steps of all replicas by role, oldest first."""
        answer = await self.script("STEPS", self.keys.replicas, [])
        assert isinstance(answer, list)
        found: dict[str, list[list[object]]] = defaultdict(list)
        for raw in answer:
            role, *step = json.loads(raw)
            found[role].append(step)
        return dict(found)


class Reporter:
    """Reports for one replica while it runs."""

    def __init__(
        self,
        connection: ReplicaSide,
        role: Role,
        name: str,
        model: str,
        stats: Callable[[], Stats],
        registry: CollectorRegistry,
    ) -> None:
        self._connection = connection
        self._role = role
        self._name = name
        self._model = model
        self._stats = stats
        self._registry = registry
        self._told = 0.0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Report from the beginning of the block to its end; then the replica is gone."""
        task = asyncio.create_task(self._forever())
        try:
            yield
        finally:
            await end_all([task])
            with contextlib.suppress(BusError, TimeoutError):
                async with asyncio.timeout(REPORT_S):
                    await self._connection.retire(self._name)

    async def once(self) -> None:
        """Raises BusError."""
        stats = self._stats()
        timeline = stats.pop("timeline", [])
        assert isinstance(timeline, list)
        steps = [step for step in timeline if step[-2] > self._told]
        metrics = generate_latest(self._registry).decode()
        report = ReplicaReport(
            role=self._role,
            name=self._name,
            pid=os.getpid(),
            at=time.time(),
            model=self._model,
            stats=stats,
            metrics=metrics,
        )
        await self._connection.report(report, steps)
        self._told = max([self._told, *(step[-2] for step in steps)])

    async def _forever(self) -> None:
        while True:
            try:
                await self.once()
            except BusError as error:
                log.warning("replica=%s not reported: %s", self._name, error)
            await asyncio.sleep(REPORT_S)

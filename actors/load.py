"""How much work waits on a bus: what tells whether more replicas are needed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from actors.session_log import LogConnection


@dataclass(frozen=True)
class Load:
    """`waiting_sessions` are held by nobody; `oldest_frame_s` is the age of the oldest frame that is not encoded."""

    waiting_sessions: int
    oldest_frame_s: float


async def measure(connection: LogConnection) -> Load:
    """The load of all partitions. Raises BusError."""
    keys = connection.keys
    answers = await asyncio.gather(
        *(
            connection.script("LOAD", [keys.leases(p), keys.frames(p), keys.frames(p, bulk=True)], [])
            for p in range(connection.config.partitions)
        )
    )
    found: list[tuple[int, int]] = []
    for answer in answers:
        assert isinstance(answer, list)
        found.append((answer[0], answer[1]))
    return Load(sum(waiting for waiting, _ in found), max(age_ms for _, age_ms in found) / 1000)

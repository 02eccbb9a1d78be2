"""Frames by what became of them, of one session or of a whole gateway, and how long decisions took."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from serve.server_events import Statistics

LAGS_KEPT = 4096

Outcome = Literal["received", "admitted", "decided", "skipped"]


@dataclass
class Counts:
    """`dropped` is by reason. `lags` are those of the latest decisions, from a frame's arrival on, in seconds."""

    received: int = 0
    admitted: int = 0
    decided: int = 0
    skipped: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    lags: deque[float] = field(default_factory=lambda: deque(maxlen=LAGS_KEPT))

    def add(self, outcome: Outcome) -> None:
        setattr(self, outcome, getattr(self, outcome) + 1)

    def statistics(self, waiting: int = 0, through: float | None = None) -> Statistics:
        """As clients are told; frames that wait in this gateway's memory do not count as received."""
        return Statistics(
            received=self.received - waiting,
            admitted=self.admitted,
            waiting=waiting,
            decided=self.decided,
            skipped=self.skipped,
            dropped=self.dropped.total(),
            dropped_by=dict(sorted(self.dropped.items())),
            through=through,
            lag_p50=percentile(self.lags, 0.50),
            lag_p99=percentile(self.lags, 0.99),
        )


class NotedCounts(BaseModel):
    """What a gateway keeps in Redis of a session's counts, for the gateway where its client comes back.

    `through`: every frame up to that video time is admitted or counted as dropped. `decided` and `skipped`
    frames are those of the log up to `position`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    dropped: dict[str, int] = {}
    through: float = -1.0
    decided: int = Field(default=0, ge=0)
    skipped: int = Field(default=0, ge=0)
    position: int = Field(default=-1, ge=-1)


def percentile(values: Iterable[float], share: float) -> float | None:
    """Smallest value that at least `share` of all values do not exceed; None without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None

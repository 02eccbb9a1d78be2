"""How many encoder and LLM replicas there should be: Serve's custom policies, by what clients notice.

Replicas record what they see once a second; a policy is a plain function of these figures. Serve keeps
within the bounds and waits out the delays of the settings. An LLM replica that is taken away releases
its leases, and the others rebuild its sessions from their logs (deployments.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from pydantic import Field

from actors.config import Section

Figures = Mapping[str, Mapping[object, float]]


class ScalingConfig(Section):
    """Bounds are those of `serve`; this is when replicas are added and taken away.

    `busy` and `calm` are shares in use of KV memory or of places for sessions, whichever is scarcer; a replica takes
    a while to start, so the last free place is `busy` already where each has several. `late_s` and `early_s` are
    ages of the oldest frame that waits for an encoder; `behind` the encoded frames per session that wait for a
    decision.
    """

    upscale_delay_s: float = Field(default=2.0, ge=0)
    downscale_delay_s: float = Field(default=60.0, ge=0)
    busy: float = Field(default=0.85, gt=0, le=1)
    calm: float = Field(default=0.5, ge=0, lt=1)
    late_s: float = Field(default=0.5, gt=0)
    early_s: float = Field(default=0.1, ge=0)
    behind: float = Field(default=4.0, gt=0)


class Context(Protocol):
    """What is used of Serve's AutoscalingContext."""

    @property
    def current_num_replicas(self) -> int: ...

    @property
    def target_num_replicas(self) -> int: ...

    @property
    def aggregated_metrics(self) -> Figures | None: ...


class EncoderPolicy:
    """One more when frames wait too long for an encoder, one less when hardly any waits and each is idle enough."""

    def __init__(self, **settings: float) -> None:
        self.config = ScalingConfig.model_validate(settings)

    def __call__(self, context: Context) -> tuple[int, dict[str, object]]:
        figures = context.aggregated_metrics or {}
        now = context.current_num_replicas
        if not figures.get("oldest_frame_s"):
            return context.target_num_replicas, {}
        age_s, busy = max(figures["oldest_frame_s"].values()), mean(figures.get("busy", {}))
        if age_s > self.config.late_s:
            return now + 1, {}
        if age_s < self.config.early_s and now > 1 and busy * now / (now - 1) < self.config.calm:
            return now - 1, {}
        return now, {}


class LLMPolicy:
    """As many more as waiting sessions need, one more when decisions fall behind, one less when the rest has room."""

    def __init__(self, **settings: float) -> None:
        self.config = ScalingConfig.model_validate(settings)

    def __call__(self, context: Context) -> tuple[int, dict[str, object]]:
        figures = context.aggregated_metrics or {}
        now = context.current_num_replicas
        if not figures.get("kv_use"):
            return context.target_num_replicas, {}
        sessions, behind = total(figures.get("sessions", {})), total(figures.get("waiting_frames", {}))
        waiting = max(figures.get("waiting_sessions", {}).values(), default=0.0)
        room = total(figures.get("room", {}))
        memory, places = mean(figures["kv_use"]), sessions + room
        if waiting > room:
            each = max(1.0, places / now)
            return now + math.ceil((waiting - room) / each), {}
        if self._busy(memory, sessions, places, now) or (sessions and behind / sessions > self.config.behind):
            return now + 1, {}
        if now > 1 and not waiting:
            rest = (now - 1) / now
            used = max(memory, sessions / max(1.0, places)) / rest
            if used < self.config.calm and not self._busy(memory / rest, sessions, places * rest, now - 1):
                return now - 1, {}
        return now, {}

    def _busy(self, memory: float, sessions: float, places: float, replicas: int) -> bool:
        """Whether memory or places are scarce; the next session's replica has to start before that comes."""
        last = sessions > 1 and places - sessions <= min(1.0, places / replicas - 1)
        return last or max(memory, sessions / max(1.0, places)) > self.config.busy


def mean(values: Mapping[object, float]) -> float:
    return total(values) / len(values) if values else 0.0


def total(values: Mapping[object, float]) -> float:
    return float(sum(values.values()))

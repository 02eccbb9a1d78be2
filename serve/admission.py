"""How long a new session waits for an LLM replica to take it, and when it is refused.

Where all replicas are there and none has room, more waiting seldom helps, and a client should hear of it soon.
Where there may be more of them (`serve.max_llms`), the session itself is why the policy of autoscaling.py
starts one, which takes as long as loading the model does: it waits for that, within a bound of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time

from actors.bus import BusError
from serve.conversation import Conversation
from serve.gateway import Gateway

log = logging.getLogger(__name__)

POLL_S = 0.1
LOOK_S = 1.0  # between two looks at who reports: reports come as often


class NoCapacity(Exception):
    """No LLM replica took the session in time."""


async def admitted(conversation: Conversation, gateway: Gateway) -> None:
    """Return once an LLM replica holds the session, or it has ended.

    Raises NoCapacity when none did within `admission_timeout_s` after the last moment at which a replica was
    still to come, or within `start_timeout_s` in all.
    """
    config = gateway.config
    opened = looked = time.monotonic()
    refused_at = opened + config.admission_timeout_s
    while not await conversation.placed():
        now = time.monotonic()
        if now >= min(looked + LOOK_S, refused_at):
            looked = now
            if await _more_to_come(gateway):
                refused_at = max(refused_at, min(now + config.admission_timeout_s, opened + config.start_timeout_s))
        if now >= refused_at:
            raise NoCapacity(
                f"no model replica took the session within {now - opened:.3g} s: all are full or down, try later"
            )
        await asyncio.sleep(POLL_S)


async def _more_to_come(gateway: Gateway) -> bool:
    """Whether fewer LLM replicas report than the load may have."""
    most = gateway.config.max_llms
    if most is None:
        return False
    try:
        reports = await gateway.bus.reports()
    except BusError as error:
        log.warning("replicas not counted: %s", error)
        return False
    llms = [report for report in reports if report.role == "llm" and report.model == gateway.fingerprint]
    return len(llms) < max(gateway.config.llms, most)

"""How long a new session waits for an LLM replica to take it, and when it is refused.

Where all replicas are there and none has room, more waiting seldom helps, and a client should hear of it soon.
Where there may be more of them (`serve.max_llms`), the session itself is why the policy of autoscaling.py
starts one, which takes as long as loading the model does: it waits for that, within a bound of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from actors.bus import BusError
from serve.conversation import Conversation
from serve.gateway import Gateway

log = logging.getLogger(__name__)

POLL_S = 0.1
LOOK_S = 1.0  # between two looks at who reports: reports come as often


class NoCapacity(Exception):
    """No LLM replica took the session in time."""


async def owned(conversation: Conversation, gateway: Gateway, waits: Callable[[bool], None] = lambda _: None) -> None:
    """See to it that an LLM replica holds the session until it ends. `waits` is told whenever none does, and no more.

    Raises NoCapacity as `admitted` does, and when a replica that held it is gone and for `start_timeout_s`, which
    another takes to start at most, none was there in its place.
    """
    config = gateway.config
    waits(config.max_llms is not None)
    await admitted(conversation, gateway)
    waits(False)
    while not conversation.ended:
        await asyncio.sleep(config.admission_timeout_s)
        if not await conversation.placed():
            waits(True)
            await admitted(conversation, gateway, config.start_timeout_s)
            waits(False)


async def admitted(conversation: Conversation, gateway: Gateway, within_s: float | None = None) -> None:
    """Return once an LLM replica holds the session, or it has ended.

    Raises NoCapacity when none did within `within_s` (None: `admission_timeout_s`) after the last moment at which a
    replica was still to come, or within `start_timeout_s` in all.
    """
    config = gateway.config
    within_s = config.admission_timeout_s if within_s is None else within_s
    opened = looked = time.monotonic()
    refused_at = opened + within_s
    while not await conversation.placed():
        now = time.monotonic()
        if now >= min(looked + LOOK_S, refused_at):
            looked = now
            if await _more_to_come(gateway):
                refused_at = max(refused_at, min(now + within_s, opened + config.start_timeout_s))
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

"""Who a session belongs to and who is connected to it, and how many sessions each client has.

A session is attached to one connection at a time: the newest. Each attachment has a number, and what
an older one still sends is refused, so a client that comes back at another gateway takes its session
over whole. Places bound live sessions over all gateways; one that nobody renews is free after a while.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Literal

from actors.messages import LogEntry
from actors.session_log import (
    BusError,
    LogConnection,
    SessionMeta,
    check_session_id,
    log_entry,
    position_of,
    session_expired,
)

ALL = "all"


class ClientSide(LogConnection):
    """What gateways do about clients apart from passing on what they say."""

    async def session_meta(self, session_id: str) -> SessionMeta | None:
        """What Redis knows of the session, None when it does not exist (any more)."""
        check_session_id(session_id)
        partition = self.partition(session_id)
        keys = [self.keys.meta(partition, session_id), self.keys.leases(partition)]
        answer = await self.script("META", keys, [session_id])
        if not isinstance(answer, list):
            return None
        flat, held, idle_ms = answer
        fields: Mapping[bytes, bytes] = dict(zip(flat[::2], flat[1::2], strict=True))
        return SessionMeta.from_redis(session_id, fields, bool(held), int(idle_ms))

    async def attach(self, session_id: str, client: str) -> SessionMeta:
        """Connect to a session that is there; whoever was connected is not any more.

        Raises BusError `session_expired`, also for a session of another client: who has no right to it
        does not hear that it exists.
        """
        check_session_id(session_id)
        args: list[str | int] = [client, secrets.token_hex(8), self.config.session_ttl_ms]
        number = await self.script("ATTACH", self.session_keys(session_id), args)
        meta = await self.session_meta(session_id) if isinstance(number, int) and number > 0 else None
        if meta is None:
            raise session_expired(session_id)
        return meta

    async def note(self, session_id: str, connection: int, field: Literal["preferences", "counts"], text: str) -> bool:
        """Keep for the next gateway what this one knows of its client. False when another connection is attached."""
        args: list[str | int] = [connection, field, text, self.config.session_ttl_ms]
        return await self.script("NOTE", self.session_keys(session_id), args) == 1

    async def entries(self, session_id: str, first: int, count: int) -> list[tuple[int, LogEntry]]:
        """Up to `count` log entries from position `first` on, with positions."""
        stream = self.keys.output(self.partition(session_id), session_id)
        page = await self.read_range(stream, f"{first + 1}-0", count)
        return [(position_of(entry_id), log_entry(session_id, entry_id, fields)) for entry_id, fields in page]

    async def take_place(self, client: str, session_id: str, per_client: int, in_all: int, keep_s: float) -> None:
        """Count a session of a client for `keep_s`; to be repeated before those are over.

        Raises BusError `too_many_sessions` when the client has as many, `sessions_full` when all have.
        """
        if not await self._place(client, session_id, per_client, keep_s):
            text = f"{per_client} sessions of this key are open, the most it may have: end one, or wait"
            raise BusError("too_many_sessions", text)
        if not await self._place(ALL, session_id, in_all, keep_s):
            await self.script("UNPLACE", [self.keys.places(client)], [session_id])
            raise BusError("sessions_full", f"{in_all} sessions are open, the most this server takes: try later")

    async def free_place(self, client: str, session_id: str) -> None:
        """The session is over."""
        for name in (client, ALL):
            await self.script("UNPLACE", [self.keys.places(name)], [session_id])

    async def drain(self, notice_s: float) -> None:
        """Tell all gateways that run now to let their clients go within `notice_s`; later ones do not listen."""
        await self.script("DRAIN", [self.keys.bus], [int(notice_s * 1000)])

    async def stop_draining(self) -> None:
        await self.script("DRAIN", [self.keys.bus], [-1])

    async def draining(self, since_ms: int) -> float | None:
        """Seconds until a gateway that runs since then (`clock_ms`) closes its connections; None when it does not."""
        answer = await self.script("DRAINING", [self.keys.bus], [since_ms])
        return answer / 1000 if isinstance(answer, int) else None

    async def clock_ms(self) -> int:
        """The time by which drains are told, in milliseconds."""
        answer = await self.script("NOW", [self.keys.bus], [])
        assert isinstance(answer, int)
        return answer

    async def _place(self, name: str, session_id: str, most: int, keep_s: float) -> bool:
        return await self.script("PLACE", [self.keys.places(name)], [session_id, most, int(keep_s * 1000)]) == 1

"""The LLM replicas' side of the session log: hold leases, read input, append to the log while the epoch lasts."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, cast

from actors.messages import InputRefused, LogEntry, MessageError, QueryConsumed, SessionInput, encode
from actors.session_log import (
    BusConfig,
    BusError,
    Lease,
    LogConnection,
    checked,
    log_entry,
    position_of,
)
from actors.tasks import end_all

log = logging.getLogger(__name__)

PAGE = 256
READ_COUNT = 64


class OwnerSide(LogConnection):
    """What an LLM replica does for the sessions it owns."""

    def __init__(self, config: BusConfig) -> None:
        super().__init__(config)
        self._wake_ids = dict.fromkeys(range(config.partitions), "0-0")
        self._renewals: dict[int, asyncio.Task[list[Lease]]] = {}

    async def claim(self, owner: str, fingerprint: str, partition: int, limit: int) -> list[Lease]:
        """Leases on up to `limit` sessions of that model fingerprint that nobody holds (any more)."""
        claimed: list[Lease] = []
        leases, offset = self.keys.leases(partition), 0
        while len(claimed) < limit:
            page = await self.script("EXPIRED", [leases], [offset, PAGE])
            assert isinstance(page, list)
            for session_id in [member.decode() for member in page]:
                if len(claimed) == limit:
                    break
                args = [session_id, secrets.token_hex(8), owner, fingerprint, self.config.lease_ms]
                epoch = await self.script("CLAIM", [self.keys.meta(partition, session_id), leases], args)
                if isinstance(epoch, int) and epoch > 0:
                    claimed.append(Lease(session_id, epoch))
                offset += epoch == 0  # the others are no longer among the expired
            if len(page) < PAGE:
                break
        return claimed

    async def renew(self, leases: Sequence[Lease]) -> list[Lease]:
        """Prolong leases; returns those that are lost, whose sessions this replica must drop.

        A partition whose server is away does not hold up the others': what becomes of its leases is
        told by a later call. Raises BusError when no partition answers.
        """
        by_partition: dict[int, list[Lease]] = defaultdict(list)
        for lease in leases:
            by_partition[self.partition(lease.session_id)].append(lease)
        for partition, held in by_partition.items():
            if partition not in self._renewals:
                self._renewals[partition] = asyncio.create_task(self._renew(partition, held))
        if not self._renewals:
            return []
        _, slow = await asyncio.wait(self._renewals.values(), return_when=asyncio.FIRST_COMPLETED)
        if slow:
            await asyncio.wait(slow, timeout=self.config.renew_ms / 1000)
        return self._renewed()

    async def close_renewals(self) -> None:
        """End the renewals that still wait for their server."""
        await end_all(self._renewals.values())

    def _renewed(self) -> list[Lease]:
        """Leases that the renewals that have ended found lost."""
        ended = {partition: task for partition, task in self._renewals.items() if task.done()}
        for partition in ended:
            del self._renewals[partition]
        failed = [error for task in ended.values() if (error := task.exception()) is not None]
        if failed and len(failed) == len(ended):
            raise failed[0]
        for error in failed:
            log.warning("leases of one partition are not renewed: %s", error)
        return [lease for task in ended.values() if task.exception() is None for lease in task.result()]

    async def release(self, lease: Lease, heir: str = "") -> bool:
        """Give a lease back so that another replica takes the session at once. False when it was lost.

        For the length of a lease nobody but `heir`, the name of a replica, may take it; after that, anybody may.
        """
        partition = self.partition(lease.session_id)
        keys = [self.keys.meta(partition, lease.session_id), self.keys.leases(partition), self.keys.wake(partition)]
        return await self.script("RELEASE", keys, [lease.session_id, lease.epoch, heir, self.config.lease_ms]) == 1

    async def append(
        self, lease: Lease, position: int, entries: Sequence[LogEntry], decided: int
    ) -> Literal["ok", "duplicate", "stale"]:
        """Write entries at `position` and following; `decided` is the next undecided seq.

        `duplicate`: they are there already (a repeated call). `stale`: the lease was lost, or the log
        is not where its owner thinks; nothing was written and the session must be dropped.
        """
        consumed = sum(
            isinstance(entry, QueryConsumed) or (isinstance(entry, InputRefused) and entry.query_id is not None)
            for entry in entries
        )
        answer = await self.script(
            "APPEND",
            self.session_keys(lease.session_id),
            [lease.epoch, position, decided, consumed, self.config.resume_ms, self.config.session_ttl_ms]
            + [encode(entry) for entry in entries],
        )
        match answer:
            case [b"ok", _]:
                return "ok"
            case [b"duplicate", _]:
                return "duplicate"
            case [b"stale", int(there)]:
                log.warning(
                    "session=%s epoch=%d append at %d refused, log at %d",
                    lease.session_id,
                    lease.epoch,
                    position,
                    there,
                )
                return "stale"
        raise BusError("redis_error", f"append answered {answer!r:.80}")

    async def read_log(self, session_id: str) -> list[tuple[int, LogEntry]]:
        """All of the log that is still there, with positions: what a new owner rebuilds the context from."""
        partition = self.partition(session_id)
        stream, first = self.keys.output(partition, session_id), "-"
        found: list[tuple[int, LogEntry]] = []
        while True:
            page = await self.read_range(stream, first, PAGE)
            found += [(position_of(entry_id), log_entry(session_id, entry_id, fields)) for entry_id, fields in page]
            if len(page) < PAGE:
                return found
            first = f"{found[-1][0] + 2}-0"

    async def read_inputs(
        self, session_cursors: Mapping[str, str], block_ms: int, partition: int
    ) -> list[tuple[str, str, SessionInput | MessageError]]:
        """Input behind each session's cursor as (session id, entry id, message), all of one partition.

        Returns early and perhaps empty when the partition may have gained a session. The cursor "0-0"
        reads all that is left. Input that cannot be understood comes as the MessageError that says why.
        """
        streams = {self.keys.input(partition, session_id): session_id for session_id in session_cursors}
        wake = self.keys.wake(partition)
        after = {stream: session_cursors[session_id] for stream, session_id in streams.items()}
        replies = await self.read({wake: self._wake_ids[partition], **after}, READ_COUNT, block_ms)
        if woken := replies.pop(wake, None):
            self._wake_ids[partition] = woken[-1][0]
        return [
            (streams[stream], entry_id, _session_input(fields))
            for stream, entries in replies.items()
            for entry_id, fields in entries
        ]

    async def read_all_inputs(
        self, session_id: str, first: str = "0-0"
    ) -> list[tuple[str, SessionInput | MessageError]]:
        """All input of one session from entry id `first` on, in the order it came: what a new owner starts from."""
        stream = self.keys.input(self.partition(session_id), session_id)
        found: list[tuple[str, SessionInput | MessageError]] = []
        while True:
            page = await self.read_range(stream, first, PAGE)
            found += [(entry_id, _session_input(fields)) for entry_id, fields in page]
            if len(page) < PAGE:
                return found
            first = f"({found[-1][0]}"

    async def trim(self, lease: Lease, window: bytes, in_id: str, out_position: int) -> bool:
        """Drop input before `in_id` and the log before `out_position`; `window` is kept for a new owner.

        What a client may still ask for when it resumes stays in the log. False when the lease was lost.
        """
        answer = await self.script(
            "TRIM",
            self.session_keys(lease.session_id),
            [lease.epoch, window, in_id, out_position, self.config.resume_ms, self.config.session_ttl_ms],
        )
        return answer == 1

    async def end_session(self, lease: Lease) -> bool:
        """Close the session after its last log entry; clients may read the end for `resume_s`."""
        keys = [*self.session_keys(lease.session_id), self.keys.leases(self.partition(lease.session_id))]
        return await self.script("END", keys, [lease.session_id, lease.epoch, self.config.resume_ms]) == 1

    async def _renew(self, partition: int, leases: Sequence[Lease]) -> list[Lease]:
        keys = [self.keys.leases(partition), *(self.keys.meta(partition, lease.session_id) for lease in leases)]
        pairs: list[str | int] = [value for lease in leases for value in (lease.session_id, lease.epoch)]
        answer = await self.script("RENEW", keys, [self.config.lease_ms, *pairs])
        assert isinstance(answer, list)
        return [lease for lease, renewed in zip(leases, answer, strict=True) if renewed != 1]


def _session_input(fields: Mapping[bytes, bytes]) -> SessionInput | MessageError:
    try:
        return cast(SessionInput, checked(fields.get(b"m", b""), SessionInput.__args__))
    except MessageError as error:
        return error

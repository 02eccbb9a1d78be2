"""The ownership protocol as a state machine: the real scripts, a clock moved by hand, owners that interleave.

Replicas open, claim, renew, append, trim, release and end in any order, asleep for any time between two calls, and
at the same moment as each other. Beside them runs a model of what must hold. Seeds are fixed.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import TypeVar

import hypothesis.strategies as st
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.asyncio import Redis

from actors import scripts
from actors.bus import Bus, BusConfig, Lease
from actors.messages import FrameSkipped, LogEntry, SessionEnded, SessionSettings

T = TypeVar("T")

HAND_CLOCK = "local function now() return tonumber(redis.call('GET', 'hand-clock')) end"
LEASE_MS, RESUME_S, CREDITS = 1000, 20, 4
REPLICAS = range(3)
SESSIONS = ("a", "b", "c")
replicas = st.sampled_from(REPLICAS)


@dataclass
class Expected:
    """What a session must look like: `written` holds who wrote each entry, as (replica, epoch)."""

    epoch: int = 0
    deadline: int = 0
    heir: int = 0
    offered_until: int = 0
    ended: bool = False
    written: list[tuple[int, int]] = field(default_factory=list)
    first: int = 0
    admitted: int = 0
    decided: int = 0


def entries(replica: int, lease: Lease, count: int) -> list[LogEntry]:
    """Entries that name their writer."""
    return [FrameSkipped(seq=lease.epoch, time=float(replica), reason="written") for _ in range(count)]


class Ownership(RuleBasedStateMachine):
    """Three replicas and a gateway over up to three sessions of one partition."""

    url = ""

    @initialize()
    def start(self) -> None:
        self.runner = asyncio.Runner()
        config = BusConfig(
            prefix=f"owners-{secrets.token_hex(4)}:",
            partitions=1,
            lease_ms=LEASE_MS,
            resume_s=RESUME_S,
            credits=CREDITS,
        )
        self.gateway, *self.buses = self.together(*(Bus.connect(config, self.url) for _ in range(1 + len(REPLICAS))))
        self.redis = Redis.from_url(self.url)
        self.time = 1_000_000
        self.run(self.redis.set("hand-clock", self.time))
        self.expected: dict[str, Expected] = {}
        self.leases: list[list[Lease]] = [[] for _ in REPLICAS]

    def run(self, work: Coroutine[object, object, T]) -> T:
        return self.runner.run(work)

    def together(self, *work: Coroutine[object, object, T]) -> list[T]:
        async def gathered() -> list[T]:
            return list(await asyncio.gather(*work))

        return self.run(gathered())

    def lease(self, replica: int, data: st.DataObject) -> Lease | None:
        """Any that the replica ever had: what it does with an old one is what must not count.

        What is drawn must not depend on who won a race.
        """
        had, drawn = self.leases[replica], data.draw(st.integers(0, 99))
        return had[drawn % len(had)] if had else None

    def holds(self, lease: Lease) -> bool:
        return lease.epoch == self.expected[lease.session_id].epoch

    def free(self) -> set[str]:
        return {name for name, now in self.expected.items() if not now.ended and now.deadline <= self.time}

    def free_for(self, replica: int) -> set[str]:
        """Without those offered to another replica."""
        now = self.expected
        return {name for name in self.free() if now[name].offered_until <= self.time or now[name].heir == replica}

    @rule(ms=st.sampled_from([1, 400, LEASE_MS - 1, LEASE_MS, 30_000]))
    def wait(self, ms: int) -> None:
        self.time += ms
        self.run(self.redis.set("hand-clock", self.time))

    @precondition(lambda self: len(self.expected) < len(SESSIONS))
    @rule()
    def open(self) -> None:
        name = SESSIONS[len(self.expected)]
        self.run(self.gateway.open_session(name, "model", SessionSettings()))
        self.expected[name] = Expected()

    @rule(replica=replicas, limit=st.integers(1, 3))
    def claim(self, replica: int, limit: int) -> None:
        free = self.free_for(replica)
        found = self.run(self.buses[replica].claim(f"replica-{replica}", "model", 0, limit))
        assert len(found) == min(limit, len(free))
        self.claimed(replica, found, free)

    @rule()
    def all_claim_at_once(self) -> None:
        free = [self.free_for(replica) for replica in REPLICAS]
        found = self.together(*(self.buses[replica].claim(f"replica-{replica}", "model", 0, 3) for replica in REPLICAS))
        assert sorted(lease.session_id for leases in found for lease in leases) == sorted(set().union(*free))
        for replica, leases in zip(REPLICAS, found, strict=True):
            self.claimed(replica, leases, free[replica])

    def claimed(self, replica: int, found: list[Lease], free: set[str]) -> None:
        for lease in found:
            now = self.expected[lease.session_id]
            assert lease.session_id in free
            assert lease.epoch == now.epoch + 1
            now.epoch, now.deadline, now.offered_until = lease.epoch, self.time + LEASE_MS, 0
        self.leases[replica] += found

    @rule(replica=replicas)
    def renew(self, replica: int) -> None:
        """All that the replica ever held, as one that slept through its replacement would."""
        held = [lease for lease in self.leases[replica] if self.holds(lease)]
        alive = [lease for lease in held if not self.expected[lease.session_id].ended]
        lost = self.run(self.buses[replica].renew(self.leases[replica]))
        assert set(lost) == set(self.leases[replica]) - set(alive)
        for lease in alive:
            self.expected[lease.session_id].deadline = self.time + LEASE_MS

    @rule(replica=replicas, data=st.data())
    def release(self, replica: int, data: st.DataObject) -> None:
        if (lease := self.lease(replica, data)) is None:
            return
        held = self.holds(lease)
        assert self.run(self.buses[replica].release(lease)) == held
        if held:
            now = self.expected[lease.session_id]
            now.epoch, now.deadline = now.epoch + 1, 0

    @rule(replica=replicas, heir=replicas, data=st.data())
    def hand_over(self, replica: int, heir: int, data: st.DataObject) -> None:
        if (lease := self.lease(replica, data)) is None:
            return
        held = self.holds(lease)
        assert self.run(self.buses[replica].release(lease, f"replica-{heir}")) == held
        if held:
            now = self.expected[lease.session_id]
            now.epoch, now.deadline = now.epoch + 1, 0
            now.heir, now.offered_until = heir, self.time + LEASE_MS

    @rule(replica=replicas, count=st.integers(1, 3), behind=st.integers(-1, 4), data=st.data())
    def append(self, replica: int, count: int, behind: int, data: st.DataObject) -> None:
        if (lease := self.lease(replica, data)) is None:
            return
        now = self.expected[lease.session_id]
        if (position := len(now.written) - behind) < 0:
            return
        decided = min(now.admitted, now.decided + 1)
        added = entries(replica, lease, count)
        answer = self.run(self.buses[replica].append(lease, position, added, decided))
        if not self.holds(lease) or now.ended:
            assert answer == "stale"
        elif behind == 0:
            assert answer == "ok"
            now.written += [(replica, lease.epoch)] * count
            now.decided = decided
        else:
            assert answer == ("duplicate" if count <= behind else "stale")

    @rule(name=st.sampled_from(SESSIONS))
    def everybody_appends_at_once(self, name: str) -> None:
        """Whoever ever held the session writes at what it takes for the end: one is heard, if any."""
        if name not in self.expected:
            return
        now = self.expected[name]
        writers = [
            (replica, lease) for replica in REPLICAS for lease in self.leases[replica] if lease.session_id == name
        ]
        position = len(now.written)
        answers = self.together(
            *(
                self.buses[replica].append(lease, position, entries(replica, lease, 1), now.decided)
                for replica, lease in writers
            )
        )
        for (replica, lease), answer in zip(writers, answers, strict=True):
            assert answer == ("ok" if self.holds(lease) and not now.ended else "stale")
            if answer == "ok":
                now.written.append((replica, lease.epoch))

    @rule(replica=replicas, back=st.integers(0, 3), data=st.data())
    def trim(self, replica: int, back: int, data: st.DataObject) -> None:
        if (lease := self.lease(replica, data)) is None:
            return
        now = self.expected[lease.session_id]
        position = max(now.first, len(now.written) - back)
        trimmed = self.run(self.buses[replica].trim(lease, b"window", "0-0", position))
        assert trimmed == (self.holds(lease) and not now.ended)
        if trimmed:
            meta = self.run(self.gateway.session_meta(lease.session_id))
            assert meta is not None
            assert now.first <= meta.first_position <= position
            now.first = meta.first_position

    @rule(name=st.sampled_from(SESSIONS))
    def admit(self, name: str) -> None:
        if name in self.expected and not self.expected[name].ended:
            now = self.expected[name]
            seq = self.run(self.gateway.admit_frame(name, now.admitted / 2, b"picture"))
            assert seq == (now.admitted if now.admitted - now.decided < CREDITS else None)
            now.admitted += seq is not None

    @rule(replica=replicas, data=st.data())
    def end(self, replica: int, data: st.DataObject) -> None:
        if (lease := self.lease(replica, data)) is not None:
            assert self.run(self.buses[replica].end_session(lease)) == self.holds(lease)
            self.expected[lease.session_id].ended |= self.holds(lease)

    @rule(name=st.sampled_from(SESSIONS))
    def abandon(self, name: str) -> None:
        if name not in self.expected:
            return
        now = self.expected[name]
        abandoned = self.run(self.gateway.abandon(name, "nobody came"))
        assert abandoned == (now.ended or now.deadline <= self.time)
        if abandoned and not now.ended:
            now.ended, now.epoch = True, now.epoch + 1
            now.written.append((-1, now.epoch))

    @invariant()
    def logs_hold_what_owners_were_told_is_there(self) -> None:
        """Gap-free positions, each entry once, epochs that only rise, one writer an epoch."""
        for name, now in self.expected.items():
            log = self.run(self.gateway.read_log(name))
            assert [position for position, _ in log] == list(range(now.first, len(now.written)))
            assert [_writer(entry, now) for _, entry in log] == now.written[now.first :]
            epochs = [epoch for _, epoch in now.written]
            assert epochs == sorted(epochs)
            assert len(set(now.written)) == len(set(epochs))

    @invariant()
    def admitted_frames_wait_for_an_encoder(self) -> None:
        queued = self.run(self.redis.xrange(self.gateway.keys.frames(0)))
        found = {
            name: [int(frame[b"n"]) for _, frame in queued if frame[b"s"].decode() == name] for name in self.expected
        }
        assert found == {name: list(range(now.admitted)) for name, now in self.expected.items()}

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.together(*(bus.close() for bus in (self.gateway, *self.buses)))
            self.run(self.redis.aclose())
            self.runner.close()


def _writer(entry: LogEntry, now: Expected) -> tuple[int, int]:
    if isinstance(entry, SessionEnded):
        return -1, now.epoch
    assert isinstance(entry, FrameSkipped)
    return int(entry.time), entry.seq


def test_whatever_replicas_do_only_the_owner_writes(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts, "CLOCK", HAND_CLOCK)
    monkeypatch.setattr(Ownership, "url", redis_url)
    run_state_machine_as_test(
        Ownership,
        settings=hypothesis_settings(
            max_examples=25, stateful_step_count=40, deadline=None, database=None, derandomize=True
        ),
    )

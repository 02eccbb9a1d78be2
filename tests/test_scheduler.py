"""The order of prefill, on sessions that only count positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from actors.scheduler import Scheduler
from actors.session import Session, Work

BUDGET = 64


@dataclass
class Rebuilding:
    """A session just taken over: `pending` positions of its context are in no KV cache yet."""

    session_id: str
    pending: int
    response: None = None
    waiting_frames: int = 0
    ready: bool = True

    def work(self, max_frames: int, max_positions: int) -> Work:
        assert max_frames == 1
        return Work("prefill", 0, [0] * min(self.pending, max_positions), [], [])


def finished_at(arrivals: dict[int, list[Rebuilding]]) -> dict[str, int]:
    """The step after which each session has so little left that it is prefill no more, by session."""
    scheduler, sessions, done = Scheduler(BUDGET, 1), list[Rebuilding](), dict[str, int]()
    for step in range(100):
        sessions += arrivals.get(step, [])
        plan = scheduler.plan(cast(list[Session], [one for one in sessions if one.session_id not in done]))
        assert sum(len(work.ids) for _, work in plan) <= BUDGET
        for session, work in plan:
            rebuilding = cast(Rebuilding, session)
            rebuilding.pending -= len(work.ids)
            if rebuilding.pending <= BUDGET // 2:
                done[rebuilding.session_id] = step
    return done


def test_sessions_that_prefill_are_served_one_after_the_other() -> None:
    done = finished_at({0: [Rebuilding(name, 5 * BUDGET) for name in "abcd"]})
    assert sorted(done.values()) == [4, 9, 14, 19]


def test_who_came_first_is_not_held_up_by_those_who_come_later() -> None:
    later = {step: [Rebuilding(f"later{step}", BUDGET)] for step in range(1, 20)}
    done = finished_at({0: [Rebuilding("first", 5 * BUDGET)], **later})
    assert done["first"] == 4
    assert [done[f"later{step}"] for step in range(1, 20)] == list(range(5, 24))

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
    later = {step: [Rebuilding(f"later{step}", 2 * BUDGET)] for step in range(1, 20)}
    done = finished_at({0: [Rebuilding("first", 5 * BUDGET)], **later})
    assert done["first"] == 4
    assert [done[f"later{step}"] for step in range(1, 20)] == sorted(done[f"later{step}"] for step in range(1, 20))


def test_a_long_question_waits_for_no_rebuild_and_holds_none_up() -> None:
    rebuilds = [Rebuilding(name, 20 * BUDGET) for name in "ab"]
    asked = {step: [Rebuilding(f"asked{step}", BUDGET)] for step in range(1, 60)}
    done = finished_at({0: rebuilds, **asked})
    assert all(done[f"asked{step}"] <= step + 1 for step in range(1, 60))
    assert done["a"] <= 40


def test_who_is_asked_beside_many_speakers_reads_with_all_that_is_left() -> None:
    speakers = [Rebuilding(f"speaks{n}", 1, response=cast(None, object())) for n in range(20)]
    asked = Rebuilding("asked", BUDGET // 2, response=cast(None, object()))
    plan = Scheduler(BUDGET, 1).plan(cast(list[Session], [asked, *speakers]))
    assert {session.session_id: len(work.ids) for session, work in plan} == {
        "asked": BUDGET // 2,
        **{one.session_id: 1 for one in speakers},
    }


def test_more_speakers_than_a_step_holds_take_turns_whatever_they_have_to_read() -> None:
    speaking = [Rebuilding(f"s{n}", 1 + n % 2, response=cast(None, object())) for n in range(3 * BUDGET)]
    scheduler, served = Scheduler(BUDGET, 1), set()
    for _ in range(6):
        served |= {session.session_id for session, _ in scheduler.plan(cast(list[Session], speaking))}
    assert len(served) == len(speaking)

"""A load that rises and falls, on an application whose replicas do not follow it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from application import application

from serve.rising_load import Report, Schedule, Undecided, Viewer, draw, follow


def test_sessions_come_one_by_one_and_leave_one_by_one() -> None:
    schedule = Schedule(sessions=3, step_s=2, hold_s=10)
    assert [schedule.span(number) for number in range(3)] == [(0, 22), (2, 20), (4, 18)]


def test_those_that_came_first_may_leave_first() -> None:
    schedule = Schedule(sessions=3, step_s=2, hold_s=10, oldest_first=True)
    assert [schedule.span(number) for number in range(3)] == [(0, 18), (2, 20), (4, 22)]


def test_a_session_that_is_taken_a_second_time_has_moved() -> None:
    report = Report(viewers=[Viewer(), Viewer()], claims={"a": 2})
    assert report.moved == 0
    report.claims["b"] = 1
    assert report.moved == 1


def test_a_decision_settles_the_frames_before_it() -> None:
    undecided = Undecided()
    for video_time in (0.0, 0.5, 1.0):
        undecided.add(video_time)
    assert undecided.decide(0.5) >= 0
    assert len(undecided) == 1
    undecided.decide(1.0)
    assert (len(undecided), undecided.age_s) == (0, 0.0)


@pytest.mark.anyio
async def test_every_frame_of_every_session_is_accounted_for_and_drawn(
    tiny: dict[str, object], redis_url: str, tmp_path: Path
) -> None:
    report = Report({"machine": "any"})
    with application(tiny, redis_url) as url:
        await follow(url, Schedule(sessions=2, step_s=0.125, hold_s=0.5, fps=8), report)
    assert report.lost == []
    assert [viewer.sent for viewer in report.viewers] == [8, 6]
    assert all(viewer.decided == viewer.sent for viewer in report.viewers)
    last = report.samples[-1]
    assert (last.sessions, last.behind, last.llms, last.encoders) == (0, 0, 1, 1)
    assert (sum(report.claims.values()), report.moved) == (2, 0)
    report.samples[-1].moved = 1  # as if: it is drawn, too
    draw(report, tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 0
    assert json.loads(json.dumps(asdict(report)))["schedule"]["fps"] == 8

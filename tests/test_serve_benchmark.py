"""The load generator, against a real gateway with the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from application import application

from jobs.serve_benchmark import STAGES, Load, ServeReport, measure_all


def test_a_load_is_measured_from_both_sides(tiny: dict[str, object], redis_url: str, tmp_path: Path) -> None:
    with application(tiny, redis_url) as url:
        report = ServeReport({"cpu": "any"}, ["a note"], Load((2,), fps=4, seconds=2, ask_every_s=1, tokens=2))
        measure_all(report, url)
    (result,) = report.results
    assert result.sent == 2 * 8
    assert result.decided + result.dropped == result.sent
    assert result.errors == 0
    assert result.lost == ()
    assert 0 < (result.lag_s["p50"] or 0) <= (result.lag_s["p99"] or 0)
    assert (result.first_token_s["p50"] or 0) > 0
    assert set(result.stages) == set(STAGES)
    assert result.memory_mb_per_session > 0
    report.save(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["largest"] == report.largest
    assert "largest N" in report.table()


def test_sessions_that_the_server_ends_are_counted_and_do_not_end_the_measurement(
    tiny: dict[str, object], redis_url: str, tmp_path: Path
) -> None:
    with application(tiny, redis_url, sessions=1) as url:
        report = ServeReport({}, [], Load((2, 4), fps=4, seconds=1, ask_every_s=60, tokens=2))
        measure_all(report, url)
    (result,) = report.results
    assert not result.keeps_up
    assert len(result.lost) == 1
    assert "1013" in result.lost[0]
    assert result.first_token_s == {"p50": None, "p95": None, "p99": None}
    assert "1013" in report.table()
    report.save(tmp_path / "found.json")
    assert "NaN" not in (tmp_path / "found.json").read_text()


def test_a_load_beyond_what_a_server_keeps_up_with_ends_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jobs import serve_benchmark
    from jobs.serve_benchmark import Result

    def result(sessions: int) -> Result:
        one: dict[str, float | None] = {"p50": 0.1, "p95": 0.1, "p99": 0.1}
        return Result(sessions, 1, 1, 0, 0, one, one, one, {}, 0.1, 1.0, sessions < 4)

    async def measured(_: Load, sessions: int, url: str) -> Result:
        return result(sessions)

    monkeypatch.setattr(serve_benchmark, "_measure", measured)
    report = ServeReport({}, [], Load((1, 2, 4, 8), 2, 1, 1, 1))
    measure_all(report, "http://nowhere")
    assert [found.sessions for found in report.results] == [1, 2, 4]
    assert report.largest == 2

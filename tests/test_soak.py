"""The verdict of a soak run, on series whose growth is known, and its report."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from jobs import soak
from jobs.chaos_application import Application, ChaosError
from jobs.soak import EVERY_S, SoakReport, growth, main

ROWS = 720  # an hour


def report(**series: list[float]) -> SoakReport:
    rows = [{"seconds": EVERY_S * n} | {name: values[n] for name, values in series.items()} for n in range(ROWS)]
    return SoakReport({"date": "2026-11-28", "cpu": "a CPU"}, [], 1.0, samples=rows, kills=[(60.0, "llm killed")])


def test_what_a_leak_adds_is_growth_and_ups_and_downs_are_not() -> None:
    chosen = random.Random(0)
    noise = [chosen.gauss(0, 20) for _ in range(ROWS)]
    found = report(
        leak=[1000 + noise[n] + 150 * n / ROWS for n in range(ROWS)],
        level=[1000 + noise[n] for n in range(ROWS)],
        sawtooth=[1000 + 5 * (n % 60) for n in range(ROWS)],
        less=[1000 - 0.5 * n for n in range(ROWS)],
        warming=[1000 * min(1.0, 4 * n / ROWS) for n in range(ROWS)],
        keys=[32 + n // 100 for n in range(ROWS)],
        none=[0.0] * ROWS,
    )
    assert {name for name, (_, _, grows) in found.verdicts.items() if grows} == {"leak", "keys"}
    assert not found.flat
    level, grown, _ = found.verdicts["leak"]
    assert level == pytest.approx(1097, abs=5)
    assert grown == pytest.approx(105, abs=10)


def test_growth_is_told_by_a_line_through_uneven_samples() -> None:
    times = [0.0, 1.0, 2.0, 40.0, 90.0, 100.0]
    level, grown, grows = growth(soak.np.array(times), soak.np.array([10 + t for t in times]))
    assert (grown, grows) == (pytest.approx(100), True)
    assert level == pytest.approx(10 + sum(times) / 6)


def test_a_report_has_its_verdicts_and_its_picture(tmp_path: Path) -> None:
    found = report(keys=[32.0] * ROWS)
    found.save(tmp_path / "soak")
    saved = json.loads((tmp_path / "soak.json").read_text())
    assert saved["verdicts"] == {"keys": {"level": 32.0, "growth": 0.0, "grows": False}}
    assert saved["flat"]
    assert (tmp_path / "soak.png").stat().st_size > 5_000
    assert "flat" in found.table()
    assert found.flat
    found.hours = 0.05
    assert (found.verdicts, found.flat) == ({}, None)
    assert "no verdict" in found.table()
    nothing = SoakReport({}, [], 1.0)
    nothing.save(tmp_path / "nothing")
    assert json.loads((tmp_path / "nothing.json").read_text())["flat"] is False


def test_what_was_found_until_a_run_broke_off_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def breaks(app: Application, sessions: int, seed: int, seconds: float, found: SoakReport) -> None:
        found.samples, found.hours = report(keys=[32.0] * ROWS).samples, 1.0
        raise ChaosError("no llms report")

    monkeypatch.setattr(Application, "__enter__", lambda app: app)
    monkeypatch.setattr(soak, "soak", breaks)
    assert main(["--save", str(tmp_path / "soak")]) == 1
    said = capsys.readouterr()
    assert "error: no llms report" in said.err
    assert "ended early: no llms report" in said.out
    assert json.loads((tmp_path / "soak.json").read_text())["flat"]

"""The engine benchmark: every part runs, and both backends really follow the script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from actors import checkpoint
from actors.config import ModelConfig
from actors.engine import EngineConfig
from actors.messages import LogEntry
from jobs.benchmark import main
from jobs.benchmark_report import Comparison, Report
from jobs.scripted import (
    REPLY_TOKENS,
    SETTINGS,
    Folded,
    PlacedBatched,
    PlacedReference,
    add_frame,
    count,
    place,
    scripted,
)
from jobs.simulated_stream import SimulatedStream

BACKENDS = (PlacedReference, PlacedBatched)
CONFIG = EngineConfig(max_positions=700, kv_memory_gb=0.05, memory_tokens=16)


@pytest.fixture(scope="module")
def loaded(tiny_configs: dict[str, ModelConfig]) -> checkpoint.Loaded:
    return checkpoint.load(tiny_configs["live1plus"])


@pytest.fixture(scope="module")
def saved(tiny_configs: dict[str, ModelConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quick run's results, from the command line to the files."""
    folder = tmp_path_factory.mktemp("benchmark")
    settings = folder / "tiny.yaml"
    settings.write_text(yaml.safe_dump({"model": tiny_configs["live1plus"].model_dump(mode="json")}))
    arguments = ["engine", str(settings), "engine.memory_tokens=16", "--quick", "--save", str(folder / "results")]
    assert main([*arguments, "--machine", "A machine"]) == 0
    return folder / "results"


def test_a_quick_run_saves_every_measurement(saved: Path) -> None:
    (path,) = saved.glob("*-a-machine.json")
    found = json.loads(path.read_text())
    measured = {(entry["kind"], entry["at"]) for entry in found["comparisons"]}
    assert {("live", 20), ("live", 120), ("recorded", 0.1), ("recorded", 0.0), ("sessions", 2)} <= measured
    assert {kind for kind, _ in measured} == {
        "live",
        "recorded",
        "recorded_later",
        "sessions",
        "first_token",
        "rebuild",
    }
    assert {"reference_ms", "batched_ms", "ratio"} <= set(found["comparisons"][0])
    assert {"cpu", "gpu", "date", "dtype", "threads", "clock", "model", "window"} <= set(found["machine"])
    steps_and_lag = {
        f"{name}_{what}_{percent}_ms"
        for name in ("reference", "batched")
        for what in ("step", "lag_others")
        for percent in ("p50", "p99")
    }
    assert steps_and_lag <= set(found["numbers"])
    assert found["numbers"]["crowd_sessions"] == 2
    assert 0 < found["numbers"]["crowd_lag_p50_ms"] <= found["numbers"]["crowd_lag_p99_ms"]
    floors = {"memory_bandwidth_gb_s", "floor_of_a_step_ms", "products_gflop_s", "floor_of_a_recorded_frame_ms"}
    assert {"late_to_early", "memory_growth", *floors} <= set(found["numbers"])
    assert [frames for frames, _, _ in found["memory"]] == [20, 40, 60, 80, 100]
    assert {goal["name"] for goal in found["goals"]} >= {"late_to_early", "memory_growth"}
    assert path.with_suffix(".png").stat().st_size > 1000


def test_both_backends_followed_the_script(saved: Path) -> None:
    (path,) = saved.glob("*.json")
    decided = json.loads(path.read_text())["decided"]
    assert decided["recorded at 0.1"] == {"reference": [20, 2], "batched": [20, 2]}
    assert decided["recorded at 0"] == {"reference": [20, 0], "batched": [20, 0]}
    assert decided["lag"] == {"reference": [16, 2], "batched": [16, 2]}


def test_a_mistake_in_the_settings_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["engine", str(tmp_path / "none.yaml")]) == 1
    assert "no such settings file" in capsys.readouterr().err
    assert main(["engine", "--preset", "llama3-8b"]) == 1
    assert "--device cuda" in capsys.readouterr().err


def test_help_says_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["engine", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("recorded", "sessions", "memory", "--preset", "--quick"))


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_placed_stream_goes_on_as_the_one_that_lived_through_it(
    kind: type[PlacedReference | PlacedBatched], loaded: checkpoint.Loaded
) -> None:
    frame = torch.zeros(10, 48)
    engine = kind(loaded.model, loaded.template, CONFIG)
    engine.session_type = scripted(())
    lived = engine.open("lived", SETTINGS)
    for _ in range(80):
        add_frame(lived, frame)
    run(engine)
    log = Folded(loaded.template, loaded.config.system_prompt, engine.limits, frame).run(80)
    placed = place(engine, "placed", log, frame)
    assert placed.fed == placed.context.length
    for session in (lived, placed):
        add_frame(session, frame)
    run(engine)
    assert placed.next_seq == lived.next_seq == 81
    assert placed.context.ids == lived.context.ids


@pytest.mark.parametrize("kind", BACKENDS)
def test_simulated_streams_decide_every_frame_and_wait_for_nothing(
    kind: type[PlacedReference | PlacedBatched], loaded: checkpoint.Loaded
) -> None:
    engine = kind(loaded.model, loaded.template, CONFIG)
    engine.session_type = scripted([3])
    stream = SimulatedStream(engine, 2, 10, torch.zeros(10, 48))
    stream.run(lambda engine: (100.0, engine.step()))
    assert count(stream.log) == (20, 2)
    assert len(stream.behind) + len(stream.others) == 20
    # 100 ms a step: a reply, its end included, is longer than two frames' time.
    assert len(stream.behind) >= 4
    assert max(stream.behind) > REPLY_TOKENS * 100 / 2
    assert min(stream.others) == 100.0


def test_simulated_streams_go_on_from_what_their_sessions_have_lived_through(loaded: checkpoint.Loaded) -> None:
    engine = PlacedBatched(loaded.model, loaded.template, CONFIG)
    engine.session_type = scripted([])
    frame = torch.zeros(10, 48)
    folded = Folded(loaded.template, loaded.model.config.system_prompt, engine.limits, frame)
    lived = [list(folded.run(5)), list(folded.run(9))]
    stream = SimulatedStream(engine, 2, 3, frame, lived)
    stream.run(lambda engine: (100.0, engine.step()))
    assert count(stream.log) == (6, 0)
    assert stream.others == [100.0] * 6
    assert [session.next_seq for session in engine.sessions.values()] == [8, 12]


def test_a_gpu_has_goals_of_its_own() -> None:
    report = Report({"cpu": "none", "gpu": "H100"}, [Comparison("live", 300, 30.0, 10.0)])
    report.numbers |= {"crowd_sessions": 45, "crowd_lag_p99_ms": 501.0}
    assert {goal.name: goal.met for goal in report.goals} == {
        "live at 300, times reference": False,
        "crowd_sessions": True,
        "crowd_lag_p99_ms": False,
    }
    assert "goals on a GPU" in report.table()


def test_ratios_and_goals_count_the_right_way() -> None:
    report = Report({"cpu": "none"}, [Comparison("live", 300, 30.0, 10.0), Comparison("recorded", 0.0, 30.0, 10.0)])
    report.numbers["late_to_early"] = 1.2
    assert report.comparisons[0].ratio == 3.0
    assert {goal.name: goal.met for goal in report.goals} == {
        "live at 300, times reference": True,
        "recorded at 0, times reference": False,
        "late_to_early": False,
    }
    assert "MISSED  late_to_early" in report.table()


def run(engine: PlacedReference | PlacedBatched) -> list[LogEntry]:
    log = [entry for _, entries in engine.step() for entry in entries]
    while not engine.idle:
        log += [entry for _, entries in engine.step() for entry in entries]
    return log

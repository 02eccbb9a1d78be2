"""The capacity model: it grows as it must, says what binds, agrees with what was measured, and refuses nonsense."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import capacity
from jobs.capacity_check import check_benchmark
from jobs.capacity_model import LoadConfig, MachineConfig, RedisCosts, ServedConfig, llm_share, plan, streams_per_llm
from jobs.capacity_redis import load_costs, memory_bytes

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ENGINE = BENCHMARKS / "2026-11-22-xeon-2-cores.json"
REDIS = sorted(BENCHMARKS.glob("*-redis.json"))[-1]
LOAD, SERVED, MACHINE = LoadConfig(), ServedConfig(), MachineConfig()


@pytest.fixture(scope="module")
def costs() -> RedisCosts:
    return load_costs(REDIS)


@given(streams=st.integers(1, 1_000_000), more=st.integers(1, 1_000_000))
def test_more_streams_never_need_less(streams: int, more: int) -> None:
    costs = load_costs(REDIS)
    few, many = (plan(count, LOAD, SERVED, MACHINE, costs) for count in (streams, streams + more))
    for name in ("cells", "redis_gb", "ingress_gbit_s", "decode_cores"):
        assert getattr(many, name) >= getattr(few, name)
    assert many.llms * many.streams_per_llm >= many.streams
    assert many.encoders * many.frames_per_encoder >= many.frames_per_s


@given(fps=st.floats(0.5, 30), responses=st.floats(0, 30), window=st.integers(512, 100_000))
def test_a_device_is_never_given_more_than_its_time_and_memory(fps: float, responses: float, window: int) -> None:
    load = LoadConfig(fps=fps, responses_per_minute=responses)
    served = ServedConfig(window=window, kept=window // 2)
    count, _ = streams_per_llm(load, served, MACHINE)
    share = llm_share(load, served, MACHINE)
    assert count * (share.arithmetic + share.bandwidth) <= MACHINE.busy
    context, spoken = 0.75 * window, responses / 60 * load.response_tokens
    positions = 2 * (fps * served.frame_positions + spoken)
    flop = 2 * served.parameters + 4 * served.layers * served.width * context
    assert count * positions * flop <= 1.01 * MACHINE.busy * MACHINE.tflops * 1e12 * MACHINE.llm_reached
    assert count * window * served.kv_bytes / 1e9 <= MACHINE.memory_gb - served.weights_gb
    steps = max(MACHINE.steps_per_s, count * positions / MACHINE.step_positions)
    read = count * (fps + spoken) * context * served.kv_bytes / 1e9 + steps * served.weights_gb
    assert count == 0 or read <= 1.05 * MACHINE.busy * MACHINE.bandwidth_gb_s * MACHINE.bandwidth_reached


def test_what_binds_follows_the_load() -> None:
    assert streams_per_llm(LOAD, SERVED, MACHINE)[1] == "KV memory"
    assert streams_per_llm(LOAD.model_copy(update={"fps": 30}), SERVED, MACHINE)[1] == "arithmetic"
    slow = MACHINE.model_copy(update={"bandwidth_gb_s": 300, "steps_per_s": 2})
    assert streams_per_llm(LOAD, SERVED, slow)[1] == "bandwidth"


def test_the_floors_of_a_frame_are_those_of_the_architecture() -> None:
    flop = SERVED.frame_positions * (2 * SERVED.parameters + 4 * SERVED.layers * SERVED.width * 3072)
    assert 178e9 < flop < 201e9
    layers, heads, size, halves = 32, 8, 128, 2
    assert SERVED.kv_bytes == 2 * layers * heads * size * halves


def test_price_and_redis_follow_their_inputs(costs: RedisCosts) -> None:
    one = plan(1000, LOAD, SERVED, MACHINE, costs)
    free = plan(1000, LOAD, SERVED, MACHINE.model_copy(update={"gpu_price": 0}), costs)
    assert one.price_per_hour - free.price_per_hour == pytest.approx(2.5 * (one.encoders + one.llms))
    assert one.price_per_stream_hour == one.price_per_hour / 1000
    half = ServedConfig(window=2048, kept=1024)
    assert plan(1000, LOAD, half, MACHINE, costs).redis_gb == pytest.approx(one.redis_gb / 2, rel=0.05)
    deaf = replace(costs, hear_us=10 * costs.hear_us)
    assert plan(100_000, LOAD, SERVED, MACHINE, deaf).cells == pytest.approx(
        10 * plan(100_000, LOAD, SERVED, MACHINE, costs).cells, rel=0.1
    )


def test_the_bus_bounds_a_replica_whose_model_is_quick(costs: RedisCosts) -> None:
    small = ServedConfig(parameters=1e8, weights_gb=0.2, layers=12, width=768, kv_bytes=10_000)
    quick = plan(10_000, LOAD, small, MACHINE, costs)
    assert quick.llm_bound == "the replica's core"
    assert quick.streams_per_llm * LOAD.fps * costs.owner_us <= MACHINE.busy * 1e6
    dear = plan(10_000, LOAD, small, MACHINE, replace(costs, encoder_us=10 * costs.encoder_us))
    assert dear.decode_cores > quick.decode_cores


def test_the_formula_holds_for_full_steps_of_the_benchmark() -> None:
    rows = check_benchmark(json.loads(ENGINE.read_text()))
    full = [row for row in rows if row.full and row.fitted_tflop_s is None]
    assert len(full) >= 3
    assert all(abs(row.error) < 0.15 for row in full)
    assert max(abs(row.error) for row in rows) < 0.3
    assert max(abs(row.error) for row in rows) > 0.15, "the documentation says that near-empty steps are off"


def test_the_documentation_shows_what_the_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    shown = (BENCHMARKS.parent / "docs" / "capacity.md").read_text()
    for arguments in ([], ["--benchmark", str(ENGINE)]):
        assert capacity.main(arguments) == 0
        for line in capsys.readouterr().out.splitlines():
            assert line in shown


def test_measured_memory_is_predicted(costs: RedisCosts) -> None:
    checks = json.loads(REDIS.read_text())["checks"]
    assert len(checks) >= 2
    for check in checks:
        predicted = memory_bytes(costs, SERVED.frame_tokens_bytes, check["sessions"], check["frames"])
        assert predicted == pytest.approx(check["measured"], rel=0.05)


def test_results_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert capacity.main(["load.fps=1", "--streams", "10", "1000", "--save", str(tmp_path)]) == 0
    assert (tmp_path / "capacity.txt").read_text() == capsys.readouterr().out
    assert [item["streams"] for item in json.loads((tmp_path / "capacity.json").read_text())] == [10, 1000]
    assert (tmp_path / "capacity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["load.frames=2"], "load.frames=2: expected section.key=value with one of load.fps"),
        (["load.fps=-1"], "fps: Input should be greater than 0"),
        (["served.window=100"], "kept is 2048, window 100"),
        (["machine.memory_gb=16"], "has no room for 16.1 GB of weights"),
        (["load.fps=3000"], "too slow for one stream of 3000 frames a second"),
        (["--benchmark", str(REDIS)], "this is no engine's benchmark"),
        (["--costs", str(ENGINE)], "has no costs of the bus"),
        (["--costs", "no/such.json"], "No such file"),
    ],
)
def test_nonsense_is_refused_in_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert capacity.main(arguments) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_costs_of_the_bus_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.capacity_redis.SESSIONS", 8)
    monkeypatch.setattr("jobs.capacity_redis.FRAMES", 6)
    monkeypatch.setattr("jobs.capacity_redis.ANNOUNCED", 100)
    assert capacity.main(["--redis", "--save", str(tmp_path), "--machine", "test"]) == 0
    assert "an announcement" in capsys.readouterr().out
    [path] = tmp_path.glob("*-test-redis.json")
    found = load_costs(path)
    assert found.server_us > 0
    assert found.input_overhead_bytes < 1000

"""The LLM's formula against an engine's benchmark of the same model: where it holds, and by how much it does not.

A frame costs its share of reading the weights, reading its session's keys and values, and arithmetic, one after the
other, as in jobs/capacity_model.py. One number is taken from the benchmark, the arithmetic a second that a full step
reaches; bandwidth is what the benchmark measured by copying. All else is predicted: what a frame costs in emptier
steps and in long contexts, windows built anew included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from jobs.capacity_model import ServedConfig, flop_of_position

FULL_FROM = 4  # sessions in a step: where plans are made
SESSIONS_AT = 90  # frames in the contexts of the benchmark's sessions


class _Compared(TypedDict):
    kind: str
    at: float
    batched_ms: float


class EngineReport(TypedDict):
    """The parts of a benchmark's file that are read here."""

    machine: Mapping[str, object]
    comparisons: Sequence[_Compared]
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class Checked:
    """Milliseconds of a frame. `fitted_tflop_s`: the arithmetic a second that was fitted to this one, if it was."""

    what: str
    predicted_ms: float
    measured_ms: float
    full: bool
    fitted_tflop_s: float | None = None

    @property
    def error(self) -> float:
        return self.predicted_ms / self.measured_ms - 1


MODELS = {
    "embedded": ServedConfig(
        parameters=106.2e6, layers=30, width=576, kv_bytes=23_040, frame_positions=6, encoder_gflop=0.8
    ),
    "llama3-8b": ServedConfig(),
}


def check_benchmark(report: EngineReport) -> list[Checked]:
    """Predictions beside what was measured. Raises ValueError for a file that is no benchmark of a known model."""
    try:
        machine, numbers = report["machine"], report["numbers"]
        name = str(machine["model"])
        bandwidth = numbers["memory_bandwidth_gb_s"]  # megabytes a millisecond, too
        weights_ms = float(str(machine["weights_mb"])) / bandwidth
        halves = 2 if machine["dtype"] == "float32" else 1
        window = float(str(machine["window"]))
        measured = {(item["kind"], item["at"]): item["batched_ms"] for item in report["comparisons"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"this is no engine's benchmark: {error!r}") from None
    if name not in MODELS:
        raise ValueError(f"the benchmark is of {name}, known here are {', '.join(MODELS)}")
    served = MODELS[name]
    sessions = sorted(at for kind, at in measured if kind == "sessions")
    if not sessions:
        raise ValueError("this benchmark has no measurement of many sessions")

    def read_ms(context: float) -> float:
        return context * halves * served.kv_bytes / 1e6 / bandwidth

    fullest, context = sessions[-1], SESSIONS_AT * served.frame_positions
    work = served.frame_positions * flop_of_position(served, context)
    rate = work / (measured["sessions", fullest] - weights_ms / fullest - read_ms(context))
    rows = [
        Checked(
            f"{at:g} sessions",
            weights_ms / at + read_ms(context) + work / rate,
            measured["sessions", at],
            at >= FULL_FROM,
            rate / 1e9 if at == fullest else None,
        )
        for at in sessions
    ]
    for kind, at in sorted(measured):
        if kind == "live":
            context, computed = _lived_through(at * served.frame_positions, window)
            work = computed * served.frame_positions * flop_of_position(served, context)
            predicted = weights_ms + read_ms(context) + work / rate
            rows.append(Checked(f"one session, frame {at:g}", predicted, measured[kind, at], False))
    return rows


def _lived_through(positions: float, window: float) -> tuple[float, float]:
    """The context of a session after so many positions, and how often each of the last ones is computed.

    From the second time on that half of the window is built anew, the benchmark measures the whole time from one to
    the next (EngineBenchmark.live): the mean context, and every position twice.
    """
    rebuilt = 0 if positions < window else 1 + (positions - window) // (window / 2)
    return (positions - rebuilt * window / 2, 1) if rebuilt < 2 else (0.75 * window, 2)

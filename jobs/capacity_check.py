"""The LLM's formula against an engine's benchmark of the same model: where it holds, and by how much it does not.

One number is taken from the benchmark, the arithmetic a second that a full step reaches; bandwidth is
what the benchmark measured by copying. All else is predicted: what a frame costs in emptier steps and
in long contexts, windows built anew included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from jobs.capacity_model import ServedConfig

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
    """Milliseconds of a frame. `calibrated`: the formula was fitted to this one."""

    what: str
    predicted_ms: float
    measured_ms: float
    full: bool
    calibrated: bool = False

    @property
    def error(self) -> float:
        return self.predicted_ms / self.measured_ms - 1


MODELS = {
    "embedded": ServedConfig(parameters=106.2e6, layers=30, width=576, frame_positions=6, encoder_gflop=0.8),
    "llama3-8b": ServedConfig(),
}


def check_benchmark(report: EngineReport) -> list[Checked]:
    """Predictions beside what was measured. Raises ValueError for a file that is no benchmark of a known model."""
    try:
        machine, numbers = report["machine"], report["numbers"]
        name = str(machine["model"])
        weights_ms = float(str(machine["weights_mb"])) / numbers["memory_bandwidth_gb_s"]
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
    fullest = sessions[-1]
    context = SESSIONS_AT * served.frame_positions
    work = served.frame_positions * _flop(served, context)
    rate = work / (measured["sessions", fullest] - weights_ms / fullest)
    rows = [
        Checked(
            f"{at:g} sessions", weights_ms / at + work / rate, measured["sessions", at], at >= FULL_FROM, at == fullest
        )
        for at in sessions
    ]
    for kind, at in sorted(measured):
        if kind == "live" and at * served.frame_positions > window:
            built_anew = 2 * served.frame_positions * _flop(served, 0.75 * window)
            rows.append(
                Checked(f"one session, frame {at:g}", weights_ms + built_anew / rate, measured[kind, at], False)
            )
    return rows


def _flop(served: ServedConfig, context: float) -> float:
    """Of one position behind `context` others."""
    return 2 * served.parameters + 4 * served.layers * served.width * context

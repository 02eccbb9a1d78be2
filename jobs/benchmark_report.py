"""What a benchmark found: comparisons of the batched engine with `reference`, as table, JSON and picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Comparison:
    """One measurement on both backends: milliseconds per unit of `kind` (a frame, mostly) at `at`."""

    kind: str
    at: float
    reference_ms: float
    batched_ms: float

    @property
    def ratio(self) -> float:
        return self.reference_ms / self.batched_ms


@dataclass(frozen=True)
class Goal:
    """A number to reach: at least, or with `at_most` at most, `wanted`."""

    name: str
    wanted: float
    reached: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.reached <= self.wanted if self.at_most else self.reached >= self.wanted


TITLES = {
    "live": "one live session, at this many frames (ms a frame)",
    "recorded": "a recorded video of 200 frames, share of them that speak (ms a frame, replies included)",
    "recorded_later": "the same for frames 300 to 400 of a longer one (ms a frame, replies included)",
    "sessions": "live sessions (ms a frame, all together)",
    "first_token": "from a question to the first token, at this many frames (ms)",
    "rebuild": "rebuild after eviction, to this many positions (ms)",
}
GOALS = {
    ("live", 300): 1.5,
    ("live", 1500): 2.5,
    ("recorded", 0.1): 3.0,
    ("recorded", 0.01): 6.0,
    ("recorded", 0.0): 10.0,
    ("sessions", 8): 4.0,
}
GPU_GOALS = {("live", 300): 4.0, ("live", 1500): 4.0, ("recorded", 0.1): 8.0}
FRAME_MS = 500  # between two frames of a session at 2 FPS


@dataclass
class Report:
    """`machine` says what was measured where; `numbers` holds what is no comparison, in ms unless named otherwise.

    `memory` is (frames, resident MB, KV memory MB) of one long stream; `decided` counts, by scenario, the frames
    and responses of each backend, so that a reader sees that both did the same.
    """

    machine: dict[str, str | int | float]
    comparisons: list[Comparison] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)
    memory: list[tuple[int, float, float]] = field(default_factory=list)
    decided: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)

    @property
    def wanted(self) -> dict[tuple[str, float], float]:
        """Times `reference`, by kind and where; those of a GPU if one was measured."""
        return GOALS if self.machine.get("gpu", "none") == "none" else GPU_GOALS

    @property
    def goals(self) -> list[Goal]:
        wanted = self.wanted
        goals = [
            Goal(f"{c.kind} at {c.at:g}, times reference", wanted[c.kind, c.at], c.ratio)
            for c in self.comparisons
            if (c.kind, c.at) in wanted
        ]
        if wanted is GPU_GOALS and "crowd_sessions" in self.numbers:
            goals.append(Goal("crowd_sessions", 45, self.numbers["crowd_sessions"]))
            goals.append(Goal("crowd_lag_p99_ms", FRAME_MS, self.numbers["crowd_lag_p99_ms"], at_most=True))
        for name, most in (("late_to_early", 1.1), ("memory_growth", 1.01)):
            if name in self.numbers:
                goals.append(Goal(name, most, self.numbers[name], at_most=True))
        return goals

    def table(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.machine.items()]
        for kind, title in TITLES.items():
            rows = [c for c in self.comparisons if c.kind == kind]
            if rows:
                lines += ["", title, f"{'':>10} {'reference':>10} {'batched':>10} {'ratio':>7}"]
            lines += [f"{c.at:>10g} {c.reference_ms:>10.1f} {c.batched_ms:>10.1f} {c.ratio:>7.2f}" for c in rows]
        lines += ["", *(f"{name:<44} {value:>10.4g}" for name, value in self.numbers.items())]
        lines += ["", "goals on two CPU cores" if self.wanted is GOALS else "goals on a GPU"]
        lines += [
            f"{'met' if g.met else 'MISSED':<7} {g.name:<40} wanted {g.wanted:g}, reached {g.reached:.3g}"
            for g in self.goals
        ]
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write `path`.json and `path`.png."""
        path.parent.mkdir(parents=True, exist_ok=True)
        document = asdict(self)
        document["comparisons"] = [asdict(c) | {"ratio": c.ratio} for c in self.comparisons]
        document["goals"] = [asdict(g) | {"met": g.met} for g in self.goals]
        path.with_name(path.name + ".json").write_text(json.dumps(document, indent=1) + "\n")
        self._plot(path.with_name(path.name + ".png"))

    def _plot(self, path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 6), layout="constrained")
        panels = figure.subplots(2, 2).flat
        for panel, kind in zip(panels, ("live", "recorded", "sessions"), strict=False):
            rows = [c for c in self.comparisons if c.kind == kind]
            panel.bar(range(len(rows)), [c.ratio for c in rows])
            panel.set_xticks(range(len(rows)), [f"{c.at:g}" for c in rows])
            for index, row in enumerate(rows):
                if (kind, row.at) in self.wanted:
                    panel.hlines(self.wanted[kind, row.at], index - 0.4, index + 0.4, colors="black")
            panel.set_title(TITLES[kind].partition(" (")[0], fontsize=9)
            panel.set_ylabel("times reference")
        memory = figure.axes[3]
        memory.plot([m[0] for m in self.memory], [m[1] for m in self.memory])
        memory.set_ylim(0, 1.2 * max((m[1] for m in self.memory), default=1))
        memory.set_title("resident memory against stream length", fontsize=9)
        memory.set_xlabel("frames")
        memory.set_ylabel("MB")
        title = ", ".join(str(self.machine[key]) for key in ("date", "cpu", "model", "dtype") if key in self.machine)
        figure.suptitle(f"batched engine against reference (lines: goals): {title}", fontsize=10)
        figure.savefig(path, dpi=90)

"""What the benchmark of training found, as table, JSON and picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs.benchmark_report import Goal

LEAST_TIMES_LOOP = 2.0


@dataclass(frozen=True)
class Turn:
    """One step of one way: seconds, trained positions and the loss before the step."""

    seconds: float
    tokens: int
    loss: float


@dataclass(frozen=True)
class Arithmetic:
    """Billions of multiplications and additions that a trained position needs in a way, at so many a second."""

    gflop_a_position: dict[str, float]
    gflops: float

    def fastest(self, way: str) -> float:
        """Trained positions a second if matrix products were all."""
        return self.gflops / self.gflop_a_position[way]


@dataclass(frozen=True)
class TrainReport:
    """Steps of every way in their order, the first of which warms up; `machine` says where.

    Ways: `loop` is the public reference's with the settings of its scripts, which recompute each layer for the
    backward; `loop_kept` is the same without that; `packed` is ours.
    """

    machine: dict[str, str | int | float]
    turns: dict[str, list[Turn]]
    arithmetic: Arithmetic

    def speed(self, way: str) -> float:
        """Trained positions a second."""
        return speed(self.turns[way][1:])

    @property
    def loss_difference(self) -> float:
        """The largest between the curves of packed and loop, relative."""
        pairs = zip(self.turns["packed"], self.turns["loop"], strict=True)
        return max(abs(a.loss - b.loss) / abs(b.loss) for a, b in pairs)

    @property
    def goal(self) -> Goal:
        return Goal("times the loop", LEAST_TIMES_LOOP, self.speed("packed") / self.speed("loop"))

    def table(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.machine.items()]
        lines += ["", "step" + "".join(f"{f'{way}: loss':>18} {'s':>7}" for way in self.turns)]
        for number, steps in enumerate(zip(*self.turns.values(), strict=True), start=1):
            lines.append(f"{number:>4}" + "".join(f"{turn.loss:>18.6f} {turn.seconds:>7.2f}" for turn in steps))
        lines += ["", f"trained positions a second, of what {self.arithmetic.gflops:.0f} GFLOPS would allow:"]
        for way in self.turns:
            fastest = self.arithmetic.fastest(way)
            lines.append(
                f"  {way:<10} {self.speed(way):>7.1f} of {fastest:.1f} ({self.speed(way) / fastest:.2f}), "
                f"{1e3 * self.arithmetic.gflop_a_position[way]:.0f} MFLOP a position"
            )
        goal, kept = self.goal, self.speed("packed") / self.speed("loop_kept")
        lines += [
            f"{'met' if goal.met else 'MISSED':<7} {goal.name}: wanted {goal.wanted:g}, reached {goal.reached:.2f}; "
            f"without its recomputing {kept:.2f}",
            f"largest difference of the loss curves: {self.loss_difference:.1e} of the loss",
        ]
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write `path`.json and `path`.png."""
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "machine": self.machine,
            "positions_per_s": {way: self.speed(way) for way in self.turns},
            "arithmetic": asdict(self.arithmetic),
            "goal": asdict(self.goal) | {"met": self.goal.met},
            "times_loop_kept": self.speed("packed") / self.speed("loop_kept"),
            "loss_difference": self.loss_difference,
            "turns": {way: [asdict(turn) for turn in turns] for way, turns in self.turns.items()},
        }
        path.with_name(path.name + ".json").write_text(json.dumps(document, indent=1) + "\n")
        self._plot(path.with_name(path.name + ".png"))

    def _plot(self, path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        speeds, curves = figure.subplots(1, 2)
        ways = list(self.turns)
        speeds.bar(
            ways, [self.arithmetic.fastest(way) for way in ways], color="lightgrey", label="matrix products alone"
        )
        speeds.bar(ways, [self.speed(way) for way in ways], width=0.5, label="measured")
        speeds.set_ylabel("trained positions a second")
        speeds.set_title(f"packed: {self.goal.reached:.2f} times the loop", fontsize=9)
        speeds.legend(fontsize=8)
        for way, marker in zip(ways, "o+x", strict=True):
            curves.plot([turn.loss for turn in self.turns[way]], marker=marker, label=way)
        curves.set_xlabel("step")
        curves.set_ylabel("loss")
        curves.set_title(f"curves differ by {self.loss_difference:.0e} of the loss at most", fontsize=9)
        curves.legend(fontsize=8)
        figure.suptitle(", ".join(str(self.machine[name]) for name in ("model", "dtype", "processor")), fontsize=10)
        figure.savefig(path, dpi=90)


def speed(turns: Sequence[Turn]) -> float:
    return sum(turn.tokens for turn in turns) / sum(turn.seconds for turn in turns)

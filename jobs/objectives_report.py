"""What the comparison of training objectives found, as table, JSON and picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

from actors.objective import Objective

METRICS = {
    "time_diff": "time difference, s",
    "fluency": "fluency",
    "lm_ppl": "LM perplexity",
    "lm_correctness": "LM correctness",
}
LESS_IS_BETTER = {"time_diff", "lm_ppl"}


@dataclass(frozen=True)
class Outcome:
    """One objective trained with one seed: `positions` in `seconds` of CPU; `time_diff` in seconds, of `dialogues`.

    It speaks where P(silent) is below `threshold`, which other dialogues have chosen.
    `left_out` training dialogues say nothing.
    """

    objective: Objective
    seed: int
    threshold: float
    time_diff: float | None
    fluency: float | None
    lm_ppl: float | None
    lm_correctness: float | None
    outcomes: dict[str, int]
    dialogues: int
    left_out: int
    positions: int
    seconds: float
    losses: list[float]

    def line(self) -> str:
        """For the log."""
        metrics = " ".join(f"{name}={_cell(_known([getattr(self, name)]))}" for name in METRICS)
        metrics += f" threshold={self.threshold:g}"
        return f"objective={self.objective} seed={self.seed} {metrics} cpu_s={self.seconds:.0f}"


@dataclass(frozen=True)
class ObjectivesReport:
    """All of them, with what they have in common."""

    date: str
    processor: str
    model: str
    start: str
    data: str
    batch: int
    stream_weight: float
    outcomes: list[Outcome]

    def values(self, objective: Objective, metric: str) -> list[float]:
        """One for each seed that has it."""
        return _known([getattr(one, metric) for one in self.outcomes if one.objective == objective])

    def wins(self, metric: str) -> dict[str, int]:
        """Seeds in which `streaming` is better than each other objective."""
        by = {(one.objective, one.seed): getattr(one, metric) for one in self.outcomes}
        sign = -1 if metric in LESS_IS_BETTER else 1
        won: dict[str, int] = {name: 0 for name in self.objectives if name != "streaming"}
        for (name, seed), value in by.items():
            ours = by.get(("streaming", seed))
            if name != "streaming" and value is not None and ours is not None:
                won[name] += sign * ours > sign * value
        return won

    @property
    def steps(self) -> int:
        return max((len(one.losses) for one in self.outcomes), default=0)

    @property
    def objectives(self) -> list[Objective]:
        return list(dict.fromkeys(one.objective for one in self.outcomes))

    def table(self) -> str:
        """Markdown: mean and standard deviation over seeds."""
        seeds = len({one.seed for one in self.outcomes})
        lines = [
            f"# Training objectives, {self.date}",
            "",
            f"{self.model} from `{self.start}`, {self.steps} steps of {self.batch} dialogues of `{self.data}`, "
            f"decisions at frames weighted {self.stream_weight:g} times, {seeds} seeds; "
            f"{max(one.dialogues for one in self.outcomes)} validation dialogues, teacher-forced, strict, each model "
            "at the threshold that is best on as many others; "
            f"{max(one.left_out for one in self.outcomes)} training dialogues in which nothing is said left out; "
            f"{self.processor}",
            "",
            "| | " + " | ".join(METRICS.values()) + " | thresholds | positions | CPU s | replies |",
            "|---" * (len(METRICS) + 5) + "|",
        ]
        for objective in self.objectives:
            runs = [one for one in self.outcomes if one.objective == objective]
            cells = [_cell(self.values(objective, metric)) for metric in METRICS]
            cells.append(", ".join(f"{one.threshold:g}" for one in runs))
            cells += [f"{fmean(one.positions for one in runs):.0f}", f"{fmean(one.seconds for one in runs):.0f}"]
            replies: dict[str, int] = {}
            for one in runs:
                for name, count in one.outcomes.items():
                    replies[name] = replies.get(name, 0) + count
            cells.append(", ".join(f"{name} {count}" for name, count in sorted(replies.items())))
            lines.append(f"| {objective} | " + " | ".join(cells) + " |")
        lines.append("")
        for metric in ("time_diff", "fluency"):
            won = ", ".join(f"{other} in {count} of {seeds} seeds" for other, count in self.wins(metric).items())
            lines.append(f"{METRICS[metric]}: streaming is better than {won}")
        return "\n".join(lines)

    def save(self, folder: str) -> None:
        """Write DATE-objectives.json, .md and .png."""
        path = Path(folder) / f"{self.date}-objectives"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(asdict(self) | {"steps": self.steps}, indent=1) + "\n")
        path.with_suffix(".md").write_text(self.table() + f"\n\n![metrics and losses]({path.name}.png)\n")
        self._plot(path.with_suffix(".png"))

    def _plot(self, path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 3.6), layout="constrained")
        *bars, curves = figure.subplots(1, 4)
        for axis, metric in zip(bars, ("time_diff", "fluency", "lm_correctness"), strict=True):
            for place, objective in enumerate(self.objectives):
                values = self.values(objective, metric)
                axis.bar(place, fmean(values) if values else 0, color=f"C{place}", alpha=0.5)
                axis.scatter([place] * len(values), values, color=f"C{place}", s=15)
            axis.set_xticks(range(len(self.objectives)), self.objectives, fontsize=8)
            axis.set_title(METRICS[metric], fontsize=9)
        for one in self.outcomes:
            curves.plot(one.losses, color=f"C{self.objectives.index(one.objective)}", linewidth=0.8)
        curves.set_title("loss of each objective's own labels", fontsize=9)
        curves.set_xlabel("step")
        figure.suptitle(f"{self.steps} steps of {self.batch} dialogues; a dot a seed", fontsize=10)
        figure.savefig(path, dpi=90)


def _known(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _cell(values: list[float]) -> str:
    if not values:
        return "none"
    return f"{fmean(values):.3g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")

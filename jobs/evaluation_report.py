"""The result of an evaluation: as values for a file, and as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from jobs.metrics import Mode, StreamMetrics
from jobs.timing_metrics import Timing, Window

Values = dict[str, float | None]

COLUMNS = {
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "mean_error_s": "error, s",
    "mean_late_s": "late, s",
    "duplicate_ratio": "duplicates",
    "false_alarms_per_quiet_hour": "false alarms / quiet h",
    "speaking_share": "speaking",
}


@dataclass(frozen=True)
class Report:
    """Everything an evaluation says. `seen_videos` are those the checkpoint was trained on."""

    model: str
    fingerprint: str
    dialogues: str
    num_dialogues: int
    num_videos: int
    seen_videos: list[str]
    fps: float
    threshold: float
    window: Window
    teacher_forced: Mapping[Mode, StreamMetrics]
    self_conditioned: Timing
    controls: Mapping[str, Timing]

    def values(self) -> dict[str, object]:
        """What `metrics.json` holds."""
        return asdict(self) | {
            "self_conditioned": named(self.self_conditioned),
            "controls": {name: named(timed) for name, timed in self.controls.items()},
        }


def named(timed: Timing) -> Values:
    """Counts, and what follows from them."""
    return asdict(timed) | {name: getattr(timed, name) for name in COLUMNS}


def report(result: Report) -> str:
    """The page."""
    window, mine = result.window, result.self_conditioned
    lines = [
        f"# {result.model}",
        "",
        f"{result.num_dialogues} dialogues of {result.num_videos} videos from `{result.dialogues}`, "
        f"{mine.duration_s:.0f} s at {result.fps:g} frames a second, threshold {result.threshold:g}; "
        f"model `{result.fingerprint}`.",
        "",
    ]
    if result.seen_videos:
        lines += [f"**Trained on {len(result.seen_videos)} of these videos: no measure of new ones.**", ""]
    lines += [
        "## Every decision by itself (teacher-forced)",
        "",
        "| mode | LM perplexity | time difference, s | fluency | LM correctness | replies |",
        "|---|---|---|---|---|---|",
    ]
    for mode, metrics in result.teacher_forced.items():
        shown = (metrics.lm_ppl, metrics.time_diff, metrics.fluency, metrics.lm_correctness)
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(metrics.outcomes.items()))
        lines.append(f"| {mode} | {' | '.join(map(_number, shown))} | {outcomes} |")
    lines += [
        "",
        "## Whole streams in which it hears itself",
        "",
        f"{mine.labelled} labels; a response belongs to one when it comes at most {window.before_s:g} s before or "
        f"{window.after_s:g} s after it. Answers to the user are not graded here. The threshold of `change of "
        "picture` was fitted on these very streams.",
        "",
        f"| | responses | {' | '.join(COLUMNS.values())} |",
        "|---|---|" + "---|" * len(COLUMNS),
        _row("**model**", mine),
        *(_row(name, timed) for name, timed in result.controls.items()),
        "",
    ]
    return "\n".join(lines)


def _row(name: str, timed: Timing) -> str:
    return f"| {name} | {timed.said} | {' | '.join(_number(getattr(timed, column)) for column in COLUMNS)} |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"

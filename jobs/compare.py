"""Compare two evaluations of the same dialogues: which checkpoint is better, and how sure that is.

    python -m jobs.compare runs/evaluation-a runs/evaluation-b

Both folders are those of jobs.evaluate. What the second does better or worse than the first is printed with
the interval in which it lies when the videos are drawn again (jobs/paired_bootstrap.py). Exit code 0: done.
1: the folders cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.paired_bootstrap import COUNTS, Difference, compare
from jobs.timing_metrics import Timing

PREDICTIONS, METRICS = "predictions.jsonl", "metrics.json"


class CompareError(ValueError):
    """Two folders that cannot be compared; says what differs."""


@dataclass(frozen=True)
class Graded:
    """An evaluation: its model and window, and by dialogue its video, labels and timing."""

    model: str
    window: dict[str, float]
    videos: dict[str, str]
    labels: dict[str, str]
    timings: dict[str, Timing]


def read_graded(folder: Path) -> Graded:
    """The streams that an evaluation graded. Raises CompareError for a folder of something else."""
    try:
        metrics = json.loads((folder / METRICS).read_text())
        rows = [json.loads(line) for line in (folder / PREDICTIONS).read_text().split("\n") if line]
        rows = [row for row in rows if "timing" in row]
        repeated = [name for name, count in Counter(row["dialogue_id"] for row in rows).items() if count > 1]
        if repeated:
            raise CompareError(
                f"{folder} graded {len(repeated)} dialogue ids twice or more, such as {repeated[0]!r}, and streams are "
                "compared by their ids: give evaluation.dialogues a file in which each dialogue has its own"
            )
        return Graded(
            model=metrics["model"],
            window=metrics["window"],
            videos={row["dialogue_id"]: row["video_id"] for row in rows},
            labels={row["dialogue_id"]: json.dumps(row["labels"]) for row in rows},
            timings={row["dialogue_id"]: Timing(**{name: row["timing"][name] for name in COUNTS}) for row in rows},
        )
    except OSError as error:
        raise CompareError(f"{folder} is no finished evaluation: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CompareError(f"{folder} is no evaluation of this version ({error}): run jobs.evaluate again") from None


def differences(first: Graded, second: Graded, draws: int, seed: int) -> dict[str, Difference]:
    """Raises CompareError unless both graded the same streams in the same way."""
    if first.window != second.window:
        raise CompareError(f"the windows differ: {first.window} and {second.window}: give both evaluations the same")
    only = sorted(first.timings.keys() ^ second.timings.keys())
    changed = sorted(name for name in first.labels if first.labels[name] != second.labels.get(name))
    if only or changed or not first.timings:
        what = f"{(only or changed)[0]!r} is not the same in both" if only or changed else "neither has a stream"
        raise CompareError(f"the evaluations are not of the same dialogues: {what}; grade both on one file")
    names = sorted(first.timings)
    return compare(
        [first.timings[name] for name in names],
        [second.timings[name] for name in names],
        [first.videos[name] for name in names],
        draws,
        seed,
    )


def table(first: Graded, second: Graded, found: dict[str, Difference]) -> str:
    """The comparison as Markdown."""
    lines = [
        f"A: `{first.model}`, B: `{second.model}`; {len(first.timings)} streams of {len(set(first.videos.values()))} "
        "videos. B - A, and the interval that holds 95 % of it when the videos are drawn again.",
        "",
        "| | A | B | B - A | 95 % | p |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        interval = "-" if one.low is None else f"{_number(one.low)} to {_number(one.high)}"
        cells = [_number(one.first), _number(one.second), _number(one.difference), interval, _number(one.p)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=Path, metavar="FOLDER_A")
    parser.add_argument("second", type=Path, metavar="FOLDER_B")
    parser.add_argument("--draws", type=int, default=10_000, help="how often the videos are drawn (default: 10000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.draws < 1:
        parser.error(f"--draws is {options.draws}, expected 1 or more")
    try:
        first, second = read_graded(options.first), read_graded(options.second)
        print(table(first, second, differences(first, second, options.draws, options.seed)))
    except CompareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


if __name__ == "__main__":
    sys.exit(main())

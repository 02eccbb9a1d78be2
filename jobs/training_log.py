"""What a training run says about itself while it runs: `metrics.jsonl`, log lines, and a picture of both.

Only the first worker writes. A run that goes on from a checkpoint takes back the lines of the steps
that it repeats, so the file holds every step once.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path

from jobs.learner import Step

logger = logging.getLogger(__name__)


class TrainingLog:
    """Appends a line for every step from `step` on; `num_steps` is the length of the run."""

    def __init__(self, path: Path, step: int, num_steps: int) -> None:
        self.path = path
        self.num_steps = num_steps
        self.first = step
        self.started = self.last = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_log(path) if record["step"] < step] if path.exists() else []
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def add(self, step: Step) -> None:
        """One optimizer step that just ended."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        record = asdict(step) | {"seconds": round(seconds, 4), "tokens_per_s": round(step.tokens / seconds, 1)}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        done = step.step + 1 - self.first
        left = (now - self.started) / done * (self.num_steps - step.step - 1)
        logger.info(
            "step=%d/%d loss=%.4f text_loss=%s stream_loss=%s learning_rate=%.3g gradient_norm=%.3g "
            "tokens_per_s=%.0f eta_s=%.0f",
            step.step + 1,
            self.num_steps,
            step.loss,
            _digits(step.text_loss),
            _digits(step.stream_loss),
            step.learning_rate,
            step.gradient_norm,
            record["tokens_per_s"],
            left,
        )


def _digits(number: float | None) -> str:
    return "-" if number is None else f"{number:.4f}"


def read_log(path: Path) -> list[dict[str, float]]:
    """The records of a metrics file; a line that a kill cut short is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: left out an incomplete line", path)
    return records


def plot_log(path: Path, picture: Path) -> None:
    """Loss and learning rate over the steps of a metrics file, as a PNG."""
    from matplotlib.figure import Figure

    records = read_log(path)
    steps = [record["step"] + 1 for record in records]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    losses = figure.subplots()
    losses.plot(steps, [record["loss"] for record in records], color="tab:blue")
    losses.set(xlabel="optimizer step", ylabel="loss per learned token", ylim=(0, None))
    losses.grid(alpha=0.3)
    rates = losses.twinx()
    rates.plot(steps, [record["learning_rate"] for record in records], color="tab:gray", linewidth=0.8)
    rates.set_ylabel("learning rate", color="tab:gray")
    figure.savefig(picture, dpi=120)

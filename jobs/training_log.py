"""What a training run says about itself while it runs: `metrics.jsonl`, log lines, TensorBoard, and a picture.

Only the first worker writes. A run that goes on from a checkpoint takes back the lines of the steps
that it repeats, so the file holds every step once.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from tensorboardX import SummaryWriter

from jobs.learner import Step
from jobs.run_folder import RunFolder

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
TENSORBOARD = "tensorboard"
UPLOAD_S = 60  # between two uploads of a growing file to a storage that cannot append

Record = dict[str, float | None]


class TrainingLog:
    """Notes every step from `step` on; `num_steps` is the length of the run. A context manager."""

    def __init__(self, folder: RunFolder, step: int, num_steps: int) -> None:
        self.folder = folder
        self.num_steps = num_steps
        self.first = step
        self.started = self.last = self.uploaded = time.monotonic()
        self.records = [record for record in read_log(folder) if int(record["step"] or 0) < step]
        folder.write(METRICS_FILE, "".join(json.dumps(record) + "\n" for record in self.records))
        self._temporary = tempfile.TemporaryDirectory(prefix="videollm-") if folder.remote else None
        events = self._temporary.name if self._temporary else str(Path(folder.path) / TENSORBOARD)
        self.board = SummaryWriter(events, purge_step=step, flush_secs=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.board.close()
        self.upload()
        if self._temporary:
            self._temporary.cleanup()

    def add(self, step: Step) -> None:
        """One optimizer step that just ended."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        speed = {"seconds": round(seconds, 4), "tokens_per_s": round(step.tokens / seconds, 1)}
        self._write(asdict(step) | speed)
        done = step.step + 1 - self.first
        left = (now - self.started) / done * (self.num_steps - step.step - 1)
        logger.info(
            "step=%d/%d loss=%.4f text_loss=%s stream_loss=%s learning_rate=%.3g gradient_norm=%.3g "
            "tokens_per_s=%.0f eta=%s",
            step.step + 1,
            self.num_steps,
            step.loss,
            _digits(step.text_loss),
            _digits(step.stream_loss),
            step.learning_rate,
            step.gradient_norm,
            speed["tokens_per_s"],
            duration(left),
        )

    def add_validation(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """What the model of after `step` steps is worth on dialogues it does not learn."""
        self._write({"step": step - 1} | {f"validation_{name}": value for name, value in metrics.items()})
        shown = " ".join(f"{name}={_digits(value)}" for name, value in metrics.items())
        logger.info("validation after step %d: %s", step, shown)
        self.last = time.monotonic()

    def upload(self) -> None:
        """Bring a remote folder up to date; a local one always is."""
        if self._temporary is not None:
            self.folder.write(METRICS_FILE, "".join(json.dumps(record) + "\n" for record in self.records))
            self.board.flush()
            self.folder.put(Path(self._temporary.name), TENSORBOARD)
            self.uploaded = time.monotonic()

    def _write(self, record: Record) -> None:
        self.records.append(record)
        for name, value in record.items():
            if name != "step" and value is not None:
                place = "validation/" + name.removeprefix("validation_") if "validation" in name else f"train/{name}"
                self.board.add_scalar(place, value, int(record["step"] or 0) + 1)
        if not self.folder.remote:
            self.folder.append(METRICS_FILE, json.dumps(record) + "\n")
        elif time.monotonic() - self.uploaded > UPLOAD_S:
            self.upload()


def read_log(folder: RunFolder) -> list[Record]:
    """The records of a run; a line that a kill cut short is left out."""
    records = []
    for line in folder.read(METRICS_FILE).splitlines() if folder.exists(METRICS_FILE) else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: left out an incomplete line", folder.name(METRICS_FILE))
    return records


def plot_log(folder: RunFolder) -> None:
    """Losses, rates and validation over the steps of a run, as a PNG beside its metrics."""
    from matplotlib.figure import Figure

    records = read_log(folder)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, timing = figure.subplots(1, 2)
    for name, color in (("loss", "black"), ("text_loss", "tab:blue"), ("stream_loss", "tab:orange")):
        label = name.replace("_", " ")
        losses.plot(*_series(records, name), color=color, label=label, linewidth=1.8 if name == "loss" else 1)
        steps, values = _series(records, f"validation_{name}")
        if steps:
            losses.plot(steps, values, "o--", color=color, label=f"validation {label}", markersize=4, linewidth=0.8)
    losses.set(xlabel="optimizer step", ylabel="cross-entropy per learned token", ylim=(0, None))
    losses.grid(alpha=0.3)
    losses.legend(fontsize=8)
    timing.plot(*_series(records, "tokens_per_s"), color="tab:green", linewidth=1)
    timing.set(xlabel="optimizer step", ylim=(0, None))
    timing.set_ylabel("trained tokens a second", color="tab:green")
    timing.grid(alpha=0.3)
    rates = timing.twinx()
    rates.plot(*_series(records, "learning_rate"), color="tab:gray", linewidth=0.8)
    rates.set_ylabel("learning rate", color="tab:gray")
    rates.ticklabel_format(axis="y", scilimits=(0, 0))
    with tempfile.TemporaryDirectory() as temporary:
        picture = Path(temporary) / CURVES_FILE
        figure.savefig(picture, dpi=110)
        folder.put(picture, CURVES_FILE)


def duration(seconds: float) -> str:
    """`2:05:09`."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _series(records: list[Record], name: str) -> tuple[list[float], list[float]]:
    points = [((record["step"] or 0) + 1, record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points if value is not None]


def _digits(number: float | None) -> str:
    return "-" if number is None else f"{number:.4f}"

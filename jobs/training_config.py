"""The settings of a training run, and what follows from them alone: steps and learning rates."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from actors.adapter import AdapterConfig
from actors.config import ConfigError, Section
from actors.objective import Objective

Metric = Literal["loss", "text_loss", "stream_loss", "lm_ppl", "time_diff", "fluency", "lm_correctness"]
MORE_IS_BETTER = {"fluency", "lm_correctness"}


class TrainingConfig(Section):
    """How a model is fine-tuned; the defaults are the public reference's narration recipe."""

    name: str = Field(default="run", min_length=1, description="of the run; its files are in training.folder/name")
    folder: str = Field(default="runs", description="holds the runs; a path, or a URL such as s3://bucket/runs")
    dry_run: bool = Field(default=False, description="only print the plan, and what memory and time it needs")
    objective: Objective = Field(
        default="streaming", description="streaming is the paper's; the others are those it is compared with"
    )
    adapter: AdapterConfig = Field(default=AdapterConfig(), description="LoRA; the connector is always trained fully")
    epochs: float = Field(default=2, gt=0)
    max_steps: int | None = Field(default=None, ge=1, description="optimizer steps, instead of epochs")
    stop_at: int | None = Field(
        default=None, ge=1, description="end after so many steps, as if all were done; the same run can go on later"
    )
    batch_size: int = Field(default=64, ge=1, description="dialogues in one optimizer step, of all workers together")
    pack_tokens: int = Field(
        default=4096,
        ge=1,
        description="dialogues share a forward pass until they have this many positions; a longer one has its own. "
        "Changes speed and memory, not what is learned",
    )
    max_tokens: int | None = Field(
        default=None, ge=16, description="positions of the longest dialogue, clipped behind; null is the LLM's limit"
    )
    recompute: bool = Field(
        default=False, description="gradient checkpointing: a third more time for a fraction of the memory"
    )
    learning_rate: float = Field(default=2e-4, gt=0)
    connector_learning_rate: float | None = Field(default=None, gt=0, description="null: as learning_rate")
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps in which the rate rises")
    weight_decay: float = Field(default=0, ge=0)
    max_gradient_norm: float = Field(default=1, gt=0)
    keep_silence: float = Field(
        default=1, gt=0, le=1, description="share of the silent frames that are learned, others each epoch"
    )
    balance_stream: bool = Field(
        default=False, description="weigh frames so that silence and speaking count alike; otherwise each frame does"
    )
    seed: int = 0
    workers: int = Field(default=1, ge=1)
    cpus_per_worker: float = Field(default=0.5, gt=0, description="logical CPUs of Ray, not threads")
    gpu: bool = Field(default=False, description="give each worker one GPU")
    threads: int = Field(
        default=1, ge=1, description="of torch in a worker on CPUs; more than the cores it has to itself is far slower"
    )
    validate_every: int | None = Field(
        default=None, ge=1, description="steps between two validations, and after the last; null: none"
    )
    validation_dialogues: int = Field(default=64, ge=1, description="of the validation split, at most")
    checkpoint_every: int = Field(
        default=100, ge=1, description="steps; also saved are every validation's and the last one"
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="the last ones; with keep_best, the best and the last")
    keep_best: Metric | None = Field(
        default=None, description="keep the checkpoints with the best validation value of this, the best as best/"
    )
    max_failures: int = Field(default=2, ge=0, description="times a killed worker is replaced")

    def num_steps(self, num_dialogues: int) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps or math.ceil(self.epochs * num_dialogues / self.batch_size)

    def check(self) -> None:
        """Raises ConfigError for settings that contradict each other."""
        if self.keep_best is not None and self.validate_every is None:
            raise ConfigError(f"training.keep_best is {self.keep_best}, but nothing is validated: set validate_every")
        if self.batch_size < self.workers:
            raise ConfigError(
                f"training.batch_size is {self.batch_size}, fewer dialogues than training.workers {self.workers}: "
                "make it a multiple of the workers"
            )


# Settings that do not change what is learned, so that a run may go on with others.
FREE = {
    "stop_at",
    "folder",
    "dry_run",
    "workers",
    "cpus_per_worker",
    "gpu",
    "threads",
    "pack_tokens",
    "recompute",
    "validate_every",
    "validation_dialogues",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_best",
    "max_failures",
}

Part = Literal["adapter", "connector"]


def learning_rate(step: int, num_steps: int, config: TrainingConfig, part: Part = "adapter") -> float:
    """Linear warm-up to the part's peak, then half a cosine to zero after the last step."""
    peak = config.learning_rate
    if part == "connector" and config.connector_learning_rate is not None:
        peak = config.connector_learning_rate
    warmup = math.ceil(config.warmup * num_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))

"""One training worker: its copy of the model, the optimizer, and what a step does with its share of a batch.

Workers hold the same parameters and differ in the dialogues they take. A step's loss is the mean over
every learned position of the whole batch, across workers and accumulated parts, so neither their
number nor the size of the parts changes what is learned. Which dialogues a step takes and the noise of
dropout are functions of the step: a worker restored from a saved state goes on as if never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from actors.adapter import AdapterConfig
from actors.config import ConfigError, Section
from actors.model import VideoLLM
from actors.objective import Objective
from jobs.dataset import Sample, TrainingSet, batch_of, step_order


class TrainingError(RuntimeError):
    """Training cannot go on; says at which step and with which dialogues."""


class TrainingConfig(Section):
    """How a model is fine-tuned; the defaults are the public reference's narration recipe."""

    name: str = Field(default="run", min_length=1, description="of the run; its files are in training.folder/name")
    folder: str = Field(default="runs", description="holds the runs")
    objective: Objective = Field(
        default="streaming", description="streaming is the paper's; the others are those it is compared with"
    )
    adapter: AdapterConfig = Field(default=AdapterConfig(), description="LoRA; the connector is always trained fully")
    epochs: float = Field(default=2, gt=0)
    max_steps: int | None = Field(default=None, ge=1, description="optimizer steps, instead of epochs")
    batch_size: int = Field(default=64, ge=1, description="dialogues in one optimizer step, of all workers together")
    forward_size: int = Field(default=1, ge=1, description="dialogues in one forward pass of one worker")
    learning_rate: float = Field(default=2e-4, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps in which the rate rises")
    weight_decay: float = Field(default=0, ge=0)
    max_gradient_norm: float = Field(default=1, gt=0)
    seed: int = 0
    workers: int = Field(default=1, ge=1)
    cpus_per_worker: float = Field(default=0.5, gt=0, description="logical CPUs of Ray, not threads")
    gpu: bool = Field(default=False, description="give each worker one GPU")
    threads: int = Field(
        default=1, ge=1, description="of torch in a worker on CPUs; more than the cores it has to itself is far slower"
    )
    checkpoint_every: int = Field(default=100, ge=1, description="steps; the last one is always saved")
    keep_checkpoints: int = Field(default=2, ge=1)
    max_failures: int = Field(default=2, ge=0, description="times a killed worker is replaced")

    def num_steps(self, num_dialogues: int) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps or math.ceil(self.epochs * num_dialogues / self.batch_size)

    def check(self) -> None:
        """Raises ConfigError unless the batch divides evenly among workers and forward passes."""
        share = self.workers * self.forward_size
        if self.batch_size % share:
            raise ConfigError(
                f"training.batch_size is {self.batch_size}, expected a multiple of workers x forward_size = "
                f"{self.workers} x {self.forward_size}"
            )


@dataclass(frozen=True)
class Step:
    """What one optimizer step did; `loss` is the mean over `labels` learned positions of all workers."""

    step: int
    loss: float
    labels: int
    tokens: int
    learning_rate: float
    gradient_norm: float


def learning_rate(step: int, num_steps: int, config: TrainingConfig) -> float:
    """Linear warm-up to the peak, then half a cosine to zero after the last step."""
    warmup = math.ceil(config.warmup * num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))


class Learner:
    """Trains what requires a gradient in `module`: a VideoLLM, or one wrapped for distributed training."""

    def __init__(
        self,
        module: nn.Module,
        data: TrainingSet,
        config: TrainingConfig,
        rank: int = 0,
        workers: int = 1,
    ) -> None:
        self.module = module
        self.model = cast(VideoLLM, module.module if isinstance(module, DistributedDataParallel) else module)
        self.data = data
        self.config = config
        self.rank = rank
        self.workers = workers
        self.num_steps = config.num_steps(len(data))
        self.step = 0
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), weight_decay=config.weight_decay)

    def take_step(self) -> Step:
        """One optimizer step. Raises TrainingError where the loss is not finite."""
        step, config = self.step, self.config
        torch.manual_seed((config.seed * 1_000_003 + step) * 1_009 + self.rank)
        self.module.train()
        order = step_order(len(self.data), config.batch_size, step, config.seed)
        samples = [self.data[index] for index in order[self.rank :: self.workers]]
        labels, tokens = self._total(
            [sum(s.num_labels for s in samples), sum(len(s.rendered.input_ids) for s in samples)]
        )
        loss = self._accumulate(samples, labels)
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), config.max_gradient_norm))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingError(
                f"step {step}: loss {loss}, gradient norm {norm}, with dialogues "
                f"{', '.join(sample.dialogue_id for sample in samples)}: lower training.learning_rate, or look at them"
            )
        rate = learning_rate(step, self.num_steps, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return Step(step, self._mean(loss), int(labels), int(tokens), rate, norm)

    def save(self, path: Path) -> None:
        """All that the rest of the run depends on."""
        parameters = {name: parameter.detach() for name, parameter in self.parameters.items()}
        torch.save({"step": self.step, "parameters": parameters, "optimizer": self.optimizer.state_dict()}, path)

    def restore(self, path: Path) -> None:
        """Go on from `save`. Raises TrainingError if it was another model's."""
        state = torch.load(path, map_location=self.model.device, weights_only=True)
        shapes = [{name: p.shape for name, p in group.items()} for group in (state["parameters"], self.parameters)]
        if shapes[0] != shapes[1]:
            odd = sorted(
                name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)
            )
            raise TrainingError(
                f"{path} was saved by another model: {odd[0]} is {shapes[0].get(odd[0])} there and "
                f"{shapes[1].get(odd[0])} here: give another training.name"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def _accumulate(self, samples: Sequence[Sample], labels: float) -> float:
        """Gradients of the samples' share of the batch's mean loss; returns that share times the workers."""
        size = self.config.forward_size
        parts = [samples[start : start + size] for start in range(0, len(samples), size)]
        total = 0.0
        for number, part in enumerate(parts, start=1):
            with self._unsynchronized() if number < len(parts) else nullcontext():
                loss = self._loss(part, labels / self.workers)
                loss.backward()
            total += float(loss.detach())
        return total

    def _loss(self, samples: Sequence[Sample], denominator: float) -> Tensor:
        device, template = self.model.device, self.data.template
        batch, frames = batch_of(samples, template.eos_id)
        padded = not bool(batch.attention_mask.all())
        mixed = self.model.llm.dtype == torch.bfloat16
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed):
            loss: Tensor = self.module(
                batch.input_ids.to(device),
                frames.to(device),
                attention_mask=batch.attention_mask.to(device) if padded else None,
                labels=batch.labels.to(device),
                # Distributed gradients are averaged over workers: each counts its share of the labels.
                denominator=denominator,
            ).loss
        return loss

    def _unsynchronized(self) -> AbstractContextManager[None]:
        return self.module.no_sync() if isinstance(self.module, DistributedDataParallel) else nullcontext()

    def _total(self, numbers: Sequence[float]) -> list[float]:
        """The sum of each number over workers."""
        total = torch.tensor(numbers, dtype=torch.float64)
        if self.workers > 1:
            device = self.model.device
            total = total.to(device)
            torch.distributed.all_reduce(total)
        return [float(number) for number in total]

    def _mean(self, number: float) -> float:
        return self._total([number])[0] / self.workers

"""One training worker: its copy of the model, the optimizer, and what a step does with its share of a batch.

Workers hold the same parameters and differ in the packs they compute. A step's loss is the mean over every
learned position of the whole batch, across workers and packs: gradients are summed, exchanged once a step
(each worker may have another number of packs), and divided by the number of labels. So neither the number of
workers nor the size of packs changes what is learned. What a step takes, and the noise of dropout in it, are
functions of the step: a worker restored from a saved state goes on as if never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed
from torch import nn

from actors.model import VideoLLM
from jobs.dataset import PackedSamples, TrainingSet
from jobs.lookahead import Lookahead
from jobs.plan import Pack, Plan
from jobs.training_config import Part, TrainingConfig, learning_rate

PACKS_AHEAD = 2  # read and rendered while the model computes
EXCHANGED = 2**24  # numbers that travel between workers at once


class TrainingError(RuntimeError):
    """Training cannot go on; says at which step and with which dialogues."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did, over all workers.

    `loss` is the mean over `labels` learned positions, as weighted; `text_loss` and `stream_loss` are the plain
    cross-entropies of words and of decisions at frames, none where a step has no such label.
    """

    step: int
    loss: float
    text_loss: float | None
    stream_loss: float | None
    labels: int
    stream_labels: int
    tokens: int
    packs: int
    learning_rate: float
    gradient_norm: float


@dataclass
class _Sums:
    """What adds up over packs and workers."""

    weighted: float = 0
    text: float = 0
    stream: float = 0
    labels: float = 0
    stream_labels: float = 0
    tokens: float = 0
    packs: float = 0


class Learner:
    """Trains what requires a gradient in `model`, by `plan` over `data`."""

    def __init__(
        self,
        model: VideoLLM,
        data: TrainingSet,
        plan: Plan,
        config: TrainingConfig,
        rank: int = 0,
        workers: int = 1,
    ) -> None:
        self.model = model
        self.data = data
        self.plan = plan
        self.config = config
        self.rank = rank
        self.workers = workers
        self.num_steps = plan.num_steps
        self.step = 0
        self.stream_weights = plan.stream_weights(model.config.stream_loss_weight)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups: dict[Part, list[nn.Parameter]] = {"adapter": [], "connector": []}
        for name, parameter in self.parameters.items():
            groups["connector" if name.startswith("connector.") else "adapter"].append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters, "part": part} for part, parameters in groups.items() if parameters],
            weight_decay=config.weight_decay,
        )

    def take_step(self) -> Step:
        """One optimizer step. Raises TrainingError where the loss is not finite."""
        step, config = self.step, self.config
        self.model.train()
        sums, odd = self._accumulate(step)
        self._exchange(sums)
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad /= sums.labels
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), config.max_gradient_norm))
        loss = sums.weighted / sums.labels
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise TrainingError(self._explain(step, loss, norm, odd))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.num_steps, config, group["part"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        text_labels = sums.labels - sums.stream_labels
        return Step(
            step=step,
            loss=loss,
            text_loss=sums.text / text_labels if text_labels else None,
            stream_loss=sums.stream / sums.stream_labels if sums.stream_labels else None,
            labels=int(sums.labels),
            stream_labels=int(sums.stream_labels),
            tokens=int(sums.tokens),
            packs=int(sums.packs),
            learning_rate=learning_rate(step, self.num_steps, config),
            gradient_norm=norm,
        )

    def save(self, path: Path) -> None:
        """All that the rest of the run depends on; rates, order and noise follow from the step."""
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

    def _accumulate(self, step: int) -> tuple[_Sums, list[str]]:
        """Gradients of the sum over this worker's packs, their sums, and the dialogues of packs that went wrong."""
        sums, odd = _Sums(), list[str]()
        recompute = self.config.recompute
        losses, names = list[torch.Tensor](), list[tuple[str, ...]]()
        with Lookahead(self._packs(self.plan.share(step, self.rank, self.workers)), PACKS_AHEAD) as ahead:
            for number, samples in ahead:
                # Of the pack, not of the worker: the same noise however packs are shared out.
                torch.manual_seed((self.config.seed * 1_000_003 + step) * 1_009 + number)
                pack = samples.packed.to(self.model.device)
                loss = self.model.packed_loss(
                    pack, samples.frames.to(self.model.device), samples.weights.to(self.model.device), recompute
                )
                loss.weighted.backward()
                losses.append(torch.stack([part.detach().double() for part in loss]))
                names.append(samples.dialogue_ids)
                sums.labels += samples.text_labels + samples.stream_labels
                sums.stream_labels += samples.stream_labels
                sums.tokens += sum(pack.dialogue_lengths)
                sums.packs += 1
        found = torch.stack(losses).tolist() if losses else []
        for (weighted, text, stream), dialogues in zip(found, names, strict=True):
            sums.weighted += weighted
            sums.text += text
            sums.stream += stream
            if not math.isfinite(weighted):
                odd += dialogues
        return sums, odd

    def _packs(self, packs: list[Pack]) -> Iterator[tuple[int, PackedSamples]]:
        for one in packs:
            yield (
                one.number,
                self.data.packed(one.picks, self.stream_weights, self.config.keep_silence, self.config.seed),
            )

    def _exchange(self, sums: _Sums) -> None:
        """Sum numbers and gradients over workers, in place."""
        if self.workers == 1:
            return
        device = self.model.device
        numbers = torch.tensor(list(vars(sums).values()), dtype=torch.float64, device=device)
        torch.distributed.all_reduce(numbers)
        for name, number in zip(vars(sums), numbers.tolist(), strict=True):
            setattr(sums, name, number)
        gradients = []
        for parameter in self.parameters.values():
            if parameter.grad is None:  # this worker had no pack
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            torch.distributed.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, summed in zip(bucket, parts, strict=True):
                gradient.copy_(summed.view_as(gradient))

    def _explain(self, step: int, loss: float, norm: float, odd: list[str]) -> str:
        """What went wrong and where; every worker raises the same."""
        found = [(odd, [name for pack in self.plan.share(step, self.rank, self.workers) for name in self._names(pack)])]
        if self.workers > 1:
            found = found * self.workers
            torch.distributed.all_gather_object(found, found[self.rank])
        guilty = [name for wrong, _ in found for name in wrong] or [name for _, all_ in found for name in all_]
        return (
            f"step {step}: loss {loss}, gradient norm {norm}, with dialogues {', '.join(guilty)}: "
            "lower training.learning_rate, or look at them"
        )

    def _names(self, pack: Pack) -> list[str]:
        return [self.data.dialogues[pick.index].dialogue_id for pick in pack.picks]


def _buckets(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket, size = list[torch.Tensor](), 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel()
        if size >= EXCHANGED:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket

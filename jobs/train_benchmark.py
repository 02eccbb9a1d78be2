"""Packed training against the public reference's loop, on the same dialogues, order, weights and machine.

The loop: one dialogue after another through the LLM's own modules under PEFT, logits at every position, gradients
accumulated over the batch. Both train a copy of the same model, step by step in turn, so that whatever else the
machine does slows both; and both report the loss of every step, which must be the same. Dialogues are made up,
frame tokens random: speed depends on neither.
"""

from __future__ import annotations

import logging
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from actors import checkpoint
from actors.config import Config
from actors.dialogue import collate
from actors.model import VideoLLM, streaming_loss
from actors.runtime import limit_threads, native_dtype
from jobs.annotations import Moment, VideoAnnotation
from jobs.dataset import TrainingSet
from jobs.dialogues import DataConfig, Dialogue, narrate
from jobs.engine_benchmark import cpu_name
from jobs.frame_store import FrameStore, StoreInfo
from jobs.learner import Learner
from jobs.plan import Pick, Plan, step_order
from jobs.training_config import TrainingConfig, learning_rate

logger = logging.getLogger(__name__)

WORDS = ("you", "open", "the", "red", "box", "take", "a", "cup", "put", "it", "cut", "onion", "wash", "hands", "pour")


@dataclass(frozen=True)
class Turn:
    """One step of one way: seconds, trained positions and the loss before the step."""

    seconds: float
    tokens: int
    loss: float


@dataclass(frozen=True)
class TrainReport:
    """Steps of both ways in their order, without the first of each, which warms up; `machine` says where."""

    machine: dict[str, str | int | float]
    loop: list[Turn]
    packed: list[Turn]

    @property
    def ratio(self) -> float:
        """Trained positions a second, packed to loop."""
        return speed(self.packed[1:]) / speed(self.loop[1:])

    @property
    def loss_difference(self) -> float:
        """The largest between the two curves, relative."""
        return max(abs(a.loss - b.loss) / abs(b.loss) for a, b in zip(self.packed, self.loop, strict=True))

    def table(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.machine.items()]
        lines += ["", f"{'step':>5} {'loss, loop':>12} {'loss, packed':>13} {'loop, s':>9} {'packed, s':>10}"]
        for number, (loop, packed) in enumerate(zip(self.loop, self.packed, strict=True), start=1):
            lines.append(
                f"{number:>5} {loop.loss:>12.6f} {packed.loss:>13.6f} {loop.seconds:>9.2f} {packed.seconds:>10.2f}"
            )
        lines += [
            "",
            f"trained positions a second: loop {speed(self.loop[1:]):.1f}, packed {speed(self.packed[1:]):.1f}",
            f"{'met' if self.ratio >= 2 else 'MISSED':<7} times the loop: wanted 2, reached {self.ratio:.2f}",
            f"largest difference of the loss curves: {self.loss_difference:.1e} of the loss",
        ]
        return "\n".join(lines)

    def document(self) -> dict[str, object]:
        return {
            "machine": self.machine,
            "ratio": self.ratio,
            "loss_difference": self.loss_difference,
            "loop": [vars(turn) for turn in self.loop],
            "packed": [vars(turn) for turn in self.packed],
        }


def speed(turns: Sequence[Turn]) -> float:
    return sum(turn.tokens for turn in turns) / sum(turn.seconds for turn in turns)


def run(config: Config, steps: int, device: str = "cpu", dialogues: int = 64) -> TrainReport:
    """`steps` optimizer steps in both ways, after one that warms up."""
    settings = config.section("training", TrainingConfig).model_copy(update={"max_steps": steps + 1})
    limit_threads(settings.threads)
    clock = time.process_time if device == "cpu" and settings.threads == 1 else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        packed, loop = (_loaded(config, settings, device) for _ in range(2))
        data = made_up(config, packed, dialogues, Path(folder))
        plan = Plan([data.measure(index) for index in range(len(data))], settings)
        learner, reference = Learner(packed.model, data, plan, settings), _Loop(loop.model, data, settings)
        turns: dict[str, list[Turn]] = {"packed": [], "loop": []}
        for number in range(steps + 1):
            turns["loop"].append(_timed(lambda n=number: reference.step(n), clock))  # type: ignore[misc]
            turns["packed"].append(_timed(lambda: _packed_step(learner), clock))
            logger.info("step=%d loop_s=%.1f packed_s=%.1f", number, *(turns[way][-1].seconds for way in turns))
    about: dict[str, str | int | float] = {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "model": config.model.llm,
        "dtype": str(packed.model.base_llm.dtype).removeprefix("torch."),
        "device": device,
        "threads": settings.threads,
        "batch": settings.batch_size,
        "pack_tokens": settings.pack_tokens,
        "positions a dialogue": round(sum(one.tokens for one in plan.measured) / len(plan.measured), 1),
        "share of positions with a label": round(
            sum(one.labels for one in plan.measured) / sum(one.tokens for one in plan.measured), 3
        ),
    }
    return TrainReport(about, turns["loop"], turns["packed"])


def made_up(config: Config, loaded: checkpoint.Loaded, count: int, folder: Path) -> TrainingSet:
    """Narrations of up to `data.max_frames` frames, something said every four seconds, over random frame tokens."""
    data, draws = config.section("data", DataConfig), random.Random(0)
    tokens, width = loaded.model.frame_shape
    info = StoreInfo(fingerprint=loaded.features, vision="made up", fps=data.fps, num_tokens=tokens, width=width)
    store = FrameStore.create(folder / "tokens", info)
    made: list[Dialogue] = []
    generator = torch.Generator().manual_seed(0)
    with store.locked():
        for number in range(count):
            frames = draws.randint(max(2, data.max_frames // 4), data.max_frames)
            times = [0.0, *sorted(draws.uniform(0, frames / data.fps) for _ in range(round(frames / data.fps / 4)))]
            moments = tuple(
                Moment(time=at, text=" ".join(draws.choices(WORDS, k=draws.randint(4, 10)))) for at in times
            )
            name = f"made-up-{number}"
            row = VideoAnnotation(video_id=name, video=f"{name}.mp4", moments=moments, source="benchmark")
            made += narrate(row, frames, frames / data.fps, data).dialogues
            with store.writer(name) as writer:
                drawn = torch.randn(frames, tokens, width, generator=generator).half()
                writer.append([frame / data.fps for frame in range(frames)], drawn)
                writer.commit()
    return TrainingSet(made, store, loaded.template)


class _Loop:
    """The reference's way to take a step."""

    def __init__(self, model: VideoLLM, data: TrainingSet, settings: TrainingConfig) -> None:
        self.model = model
        self.data = data
        self.settings = settings
        self.learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learned, weight_decay=settings.weight_decay)

    def step(self, number: int) -> tuple[int, float]:
        """Positions of the step, and its mean loss."""
        settings, model = self.settings, self.model
        model.train()
        picks: list[Pick] = step_order(len(self.data), settings.batch_size, number, settings.seed)
        samples = [self.data[pick.index] for pick in picks]
        labels, total = sum(sample.num_labels for sample in samples), 0.0
        mixed = torch.autocast(model.device.type, torch.bfloat16, enabled=model.llm.dtype == torch.bfloat16)
        for sample in samples:
            batch = collate([sample.rendered], self.data.template.eos_id)
            ids = batch.input_ids.to(model.device)
            with mixed:
                logits = model(ids, sample.frames.to(model.device)).logits
            at_frame = torch.eq(ids, model.frame_id)
            targets = batch.labels.to(model.device)
            loss = streaming_loss(logits, targets, at_frame, model.config.stream_loss_weight, labels)
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(self.learned, settings.max_gradient_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, settings.max_steps or 1, settings)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sum(len(sample.rendered.input_ids) for sample in samples), total


def _packed_step(learner: Learner) -> tuple[int, float]:
    step = learner.take_step()
    return step.tokens, step.loss


def _timed(step: Callable[[], tuple[int, float]], clock: Callable[[], float]) -> Turn:
    start = clock()
    tokens, loss = step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Turn(clock() - start, tokens, loss)


def _loaded(config: Config, settings: TrainingConfig, device: str) -> checkpoint.Loaded:
    dtype = native_dtype(getattr(torch, config.model.dtype), device)
    return checkpoint.untrained(config.model, settings.seed, device, dtype, settings.adapter)

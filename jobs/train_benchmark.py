"""Packed training against the public reference's loop, on the same dialogues, order, weights and machine.

The loop: one dialogue after another through the LLM's own modules under PEFT, logits at every position, gradients
accumulated over the batch, layers recomputed in the backward (its scripts say `--gradient_checkpointing True`); and
the same without recomputing. All ways train a copy of the same model, step by step in turn, so that whatever else the
machine does slows all; and they report the loss of every step, which must be the same. Dialogues are made up, frame
tokens random: speed depends on neither. What matrix products alone would take is measured beside.
"""

from __future__ import annotations

import logging
import random
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from actors import checkpoint
from actors.config import Config
from actors.dialogue import IGNORED, collate
from actors.model import VideoLLM, streaming_loss
from actors.runtime import limit_threads, native_dtype
from jobs.annotations import Moment, VideoAnnotation
from jobs.dataset import TrainingSet
from jobs.dialogues import DataConfig, Dialogue, narrate
from jobs.frame_store import FrameStore, StoreInfo
from jobs.learner import Learner
from jobs.machine import cpu_name
from jobs.plan import Pick, Plan, step_order
from jobs.train_report import Arithmetic, TrainReport, Turn
from jobs.training_config import TrainingConfig, learning_rate

logger = logging.getLogger(__name__)

WORDS = ("you", "open", "the", "red", "box", "take", "a", "cup", "put", "it", "cut", "onion", "wash", "hands", "pour")


def run(config: Config, steps: int, device: str = "cpu", dialogues: int = 64) -> TrainReport:
    """`steps` optimizer steps in both ways, after one that warms up."""
    settings = config.section("training", TrainingConfig).model_copy(update={"max_steps": steps + 1})
    limit_threads(settings.threads)
    clock = time.process_time if device == "cpu" and settings.threads == 1 else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        packed, loop, kept = (_loaded(config, settings, device) for _ in range(3))
        data = made_up(config, packed, dialogues, Path(folder))
        plan = Plan([data.measure(index) for index in range(len(data))], settings)
        arithmetic = _arithmetic(packed.model, data, plan, clock)
        learner = Learner(packed.model, data, plan, settings)
        loops = {
            "loop": _Loop(loop.model, data, settings, recompute=True),
            "loop_kept": _Loop(kept.model, data, settings),
        }
        turns: dict[str, list[Turn]] = {**{way: [] for way in loops}, "packed": []}
        for number in range(steps + 1):
            for way, reference in loops.items():
                turns[way].append(_timed(partial(reference.step, number), clock))
            turns["packed"].append(_timed(lambda: _packed_step(learner), clock))
            logger.info("step=%d %s", number, " ".join(f"{way}_s={turns[way][-1].seconds:.1f}" for way in turns))
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
    return TrainReport(about, turns, arithmetic)


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

    def __init__(self, model: VideoLLM, data: TrainingSet, settings: TrainingConfig, recompute: bool = False) -> None:
        self.model = model
        if recompute:
            model.base_llm.activation_checkpointing_enable({"use_reentrant": False})
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


def _arithmetic(model: VideoLLM, data: TrainingSet, plan: Plan, clock: Callable[[], float]) -> Arithmetic:
    """Matrix products of the decoder and the head, attention left out; measured on the widest of a layer's.

    Frozen weights cost a forward and the gradient of their inputs, an adapter that of itself, too.
    """
    decoder = model.base_llm.get_decoder()
    named = [(name, p) for name, p in decoder.layers.named_parameters() if p.ndim == 2]
    lora = sum(p.numel() for name, p in named if ".lora_" in name)
    frozen = sum(p.numel() for name, p in named if ".lora_" not in name)
    head = model.base_llm.get_output_embeddings().weight.numel()
    step = [data.packed(pack.picks, (1, 1), 1, 0).packed for pack in plan.packs(1)]
    trained = sum(sum(pack.dialogue_lengths) for pack in step)
    rows, labels = sum(len(pack.input_ids) for pack in step), sum(int((pack.labels != IGNORED).sum()) for pack in step)
    layers, heads = 4 * frozen + 6 * lora, 4 * head
    needed = {
        "loop": layers + 2 * (frozen + lora) + heads,
        "loop_kept": layers + heads,
        "packed": (rows * layers + labels * heads) / trained,
    }
    widest = max((p for _, p in named), key=Tensor.numel).detach()
    inputs = torch.randn(512, widest.shape[1], dtype=widest.dtype, device=widest.device)
    seconds = []
    for _ in range(5):
        start = clock()
        for _ in range(10):
            result = inputs @ widest.t()
        float(result[0, 0])
        seconds.append(clock() - start)
    gflops = 10 * 2 * len(inputs) * widest.numel() / min(seconds) / 1e9
    return Arithmetic({way: count / 1e9 for way, count in needed.items()}, gflops)


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

"""What a training run will do and need, told beforehand: `python -m jobs.train ... --dry-run`.

No weights are loaded or downloaded: an LLM's settings file says how large it is. Memory is counted from the
tensors that a step of this project's forward keeps; time from the matrix products in it, at the rate this
machine shows for such products now.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from actors.adapter import AdapterConfig, matches
from actors.causal_lm import EMBEDDED, causal_lm_folder, load_tokenizer
from actors.config import Config, ModelConfig
from actors.dialogue import Template
from actors.model import LOGIT_ROWS
from actors.runtime import limit_threads, native_dtype
from jobs.benchmark_models import VISION_WIDTH, llama_sizes
from jobs.dataset import TrainingSet
from jobs.dialogue_files import DialogueFileError, read_dialogues
from jobs.dialogues import DataConfig
from jobs.encode_frames import StoreConfig
from jobs.frame_store import FrameStore, StoreError
from jobs.plan import Plan
from jobs.training_config import TrainingConfig
from jobs.training_log import duration
from jobs.training_run import check_held_out, measured_plan
from jobs.validation import Validation

GPU_RATE = 150e12  # assumed where none is here to be measured: what bfloat16 products of an A100 reach
ELSE = 1.5  # all of a step, to its matrix products
SAMPLED_STEPS = 50


@dataclass(frozen=True)
class Dimensions:
    """Of an LLM and what is trained in it, in numbers; `body` are the parameters of the decoder's layers."""

    layers: int
    hidden: int
    kv: int
    mlp: int
    vocabulary: int
    total: int
    body: int
    lora: int
    connector: int


def dry_run(config: Config) -> str:
    """Plan, memory and time of the run that `config` describes, as text.

    Raises what training would raise before its first step, where there are data.
    """
    settings, model = config.section("training", TrainingConfig), config.model
    sizes, note = language_model(model.llm)
    store, missing = _store(config)
    width = store.info.width if store else VISION_WIDTH
    numbers = dimensions(sizes, settings.adapter, width)
    lines = [f"model {model.llm}: {numbers.total / 1e6:,.0f} M parameters, {note}"]
    lines.append(
        f"trained: LoRA of rank {settings.adapter.rank}, {numbers.lora / 1e6:,.1f} M parameters, "
        f"and the connector, {numbers.connector / 1e6:,.1f} M"
    )
    plan = None
    if store is not None:
        try:
            data = _data(config, store, sizes)
            plan = measured_plan(data, settings)
            lines += list(_plan_lines(plan, data))
        except DialogueFileError as error:
            missing = str(error)
    if plan is None:
        lines.append(f"no plan, for want of data: {missing}")
    elif store is not None:
        check_held_out(config, data)
        if settings.validate_every is not None:
            held_out = _data(config, store, sizes, "validation")
            chosen = Validation(held_out, settings.validation_dialogues, settings.seed)
            lines.append(f"validated on {chosen.dialogues} of {len(held_out)} dialogues")
    return "\n".join([*lines, *_memory_lines(config, numbers, plan), *_time_lines(config, numbers, plan)])


def language_model(name: str) -> tuple[PreTrainedConfig, str]:
    """The settings of an LLM, and where they are from; of sizes everybody knows without asking the hub."""
    known = {"meta-llama/Meta-Llama-3-8B-Instruct": "llama3-8b", "meta-llama/Llama-3.2-1B-Instruct": "llama3-1b"}
    if name in known and not Path(name).is_dir():
        return llama_sizes(known[name]), f"as {known[name]} is known to be"
    folder = causal_lm_folder(name) if name == EMBEDDED else name
    return AutoConfig.from_pretrained(folder), "by its config.json"


def dimensions(sizes: PreTrainedConfig, adapter: AdapterConfig, vision_width: int) -> Dimensions:
    """Counted on a model without memory."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(sizes)
    linear = {name: module for name, module in llm.named_modules() if isinstance(module, nn.Linear)}
    lora = sum(
        adapter.rank * (module.in_features + module.out_features)
        for name, module in linear.items()
        if matches(adapter.targets, name)
    )
    hidden = sizes.hidden_size
    head_width = getattr(sizes, "head_dim", None) or hidden // sizes.num_attention_heads
    return Dimensions(
        layers=sizes.num_hidden_layers,
        hidden=hidden,
        kv=sizes.num_key_value_heads * head_width,
        mlp=sizes.intermediate_size,
        vocabulary=sizes.vocab_size,
        total=sum(parameter.numel() for parameter in llm.parameters()),
        body=sum(module.weight.numel() for name, module in linear.items() if name != "lm_head"),
        lora=lora,
        connector=(vision_width + 1) * hidden + (hidden + 1) * hidden,
    )


def memory(
    numbers: Dimensions, model: ModelConfig, settings: TrainingConfig, tokens: int, labels: int, element: int
) -> dict[str, float]:
    """Bytes of one worker in a pack of `tokens` positions and `labels`, by what they are for."""
    n = numbers
    layer = 7 * n.hidden + 3 * n.kv + 3 * n.mlp
    kept = layer * element
    if settings.adapter.dropout:
        kept += (6 * n.hidden + n.mlp) * (element + 1)  # what each adapter was given, and which of it
    states = n.layers * n.hidden * element + kept if settings.recompute else n.layers * kept
    per_frame_token = 4 * (VISION_WIDTH + 3 * n.hidden)
    return {
        "weights of the LLM": n.total * element,
        "trained parameters, gradients, AdamW": (n.lora + n.connector) * 16,
        "states kept for the backward": tokens * (states + 2 * n.hidden * element + per_frame_token),
        "the layer at work": tokens * (4 * n.mlp + 3 * n.hidden) * element,
        "logits": min(labels, LOGIT_ROWS) * n.vocabulary * (3 * 4 + element) + labels * n.hidden * element,
    }


def operations(numbers: Dimensions, settings: TrainingConfig, tokens: int, labels: int, length: float) -> float:
    """Multiplications and additions in the matrix products of `tokens` positions in dialogues of `length`."""
    n, passes = numbers, 3 if settings.recompute else 2
    body = 2 * n.body * passes + 6 * n.lora
    attention = n.layers * n.hidden * length * 2 * (passes + 1.5)
    return tokens * (body + attention + 6 * n.connector) + labels * 2 * n.vocabulary * n.hidden * 2


def _plan_lines(plan: Plan, data: TrainingSet) -> Iterator[str]:
    measured, settings = plan.measured, plan.config
    total = Counter[str]()
    for one in measured:
        total.update(tokens=one.tokens, frames=one.frames, text=one.text, silent=one.silent, speaking=one.speaking)
    clipped = [one.clipped for one in measured if one.clipped]
    yield (
        f"data: {len(measured):,} dialogues of {len(data.video_ids()):,} videos, {total['frames']:,} frames, "
        f"{total['tokens']:,} positions, the longest {max(one.tokens for one in measured):,}"
    )
    yield from (f"left out: {line}" for line in data.left_out)
    yield f"labels: {total['text']:,} of text, {total['silent']:,} silent and {total['speaking']:,} speaking at frames"
    yield f"clipped to {data.max_tokens:,} positions: {len(clipped)} dialogues, {sum(clipped):,} positions left out"
    yield (
        f"plan: {plan.num_steps:,} steps of {settings.batch_size} dialogues "
        f"({plan.num_steps * settings.batch_size / len(measured):.2f} epochs) on {settings.workers} workers"
    )
    steps = range(min(plan.num_steps, SAMPLED_STEPS))
    packs = [one for step in steps for one in plan.packs(step)]
    tokens = sum(one.tokens for one in packs)
    room = sum(max(one.tokens, settings.pack_tokens) for one in packs)
    padded = sum(
        max(lengths) * len(lengths)
        for step in steps
        if (lengths := [measured[pick.index].tokens for one in plan.packs(step) for pick in one.picks])
    )
    yield (
        f"packs: {len(packs) / len(steps):.1f} a step, {tokens / len(packs):,.0f} positions each, no padding; "
        f"{tokens / room:.0%} of training.pack_tokens in use; one padded batch a step would be "
        f"{1 - tokens / padded:.0%} padding"
    )
    if idle := sum(not plan.share(step, rank, settings.workers) for step in steps for rank in range(settings.workers)):
        yield f"{idle} times in {len(steps)} steps a worker has no pack: lower training.pack_tokens or the workers"


def _memory_lines(config: Config, numbers: Dimensions, plan: Plan | None) -> Iterator[str]:
    settings = config.section("training", TrainingConfig)
    tokens = max([settings.pack_tokens, *(one.tokens for one in plan.measured)] if plan else [settings.pack_tokens])
    labels = round(tokens * _share_of_labels(plan))
    needed = memory(numbers, config.model, settings, tokens, labels, _element(config))
    yield f"memory of a worker, in a pack of {tokens:,} positions: {sum(needed.values()) / 2**30:,.1f} GiB"
    yield from (f"  {size / 2**30:8.2f} GiB  {what}" for what, size in needed.items())


def _time_lines(config: Config, numbers: Dimensions, plan: Plan | None) -> Iterator[str]:
    settings = config.section("training", TrainingConfig)
    rate, told = _rate(config, numbers)
    share, length = _share_of_labels(plan), 2000.0
    if plan is not None:
        lengths = [one.tokens for one in plan.measured]
        length = sum(n * n for n in lengths) / sum(lengths)
    each = operations(numbers, settings, 1, 0, length) + operations(numbers, settings, 0, 1, length) * share
    speed = rate / (each * ELSE)
    yield f"speed of a worker: about {speed:,.0f} positions a second, {told}"
    if plan is not None:
        tokens = sum(lengths) / len(lengths) * settings.batch_size * plan.num_steps
        yield f"time: about {duration(tokens / speed / settings.workers)} for {tokens:,.0f} positions"


def _share_of_labels(plan: Plan | None) -> float:
    if plan is None:
        return 0.2
    return sum(one.labels for one in plan.measured) / sum(one.tokens for one in plan.measured)


def _rate(config: Config, numbers: Dimensions) -> tuple[float, str]:
    """Operations a second in a product of this model's shape."""
    settings = config.section("training", TrainingConfig)
    if settings.gpu and not torch.cuda.is_available():
        return GPU_RATE, f"if its GPU does {GPU_RATE / 1e12:.0f} TFLOP/s (none is here to be measured)"
    device = torch.device("cuda" if settings.gpu else "cpu")
    if not settings.gpu:
        limit_threads(settings.threads)
    rows = min(settings.pack_tokens, 4096 if settings.gpu else 512)
    dtype = native_dtype(getattr(torch, config.model.dtype), device)
    left, right = (torch.randn(n, numbers.hidden, device=device, dtype=dtype) for n in (rows, numbers.mlp))
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        _ = float((left @ right.t())[0, 0])
        taken.append(time.perf_counter() - start)
    rate = 2 * rows * numbers.hidden * numbers.mlp / min(taken)
    return rate, f"at {rate / 1e9:,.0f} GFLOP/s, measured now"


def _element(config: Config) -> int:
    gpu = config.section("training", TrainingConfig).gpu
    return native_dtype(getattr(torch, config.model.dtype), "cuda" if gpu else "cpu").itemsize


def _store(config: Config) -> tuple[FrameStore | None, str]:
    try:
        return FrameStore.open(config.section("store", StoreConfig).folder), ""
    except StoreError as error:
        return None, str(error)


def _data(config: Config, store: FrameStore, sizes: PreTrainedConfig, split: str = "train") -> TrainingSet:
    settings, name = config.section("training", TrainingConfig), config.model.llm
    dialogues = read_dialogues(Path(config.section("data", DataConfig).folder) / split)
    folder = causal_lm_folder(name) if name == EMBEDDED else Path(name)  # of a hub name, only its tokenizer is fetched
    template = Template(load_tokenizer(folder), config.model.frames)
    limit = settings.max_tokens or getattr(sizes, "max_position_embeddings", None)
    return TrainingSet(dialogues, store, template, settings.objective, limit)

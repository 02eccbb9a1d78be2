"""Attention of a ragged batch: pieces of many sessions, each over its own region of the KV memory.

One layout is made per forward and serves all layers. How it is computed depends on where it runs: paged
attention on CUDA where torch has it; on a CPU in float32 two matrix products per block of positions; SDPA
per session otherwise.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from actors.kv import PAGE, KVMemory

try:
    from torch.nn.attention import varlen
except ImportError:
    varlen = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

ATTENTION = "live"
SHORT = 1024  # positions up to which a context's scores stay in a CPU's cache for twice as many rows
BLOCK = 32  # positions whose scores are computed together in a longer one
ROUNDED = 64  # contexts of SDPA on a CPU are seen up to a multiple of it
AGREEMENT = 2e-2  # how far paged attention of normal keys and values may be off in half precision


@dataclass(frozen=True)
class Span:
    """New positions [first, last) of the batch, behind `past` ones of the region at `start`."""

    first: int
    last: int
    start: int
    past: int

    @property
    def length(self) -> int:
        return self.last - self.first


class Paged(NamedTuple):
    """The layout as paged attention wants it: B sessions in pages of the pool, all int32 on its device.

    Kernels of the second generation look up lengths in `used`, and refuse to run without `key_ends`.
    """

    query_ends: Tensor  # (B + 1)
    key_ends: Tensor  # (B + 1), as if all pages were full
    used: Tensor  # (B)
    table: Tensor  # (B, pages)
    longest_query: int
    longest: int


@dataclass
class Ragged:
    """One forward's layout: where each new position is stored, and what it may see."""

    memory: KVMemory
    spans: list[Span]
    slots: Tensor
    masks: dict[int, Tensor] = field(default_factory=dict)
    paged: Paged | None = None
    scratch: tuple[Tensor, Tensor] | None = None
    block: int = BLOCK

    @classmethod
    def of(cls, memory: KVMemory, spans: list[Span], groups: int) -> Ragged:
        """`groups` is query heads per KV head. Masks are made once for all layers."""
        device, dtype = memory.keys[0].device, memory.keys[0].dtype
        slots = torch.cat([torch.arange(s.start + s.past, s.start + s.past + s.length) for s in spans])
        ragged = cls(memory, spans, slots.to(device))
        if memory.head_major:
            longest = max(span.past + span.length for span in spans)
            block = ragged.block = BLOCK if longest > SHORT else 2 * BLOCK
            ragged.scratch = memory.scratch(groups * block * longest)
            for length in {min(block, span.length) for span in spans} | {span.length % block for span in spans}:
                ragged.masks[length] = _later(length, 0, groups, dtype, device)
        elif memory.paged:
            ragged.paged = _page_table(memory, spans)
        else:
            for index, span in enumerate(spans):
                if span.length > 1:
                    # Of every length the library would compile kernels of its own, and keep them.
                    beyond = -(span.past + span.length) % ROUNDED if memory.rounded else 0
                    ragged.masks[index] = _later(span.length, span.past, groups, dtype, device, beyond)
        return ragged

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of new positions over each session's region: query (T, heads, width) -> the same shape.

        Stores keys and values (T, kv heads, width) first.
        """
        if self.memory.head_major:
            return _attend_by_block(self, layer, query * scaling, key, value)
        keys, values = self.memory.keys[layer], self.memory.values[layer]
        keys.index_copy_(0, self.slots, key.to(keys.dtype))
        values.index_copy_(0, self.slots, value.to(values.dtype))
        if self.paged is not None:
            return _attend_by_page(query, keys, values, self.paged, scaling)
        return _attend_by_session(self, layer, query, scaling)


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    ragged: Ragged | None = None,
    **options: object,
) -> tuple[Tensor, Tensor | None]:
    """`Ragged.attend` as Hugging Face modules call it: query (1, heads, T, width) -> (1, T, heads, width).

    Without `ragged` it is plain SDPA, so that one set of weights serves both backends.
    """
    if ragged is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **options)
    rows, new_keys, new_values = (states[0].transpose(0, 1) for states in (query, key, value))
    layer = module.layer_idx
    assert isinstance(layer, int)
    return ragged.attend(layer, rows, new_keys, new_values, scaling).unsqueeze(0), None


def _later(length: int, past: int, groups: int, dtype: torch.dtype, device: torch.device, beyond: int = 0) -> Tensor:
    """-inf where a key (past + length + beyond) is later than the query (groups x length), to be added to scores."""
    later = torch.full((length, past + length + beyond), -torch.inf, dtype=dtype, device=device).triu(past + 1)
    return later.repeat(groups, 1)


def _attend_by_block(ragged: Ragged, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scores, softmax, values, for `ragged.block` positions at a time; query heads of one KV head are more rows of it.

    Scores live in memory that is kept: allocating them anew would cost more than the products.
    """
    kv_heads, width = key.shape[1:]
    groups = query.shape[1] // kv_heads
    output = torch.empty_like(query)
    assert ragged.scratch is not None
    for span in ragged.spans:
        begin = span.start + span.past
        keys, values = ragged.memory.of(layer, begin, begin + span.length)
        keys.copy_(key[span.first : span.last].transpose(0, 1))
        values.copy_(value[span.first : span.last].transpose(0, 1))
        for first in range(span.first, span.last, ragged.block):
            last = min(first + ragged.block, span.last)
            length, seen = last - first, span.past + last - span.first
            keys, values = ragged.memory.of(layer, span.start, span.start + seen)
            shape = (kv_heads, groups * length, seen)
            scores, weights = (part[: shape[0] * shape[1] * seen].view(shape) for part in ragged.scratch)
            rows = query[first:last].transpose(0, 1).reshape(kv_heads, groups * length, width)
            torch.bmm(rows, keys.transpose(1, 2), out=scores)
            if length > 1:
                scores[:, :, seen - length :] += ragged.masks[length]
            torch.softmax(scores, -1, out=weights)
            output[first:last] = torch.bmm(weights, values).view(-1, length, width).transpose(0, 1)
    return output


def _attend_by_session(ragged: Ragged, layer: int, query: Tensor, scaling: float) -> Tensor:
    """SDPA per session; the query heads of one KV head are laid side by side as more rows."""
    output = torch.empty_like(query)
    for index, span in enumerate(ragged.spans):
        mask = ragged.masks.get(index)
        seen = span.past + span.length if mask is None else mask.shape[1]
        keys, values = ragged.memory.of(layer, span.start, span.start + seen)
        kv_heads, _, width = keys.shape
        # Contiguous also where reshaping copies nothing: a row out of column-major ones falls to SDPA's slow path.
        rows = query[span.first : span.last].transpose(0, 1).reshape(1, kv_heads, -1, width).contiguous()
        attended = F.scaled_dot_product_attention(
            rows, keys.unsqueeze(0), values.unsqueeze(0), attn_mask=mask, scale=scaling
        )
        output[span.first : span.last] = attended.view(-1, span.length, width).transpose(0, 1)
    return output


def pages_work(memory: KVMemory, groups: int) -> bool:
    """Whether paged attention runs here and gives what SDPA does, tried on memory that nobody uses yet.

    Not every version of torch has it, and not every GPU that torch supports.
    """
    if varlen is None or not memory.keys[0].is_cuda or memory.keys[0].dtype == torch.float32:
        return False
    try:
        apart = _difference(memory, groups)
    except (TypeError, RuntimeError) as error:
        logger.warning("paged attention does not run here, SDPA takes its place: %s", str(error).partition("\n")[0])
        return False
    if not apart < AGREEMENT:
        logger.warning("paged attention is off by %.2g here, SDPA takes its place", apart)
        return False
    return True


def _difference(memory: KVMemory, groups: int) -> float:
    """How far paged attention and SDPA are apart, over a short and a longer context of random numbers."""
    keys, values = memory.keys[0], memory.values[0]
    numbers = torch.Generator(keys.device).manual_seed(0)
    spans = [Span(0, 3, 0, 5), Span(3, 4, memory.positions - PAGE, PAGE - 1)]
    borrowed = (keys[:PAGE], keys[-PAGE:], values[:PAGE], values[-PAGE:])
    try:
        for part in borrowed:
            part.normal_(generator=numbers)
        width = keys.shape[2]
        query = torch.empty(4, groups * memory.kv_heads, width, dtype=keys.dtype, device=keys.device)
        query.normal_(generator=numbers)
        ragged = Ragged.of(memory, spans, groups)
        one = _attend_by_page(query, keys, values, _page_table(memory, spans), width**-0.5)
        other = _attend_by_session(ragged, 0, query, width**-0.5)
        return float((one - other).abs().max())
    finally:
        for part in borrowed:
            part.zero_()


def _page_table(memory: KVMemory, spans: list[Span]) -> Paged:
    device = memory.keys[0].device
    lengths = [span.past + span.length for span in spans]
    longest = max(lengths)
    pages = torch.arange(-(-longest // PAGE), dtype=torch.int32)
    table = torch.stack([span.start // PAGE + pages for span in spans]).clamp(max=memory.positions // PAGE - 1)
    return Paged(
        torch.tensor([0, *(span.last for span in spans)], dtype=torch.int32, device=device),
        torch.arange(len(spans) + 1, dtype=torch.int32, device=device) * (len(pages) * PAGE),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        table.to(device),
        max(span.length for span in spans),
        longest,
    )


def _attend_by_page(query: Tensor, keys: Tensor, values: Tensor, paged: Paged, scaling: float) -> Tensor:
    pages = (-1, PAGE, *keys.shape[1:])
    attended = varlen.varlen_attn(
        query.contiguous(),
        keys.view(pages),
        values.view(pages),
        paged.query_ends,
        paged.key_ends,
        paged.longest_query,
        paged.longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=True,
        seqused_k=paged.used,
        block_table=paged.table,
        # With several, flash attention has been seen to leave rows of paged keys unwritten (pytorch#194167).
        num_splits=1,
    )
    assert isinstance(attended, Tensor)
    return attended


AttentionInterface.register(ATTENTION, ragged_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)

"""KV memory: one preallocated pool for all sessions, and attention of a ragged batch over it.

The pool is a flat run of positions per layer, token-major (P, kv heads, head width). A session
reserves one contiguous region, large enough for its longest context, when it is admitted: what
was admitted can never run out of memory, and attention reads a view, without gathering. Nothing
is concatenated or reallocated; rolling back is forgetting a length.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from actors.engine import NoCapacity

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

PAGE = 256
ATTENTION = "live"


@dataclass(frozen=True)
class Region:
    """Positions [start, start + length) of the pool."""

    start: int
    length: int


class KVMemory:
    """`positions` positions for every layer of `config`'s model, in `dtype` on `device`."""

    def __init__(self, config: PretrainedConfig, positions: int, dtype: torch.dtype, device: torch.device) -> None:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (max(positions // PAGE, 1) * PAGE, heads, width)
        self.positions = shape[0]
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self._free = [Region(0, self.positions)]

    @staticmethod
    def bytes_per_position(config: PretrainedConfig, dtype: torch.dtype) -> int:
        """Bytes that keys and values of one position take in all layers."""
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * width * dtype.itemsize

    @property
    def free_positions(self) -> int:
        return sum(region.length for region in self._free)

    def fitting(self, positions: int) -> int:
        """How many regions of `positions` could be reserved now."""
        length = -(-positions // PAGE) * PAGE
        return sum(region.length // length for region in self._free)

    def reserve(self, positions: int) -> Region:
        """A region of at least `positions`, whole pages. Raises NoCapacity when none is left in one piece."""
        length = -(-positions // PAGE) * PAGE
        for index, region in enumerate(self._free):
            if region.length >= length:
                rest = Region(region.start + length, region.length - length)
                self._free[index : index + 1] = [rest] if rest.length else []
                return Region(region.start, length)
        raise NoCapacity(
            f"a session of {positions} positions needs {length} in one piece, {self.free_positions} of "
            f"{self.positions} are free: raise engine.kv_memory_gb or shorten the window"
        )

    def release(self, region: Region) -> None:
        """Give a region back; neighbours that are free become one."""
        merged: list[Region] = []
        for free in sorted([*self._free, region], key=lambda free: free.start):
            if merged and merged[-1].start + merged[-1].length > free.start:
                raise ValueError(f"positions {free.start} to {free.start + free.length} were released twice")
            if merged and merged[-1].start + merged[-1].length == free.start:
                merged[-1] = Region(merged[-1].start, merged[-1].length + free.length)
            else:
                merged.append(free)
        self._free = merged


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


@dataclass
class Ragged:
    """One forward's layout: where each new position is stored, and what it may see."""

    memory: KVMemory
    spans: list[Span]
    slots: Tensor
    masks: dict[int, Tensor] = field(default_factory=dict)
    paged: tuple[Tensor, Tensor, Tensor, int, int] | None = None

    @classmethod
    def of(cls, memory: KVMemory, spans: list[Span], groups: int) -> Ragged:
        """`groups` is query heads per KV head. Masks are made once for all layers."""
        device, dtype = memory.keys[0].device, memory.keys[0].dtype
        slots = torch.cat([torch.arange(s.start + s.past, s.start + s.past + s.length) for s in spans])
        ragged = cls(memory, spans, slots.to(device))
        if device.type == "cuda" and varlen_attn is not None and dtype != torch.float32:
            ragged.paged = _page_table(memory, spans)
            return ragged
        for index, span in enumerate(spans):
            if span.length > 1:
                # Added to scores: SDPA would turn a boolean mask into this one again in every layer.
                hidden = torch.full((span.length, span.past + span.length), -torch.inf, dtype=dtype, device=device)
                ragged.masks[index] = hidden.triu(span.past + 1).repeat(groups, 1)
        return ragged

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of new positions over each session's region: query (T, heads, width) -> the same shape.

        Stores keys and values (T, kv heads, width) first.
        """
        keys, values = self.memory.keys[layer], self.memory.values[layer]
        keys.index_copy_(0, self.slots, key.to(keys.dtype))
        values.index_copy_(0, self.slots, value.to(values.dtype))
        if self.paged is not None:
            return _paged_attention(query, keys, values, self.paged, scaling)
        return _sdpa_by_session(query, keys, values, self, scaling)


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
    return ragged.attend(module.layer_idx, rows, new_keys, new_values, scaling).unsqueeze(0), None


def _sdpa_by_session(query: Tensor, keys: Tensor, values: Tensor, ragged: Ragged, scaling: float) -> Tensor:
    """SDPA per session; the query heads of one KV head are laid side by side as more rows."""
    kv_heads, width = keys.shape[1:]
    groups = query.shape[1] // kv_heads
    output = query.new_empty(query.shape)
    for index, span in enumerate(ragged.spans):
        stop = span.start + span.past + span.length
        rows = query[span.first : span.last].transpose(0, 1).reshape(1, kv_heads, groups * span.length, width)
        attended = F.scaled_dot_product_attention(
            rows,
            keys[span.start : stop].transpose(0, 1).unsqueeze(0),
            values[span.start : stop].transpose(0, 1).unsqueeze(0),
            attn_mask=ragged.masks.get(index),
            scale=scaling,
        )
        output[span.first : span.last] = attended.view(-1, span.length, width).transpose(0, 1)
    return output


def _page_table(memory: KVMemory, spans: list[Span]) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Cumulated query lengths, used KV lengths, pages of each session, and the longest of both."""
    device = memory.keys[0].device
    ends = torch.tensor([0, *(span.last for span in spans)], dtype=torch.int32, device=device)
    lengths = [span.past + span.length for span in spans]
    longest = max(lengths)
    pages = torch.arange(-(-longest // PAGE), dtype=torch.int32)
    table = torch.stack([span.start // PAGE + pages for span in spans]).clamp(max=memory.positions // PAGE - 1)
    used = torch.tensor(lengths, dtype=torch.int32, device=device)
    return ends, used, table.to(device), max(span.length for span in spans), longest


def _paged_attention(
    query: Tensor, keys: Tensor, values: Tensor, paged: tuple[Tensor, Tensor, Tensor, int, int], scaling: float
) -> Tensor:
    ends, used, table, longest_query, longest = paged
    pages = (-1, PAGE, *keys.shape[1:])
    attended: Tensor = varlen_attn(
        query.contiguous(),
        keys.view(pages),
        values.view(pages),
        ends,
        None,
        longest_query,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=True,
        seqused_k=used,
        block_table=table,
    )
    return attended


AttentionInterface.register(ATTENTION, ragged_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)

"""KV memory: one preallocated pool for all sessions.

A session reserves one contiguous region of positions, large enough for its longest context, when it
is admitted: what was admitted can never run out of memory, and attention reads a view, without
gathering. Nothing is concatenated or reallocated; rolling back is forgetting a length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from actors.engine import NoCapacity

PAGE = 256


@dataclass(frozen=True)
class Region:
    """Positions [start, start + length) of the pool."""

    start: int
    length: int


def whole_pages(positions: int) -> int:
    """The positions of as many pages as hold `positions`."""
    return -(-positions // PAGE) * PAGE


class KVMemory:
    """`positions` positions for every layer of `config`'s model, in `dtype` on `device`.

    Keys and values of a layer are token-major (P, kv heads, width), as paged attention wants them. In
    float32 on a CPU they are head-major, keys transposed: (kv heads, width, P) and (kv heads, P, width),
    which makes attention of short pieces two plain matrix products.
    """

    def __init__(self, config: PretrainedConfig, positions: int, dtype: torch.dtype, device: torch.device) -> None:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.kv_heads = heads
        self.positions = max(positions // PAGE, 1) * PAGE
        self.head_major = device.type == "cpu" and dtype == torch.float32
        # Whether attention also looks at positions that are not written yet, and gives them no weight.
        self.rounded = device.type == "cpu" and not self.head_major
        token_major = (self.positions, heads, width)
        key_shape = (heads, width, self.positions) if self.head_major else token_major
        value_shape = (heads, self.positions, width) if self.head_major else token_major
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(key_shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(value_shape, dtype=dtype, device=device) for _ in layers]
        self.paged = False  # whether paged attention reads it
        self._scratch: Tensor | None = None
        self._free = [Region(0, self.positions)]

    def of(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values at positions [start, stop) of the pool, as views (kv heads, L, width)."""
        if self.head_major:
            return self.keys[layer][:, :, start:stop].transpose(1, 2), self.values[layer][:, start:stop]
        return self.keys[layer][start:stop].transpose(0, 1), self.values[layer][start:stop].transpose(0, 1)

    def scratch(self, rows: int) -> tuple[Tensor, Tensor]:
        """Two buffers of `rows` numbers per KV head, kept and grown."""
        needed = rows * self.keys[0].shape[0]
        if self._scratch is None or self._scratch.shape[1] < needed:
            self._scratch = self.keys[0].new_empty(2, needed)
        return self._scratch[0], self._scratch[1]

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
        length = whole_pages(positions)
        return sum(region.length // length for region in self._free)

    def reserve(self, positions: int) -> Region:
        """A region of at least `positions`, whole pages. Raises NoCapacity when none is left in one piece."""
        length = whole_pages(positions)
        for index, region in enumerate(self._free):
            if region.length >= length:
                rest = Region(region.start + length, region.length - length)
                self._free[index : index + 1] = [rest] if rest.length else []
                if self.rounded:  # a NaN left by the session before stays one where its weight is zero
                    for layer in range(len(self.keys)):
                        for states in self.of(layer, region.start, region.start + length):
                            states.zero_()
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

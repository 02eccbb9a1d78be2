"""Dialogues packed for training: one row of positions, none of them padding.

Each dialogue keeps its own positions from 0 and attends to itself alone, so a pack teaches what its
dialogues would teach one by one. Attention runs per dialogue on a CPU (causal, no mask is ever built) and
as one call for all on a GPU whose torch has variable-length attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from actors.dialogue import Rendered

try:
    from torch.nn.attention import varlen
except ImportError:
    varlen = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Packed:
    """Dialogues of `lengths` one after another: ids and labels (T,), positions (T,) that restart with each."""

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, dialogues: Sequence[Rendered]) -> Packed:
        """Raises ValueError for none."""
        lengths = tuple(len(dialogue.input_ids) for dialogue in dialogues)
        if not sum(lengths):
            raise ValueError("a pack needs at least one dialogue with a token")
        return cls(
            torch.tensor([i for dialogue in dialogues for i in dialogue.input_ids]),
            torch.tensor([i for dialogue in dialogues for i in dialogue.labels]),
            torch.cat([torch.arange(length) for length in lengths]),
            lengths,
        )

    def to(self, device: torch.device) -> Packed:
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            positions=self.positions.to(device),
        )

    @cached_property
    def block_mask(self) -> Tensor:
        """(1, 1, T, T) bool, true where a position may look: for models that know no packs. Quadratic in T."""
        owner = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        mask = (owner[:, None] == owner[None, :]).tril()
        return mask[None, None].to(self.input_ids.device)

    @cached_property
    def bounds(self) -> Tensor:
        """Where each dialogue starts, and the end: (dialogues + 1,) int32."""
        ends = torch.tensor([0, *self.lengths]).cumsum(0)
        return ends.to(self.input_ids.device, torch.int32)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Causal attention inside each dialogue: query (T, heads, width) -> the same shape.

        key and value (T, kv heads, width).
        """
        if varlen is not None and query.is_cuda and query.dtype != torch.float32:
            longest = max(self.lengths)
            window, grouped = (-1, 0), query.shape[1] != key.shape[1]
            attended = varlen.varlen_attn(
                query, key, value, self.bounds, self.bounds, longest, longest,
                scale=scaling, window_size=window, enable_gqa=grouped,
            )  # fmt: skip
            assert isinstance(attended, Tensor)
            return attended
        parts = (states.split(self.lengths) for states in (query, key, value))
        return torch.cat([_attend(q, k, v, scaling) for q, k, v in zip(*parts, strict=True)])


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    query, key, value = (states.transpose(0, 1).unsqueeze(0) for states in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return attended.squeeze(0).transpose(0, 1)

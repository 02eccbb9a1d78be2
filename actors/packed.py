"""Dialogues packed for training: one row of positions, none of them padding.

Each dialogue has its own positions from 0 and attends to itself alone, so a pack teaches what its dialogues
would teach one by one; what all of them begin with is computed once. Attention runs per dialogue on a CPU
(causal, no mask is ever built) and as one call for all on a GPU whose torch has variable-length attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from actors import half_attention
from actors.dialogue import IGNORED, Rendered

try:
    from torch.nn.attention import varlen
except ImportError:
    varlen = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Packed:
    """Dialogues one after another: ids and labels (T,), positions (T,) that restart with each.

    What all of them begin with and none learns anything in, the system prompt mostly, is there once: the first
    `prefix` positions belong to every dialogue. `lengths` are those in the row, the first with the prefix.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    prefix: int = 0

    @classmethod
    def of(cls, dialogues: Sequence[Rendered]) -> Packed:
        """Raises ValueError for none."""
        if not any(dialogue.input_ids for dialogue in dialogues):
            raise ValueError("a pack needs at least one dialogue with a token")
        prefix = _common(dialogues)
        starts = [0, *[prefix] * (len(dialogues) - 1)]
        parts = list(zip(dialogues, starts, strict=True))
        return cls(
            torch.tensor([i for dialogue, start in parts for i in dialogue.input_ids[start:]]),
            torch.tensor([i for dialogue, start in parts for i in dialogue.labels[start:]]),
            torch.cat([torch.arange(start, len(dialogue.input_ids)) for dialogue, start in parts]),
            tuple(len(dialogue.input_ids) - start for dialogue, start in parts),
            prefix,
        )

    @property
    def dialogue_lengths(self) -> tuple[int, ...]:
        """Of each by itself, prefix included."""
        return (self.lengths[0], *(length + self.prefix for length in self.lengths[1:]))

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
        seen = (owner[:, None] == owner[None, :]) | (torch.arange(len(owner)) < self.prefix)
        mask = seen.tril()
        return mask[None, None].to(self.input_ids.device)

    @cached_property
    def bounds(self) -> Tensor:
        """Where each dialogue starts once it has its prefix, and the end: (dialogues + 1,) int32."""
        ends = torch.tensor([0, *self.dialogue_lengths]).cumsum(0)
        return ends.to(self.input_ids.device, torch.int32)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Causal attention inside each dialogue: query (T, heads, width) -> the same shape.

        key and value (T, kv heads, width). The prefix is repeated before every dialogue: as a few more rows of
        attention it costs little, in the layers' matrix products it would cost as much as any other position.
        """
        query, key, value = (self._whole(states) for states in (query, key, value))
        lengths = self.dialogue_lengths
        if varlen is not None and query.is_cuda and query.dtype != torch.float32:
            longest = max(lengths)
            window, grouped = (-1, 0), query.shape[1] != key.shape[1]
            attended = varlen.varlen_attn(
                query, key, value, self.bounds, self.bounds, longest, longest,
                scale=scaling, window_size=window, enable_gqa=grouped,
            )  # fmt: skip
            assert isinstance(attended, Tensor)
            each = list(attended.split(lengths))
        else:
            parts = (states.split(lengths) for states in (query, key, value))
            each = [_attend(q, k, v, scaling) for q, k, v in zip(*parts, strict=True)]
        return torch.cat([each[0], *(part[self.prefix :] for part in each[1:])])

    def _whole(self, states: Tensor) -> Tensor:
        """Every dialogue with its prefix."""
        if not self.prefix or len(self.lengths) == 1:
            return states
        common, first, *others = states.split([self.prefix, self.lengths[0] - self.prefix, *self.lengths[1:]])
        return torch.cat([common, first, *(part for other in others for part in (common, other))])


def _common(dialogues: Sequence[Rendered]) -> int:
    """Positions that all begin with alike, before anything is learned or seen, one short of the shortest at most."""
    first = dialogues[0]
    placeholders = {first.input_ids[first.at_frame.index(True)]} if any(first.at_frame) else set()
    last = min(len(dialogue.input_ids) for dialogue in dialogues) - 1
    for place in range(last):
        alike = all(one.input_ids[place] == first.input_ids[place] for one in dialogues)
        learned = any(one.labels[place] != IGNORED for one in dialogues)
        if not alike or learned or first.input_ids[place] in placeholders:
            return place
    return max(last, 0)


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    if half_attention.applies(query):
        return half_attention.attend(query, key, value, scaling)
    query, key, value = (states.transpose(0, 1).unsqueeze(0) for states in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return attended.squeeze(0).transpose(0, 1)

"""Causal attention of one dialogue in bfloat16 on a CPU, with a backward made of matrix products.

Torch's own backward for this case works in small tiles outside the library of matrix products and is the
longest single piece of a training step. Here the weights are computed again from what the forward keeps, the
logarithm of each row's sum, and everything quadratic is a product or one pass over bfloat16. A logarithm of
a weight would be off by its own size times 2^-9 if it were rounded before the row's sum is taken from it, so
the sum is part of the product: three more columns hold it, in pieces of bfloat16 that add up to float32. The
same is done for the gradient of the weights and what softmax takes from it.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

ROWS = 192  # queries at once: later keys are left out, and weights of that many rows stay near the core
PIECES = 3  # bfloat16 numbers that make a float32
COLUMNS = 8  # added to a head's width for them; an odd width would be slower


def applies(query: Tensor) -> bool:
    """Whether `query` (L, heads, width) is of the kind this is for, and something is learned from it."""
    return not query.is_cuda and query.dtype == torch.bfloat16 and query.requires_grad


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """query (L, heads, width), key and value (L, kv heads, width) to (L, heads, width)."""
    heads = [states.transpose(0, 1).contiguous() for states in (query, key, value)]
    return cast(Tensor, _Attend.apply(*heads, scaling)).transpose(0, 1)


class _Attend(torch.autograd.Function):
    """query (heads, L, width), key and value (kv heads, L, width) to (heads, L, width)."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        attended, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[None], key[None], value[None], is_causal=True, scale=scaling
        )
        ctx.save_for_backward(query, key, value, attended[0], log_sums[0])
        ctx.scaling = scaling  # type: ignore[attr-defined]
        return cast(Tensor, attended[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, attended, log_sums = ctx.saved_tensors  # type: ignore[attr-defined]
        scaling = ctx.scaling  # type: ignore[attr-defined]
        (heads, length, width), kv_heads = query.shape, len(key)
        grouped = (kv_heads, heads // kv_heads, length)
        taken = (gradient.float() * attended.float()).sum(-1)
        queries = _with_pieces(query, -log_sums / scaling).view(*grouped, -1)
        gradients = _with_pieces(gradient, -taken).view(*grouped, -1)
        keys, values = (torch.cat([s, s.new_ones(kv_heads, length, COLUMNS)], -1).mT for s in (key, value))
        later = key.new_full((ROWS, ROWS), -math.inf).triu_(1)
        of_query = torch.empty_like(query).view(*grouped, width)
        of_key, of_value = (torch.zeros(s.shape, dtype=torch.float32) for s in (key, value))
        for start in range(0, length, ROWS):
            stop = min(start + ROWS, length)
            count = stop - start
            shape = (*grouped[:2], count, stop)
            asking, changing = (part[:, :, start:stop].flatten(1, 2) for part in (queries, gradients))
            weights = torch.bmm(asking, keys[..., :stop])
            weights.view(shape)[..., start:] += later[:count, :count]
            weights.mul_(scaling).exp_()
            of_scores = torch.bmm(changing, values[..., :stop]).mul_(weights)
            of_value[:, :stop] += torch.bmm(weights.mT, changing[..., :width])
            of_key[:, :stop] += torch.bmm(of_scores.mT, asking[..., :width])
            of_query[:, :, start:stop] = torch.bmm(of_scores, key[:, :stop]).view(*shape[:3], width)
        return of_query.mul_(scaling).view_as(query), of_key.mul_(scaling).to(key.dtype), of_value.to(value.dtype), None


def _with_pieces(states: Tensor, numbers: Tensor) -> Tensor:
    """states (heads, L, width) with float32 numbers (heads, L) behind them, to (heads, L, width + COLUMNS)."""
    pieces = states.new_zeros(*numbers.shape, COLUMNS)
    for column in range(PIECES):
        pieces[..., column] = numbers
        numbers = numbers - pieces[..., column].float()
    return torch.cat([states, pieces], -1)

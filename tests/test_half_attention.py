import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from actors import half_attention

ROWS = half_attention.ROWS


def states(length: int, heads: int, kv_heads: int, width: int, size: float = 1.0) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(length + width)
    counts = [heads, kv_heads, kv_heads, heads]
    query, key, value, gradient = (
        torch.randn(length, count, width, generator=generator).mul(scale).bfloat16()
        for count, scale in zip(counts, [size, size, 1, 1], strict=True)
    )
    return [query, key, value], gradient


def learned(attend, inputs: list[Tensor], gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [one.to(dtype).requires_grad_() for one in inputs]
    attended = attend(*leaves)
    return attended.detach(), torch.autograd.grad(attended, leaves, gradient.to(dtype))


def by_torch(scaling: float):
    def attend(*inputs: Tensor) -> Tensor:
        heads = [one.transpose(0, 1)[None] for one in inputs]
        return F.scaled_dot_product_attention(*heads, is_causal=True, scale=scaling, enable_gqa=True)[0].transpose(0, 1)

    return attend


def distances(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("size", [1.0, 3.0])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (4, 4, 32), (6, 2, 80), (3, 1, 5)])
@pytest.mark.parametrize("length", [2, 63, ROWS, ROWS + 1, 2 * ROWS + 37])
def test_gradients_are_as_near_to_exact_ones_as_torch_makes_them(
    length: int, heads: int, kv_heads: int, width: int, size: float
) -> None:
    inputs, gradient = states(length, heads, kv_heads, width, size)
    scaling = width**-0.5
    _, exact = learned(by_torch(scaling), inputs, gradient, torch.float64)
    _, usual = learned(by_torch(scaling), inputs, gradient, torch.bfloat16)
    _, own = learned(lambda *s: half_attention.attend(*s, scaling), inputs, gradient, torch.bfloat16)
    for distance, allowed in zip(distances(own, exact), distances(usual, exact), strict=True):
        assert distance <= max(2 * allowed, 0.01)


def test_a_single_position_has_no_choice_and_learns_its_value_alone() -> None:
    inputs, gradient = states(1, 9, 3, 64)
    _, exact = learned(by_torch(0.125), inputs, gradient, torch.float64)
    _, own = learned(lambda *s: half_attention.attend(*s, 0.125), inputs, gradient, torch.bfloat16)
    assert distances(own[2:], exact[2:])[0] < 0.01
    assert max(float(one.abs().max()) for one in own[:2]) < 0.02  # what rounding leaves of nothing


def test_what_comes_out_is_what_torch_computes() -> None:
    inputs, gradient = states(300, 9, 3, 64)
    usual, _ = learned(by_torch(0.125), inputs, gradient, torch.bfloat16)
    own, _ = learned(lambda *s: half_attention.attend(*s, 0.125), inputs, gradient, torch.bfloat16)
    assert torch.equal(own, usual)


def test_scores_that_differ_by_hundreds_learn_as_well() -> None:
    """A weight is exp(score - sum); a score that was rounded by itself would be off by a whole unit here."""
    inputs, gradient = states(250, 4, 2, 64, size=12.0)
    _, exact = learned(by_torch(0.125), inputs, gradient, torch.float64)
    _, own = learned(lambda *s: half_attention.attend(*s, 0.125), inputs, gradient, torch.bfloat16)
    assert max(distances(own, exact)) < 0.02


def test_nothing_is_learned_from_what_comes_later() -> None:
    inputs, gradient = states(ROWS + 50, 4, 2, 32)
    gradient[ROWS - 5 :] = 0
    _, (of_query, of_key, of_value) = learned(
        lambda *s: half_attention.attend(*s, 0.2), inputs, gradient, torch.bfloat16
    )
    for found in (of_query, of_key, of_value):
        assert found[: ROWS - 5].abs().sum() > 0
        assert not found[ROWS - 5 :].any()


def test_it_is_for_what_learns_in_bfloat16_on_a_cpu() -> None:
    query = torch.zeros(4, 2, 8, dtype=torch.bfloat16)
    assert half_attention.applies(query.requires_grad_())
    assert not half_attention.applies(query.detach())
    assert not half_attention.applies(torch.zeros(4, 2, 8, requires_grad=True))

"""Paged attention as torch has it on CUDA: what it is asked for, checked on a CPU, and what it gives, on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig

from actors import attention
from actors.attention import Ragged, Span, pages_work
from actors.kv import PAGE, KVMemory

HEADS, KV_HEADS, WIDTH = 8, 2, 64
SPANS = [Span(0, 5, 0, 300), Span(5, 6, 2 * PAGE, 0), Span(6, 46, 3 * PAGE, 2 * PAGE - 60), Span(46, 47, 5 * PAGE, 17)]


def memory_on(device: str, pages: int = 6) -> KVMemory:
    config = LlamaConfig(
        hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, num_hidden_layers=1
    )
    return KVMemory(config, pages * PAGE, torch.bfloat16, torch.device(device))


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int | None,
) -> Tensor:
    """What torch 2.13 says that its function of this name does, with what its kernels refuse."""
    assert cu_seq_k is not None, "cu_seqlens_q and cu_seqlens_k must be both set or both not set"
    assert all(one.dtype == torch.int32 for one in (cu_seq_q, cu_seq_k, seqused_k, block_table))
    assert len(cu_seq_q) == len(cu_seq_k) == len(seqused_k) + 1 == len(block_table) + 1
    assert key.shape[1] % 256 == 0
    assert query.is_contiguous()
    assert window_size == (-1, 0)
    assert enable_gqa
    assert int(seqused_k.max()) == max_k <= block_table.shape[1] * key.shape[1]
    assert int(cu_seq_q.diff().max()) == max_q
    output = torch.empty_like(query)
    for number, used in enumerate(seqused_k.tolist()):
        first, last = cu_seq_q[number : number + 2].tolist()
        keys, values = (
            part[block_table[number].long()].flatten(0, 1)[:used].transpose(0, 1).float() for part in (key, value)
        )
        seen = torch.ones(last - first, used, dtype=torch.bool).tril(used - (last - first))
        rows = query[first:last].transpose(0, 1).float()
        attended = F.scaled_dot_product_attention(rows, keys, values, seen, scale=scale, enable_gqa=True)
        output[first:last] = attended.transpose(0, 1).to(query.dtype)
    return output


def attended(memory: KVMemory, paged: bool) -> Tensor:
    """One step of four sessions over memory full of random numbers."""
    device = memory.keys[0].device
    numbers = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=numbers).to(device, torch.bfloat16)

    memory.keys[0].copy_(random(*memory.keys[0].shape))
    memory.values[0].copy_(random(*memory.values[0].shape))
    memory.paged = paged
    ragged = Ragged.of(memory, SPANS, HEADS // KV_HEADS)
    assert (ragged.paged is not None) == paged
    query, key, value = random(47, HEADS, WIDTH), random(47, KV_HEADS, WIDTH), random(47, KV_HEADS, WIDTH)
    return ragged.attend(0, query, key, value, WIDTH**-0.5)


def test_pages_hold_what_sessions_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "varlen", SimpleNamespace(varlen_attn=varlen_attn))
    torch.testing.assert_close(attended(memory_on("cpu"), True), attended(memory_on("cpu"), False), atol=2e-2, rtol=0)


@pytest.mark.parametrize("pages", [1, 6])
def test_where_pages_give_what_sdpa_gives_they_are_used(pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = memory_on("cpu", pages)
    monkeypatch.setattr(attention, "varlen", SimpleNamespace(varlen_attn=varlen_attn))
    assert attention._difference(memory, HEADS // KV_HEADS) < attention.AGREEMENT
    assert not memory.keys[0].any()
    assert not memory.values[0].any()
    off = SimpleNamespace(varlen_attn=lambda *given, **more: varlen_attn(*given, **more).roll(1, 0))
    monkeypatch.setattr(attention, "varlen", off)
    assert attention._difference(memory, HEADS // KV_HEADS) > 10 * attention.AGREEMENT


@pytest.mark.parametrize("trouble", ["older", "refusing", "wrong"])
def test_where_pages_do_not_work_sdpa_takes_their_place(
    trouble: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refusing(*_: object, **__: object) -> Tensor:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nException raised from ...")

    kinds = {
        "older": lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: query,
        "refusing": refusing,
        "wrong": lambda *given, **more: varlen_attn(*given, **more) * 1.5,
    }
    monkeypatch.setattr(attention, "varlen", SimpleNamespace(varlen_attn=kinds[trouble]))
    # A CPU's memory that says it is a GPU's.
    memory = memory_on("cpu")
    monkeypatch.setattr(Tensor, "is_cuda", True)
    assert not pages_work(memory, HEADS // KV_HEADS)
    assert "SDPA takes its place" in caplog.text
    assert "\n" not in caplog.records[0].getMessage()


def test_a_cpu_has_no_pages() -> None:
    assert not pages_work(memory_on("cpu"), HEADS // KV_HEADS)


@pytest.mark.gpu
def test_on_a_gpu_pages_work_and_give_what_sdpa_gives() -> None:
    assert pages_work(memory_on("cuda"), HEADS // KV_HEADS)
    torch.testing.assert_close(attended(memory_on("cuda"), True), attended(memory_on("cuda"), False), atol=2e-2, rtol=0)

"""The lean forward against the Hugging Face one, for each family it knows."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from actors.attention import BLOCK, ROUNDED, SHORT, Ragged, Span
from actors.kv import PAGE, KVMemory
from actors.lean import ALIASING_BYTES, FEW_ROWS, LeanDecoder, laid_out, product

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILY = {
    "llama": LlamaConfig(**SIZES),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama 3.1": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "mistral": MistralConfig(**SIZES, head_dim=16, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=24),
}


def build(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for parameter in llm.parameters():  # norms and biases start as ones and zeros, which would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    return llm.requires_grad_(False)


def plain(llm: PreTrainedModel, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    """Last hidden states (T, H) of each sequence of embeddings, by the model itself."""
    return [llm.get_decoder()(inputs_embeds=sequence[None]).last_hidden_state[0] for sequence in sequences]


@pytest.mark.parametrize("name", FAMILY)
def test_pieces_of_several_sessions_equal_whole_sequences(name: str) -> None:
    llm = build(FAMILY[name])
    sequences = [torch.randn(length, 48) for length in (70, 23)]
    with torch.inference_mode():
        expected = plain(llm, sequences)
    lean = LeanDecoder.of(llm)
    assert lean is not None
    memory = KVMemory(llm.config, 512, torch.float32, torch.device("cpu"))
    regions = [memory.reserve(100), memory.reserve(100)]
    found: list[list[torch.Tensor]] = [[], []]
    with torch.inference_mode():
        for pieces in [(0, 40), (0, 1)], [(40, 41), (1, 20)], [(41, 70), (20, 23)]:
            spans, inputs, positions, first = [], [], [], 0
            for (start, stop), region, sequence in zip(pieces, regions, sequences, strict=True):
                spans.append(Span(first, first + stop - start, region.start, start))
                inputs.append(sequence[start:stop])
                positions.append(torch.arange(start, stop))
                first += stop - start
            hidden = lean(
                torch.cat(inputs), torch.cat(positions), Ragged.of(memory, spans, groups=3), torch.arange(first)
            )
            for index, span in enumerate(spans):
                found[index].append(hidden[span.first : span.last])
    for one, other in zip(found, expected, strict=True):
        assert (torch.cat(one) - other).abs().max() < 1e-4


@pytest.mark.parametrize("past", [0, SHORT - 2 * BLOCK - 1, SHORT - 5, SHORT])
@pytest.mark.parametrize("length", [1, BLOCK, 2 * BLOCK, 2 * BLOCK + 7])
def test_attention_in_blocks_equals_attention_at_once(past: int, length: int) -> None:
    """Around the lengths where blocks change their size or are cut."""
    config = LlamaConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2)
    memory = KVMemory(config, 2048, torch.float32, torch.device("cpu"))
    total = past + length
    query, key, value = torch.randn(total, 6, 4), torch.randn(total, 2, 4), torch.randn(total, 2, 4)
    for first, last in ((0, past), (past, total)):
        if last > first:
            ragged = Ragged.of(memory, [Span(0, last - first, 256, first)], groups=3)
            found = ragged.attend(0, query[first:last], key[first:last], value[first:last], 0.5)
    heads = [states.transpose(0, 1)[None] for states in (query, key, value)]
    whole = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=0.5, enable_gqa=True)
    assert (found - whole[0].transpose(0, 1)[past:]).abs().max() < 1e-5


@pytest.mark.parametrize("past", [0, ROUNDED - 3, ROUNDED - 2, PAGE - 3])
def test_in_bf16_nothing_is_seen_of_positions_that_are_not_written(past: int) -> None:
    """Up to the end of a region, and whatever the session before has left there."""
    config = LlamaConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2)
    memory = KVMemory(config, PAGE, torch.bfloat16, torch.device("cpu"))
    region = memory.reserve(PAGE)
    for states in (*memory.keys, *memory.values):
        states.fill_(torch.nan)
    memory.release(region)
    memory.reserve(PAGE)
    total = past + 3
    query, key, value = (torch.randn(total, heads, 4).bfloat16() for heads in (6, 2, 2))
    for first, last in ((0, past), (past, total)):
        if last > first:
            ragged = Ragged.of(memory, [Span(0, last - first, 0, first)], groups=3)
            found = ragged.attend(0, query[first:last], key[first:last], value[first:last], 0.5)
    heads = [states.transpose(0, 1)[None].float() for states in (query, key, value)]
    exact = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=0.5, enable_gqa=True)
    assert (found.float() - exact[0].transpose(0, 1)[past:]).abs().max() < 0.02


@pytest.mark.parametrize("shape", [(48, 1024), (1024, 48), (48, 100), (512, 512)])
def test_a_weight_keeps_its_values_and_its_long_rows_are_apart(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    stored = laid_out(weight)
    assert torch.equal(stored, weight)
    long_rows = stored if shape[1] >= shape[0] else stored.t()
    assert long_rows.stride(1) == 1
    assert long_rows.stride(0) * 4 % ALIASING_BYTES != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("shape", [(48, 1024), (1024, 48)])
def test_a_product_is_the_same_with_few_rows_and_many(shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    weight = laid_out(torch.randn(shape).to(dtype))
    states, bias, residual = (torch.randn(size).to(dtype) for size in ((rows, shape[0]), shape[1], (rows, shape[1])))
    for added in (None, bias, residual):
        exact = states.double() @ weight.double() + (0.0 if added is None else added.double())
        found = product(states, weight, added)
        assert found.dtype == dtype
        assert torch.allclose(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("name", FAMILY)
def test_in_bf16_it_is_as_near_to_float32_as_the_model_itself(name: str) -> None:
    """With one row, with few and with many, each after the other."""
    exact, halved = build(FAMILY[name]), build(FAMILY[name]).to(torch.bfloat16)
    sequence = torch.randn(150, 48)
    with torch.inference_mode():
        (expected,) = plain(exact, [sequence])
        (theirs,) = plain(halved, [sequence.bfloat16()])
        logits = exact.get_output_embeddings()(expected)
        lean = LeanDecoder.of(halved)
        assert lean is not None
        memory = KVMemory(halved.config, 256, torch.bfloat16, torch.device("cpu"))
        found = []
        for first, last in ((0, 1), (1, 1 + FEW_ROWS), (1 + FEW_ROWS, 150)):
            ragged = Ragged.of(memory, [Span(0, last - first, 0, first)], groups=3)
            piece = sequence[first:last].bfloat16()
            found.append(lean(piece, torch.arange(first, last), ragged, torch.arange(last - first)))
        ours = torch.cat(found)
        assert (lean.logits(ours).float() - logits).abs().mean() < 2 * (
            halved.get_output_embeddings()(theirs).float() - logits
        ).abs().mean()
    assert (ours.float() - expected).abs().mean() < 1.5 * (theirs.float() - expected).abs().mean()


def test_a_tied_embedding_stays_tied_and_looks_up_the_same_rows() -> None:
    llm = build(LlamaConfig(**SIZES, tie_word_embeddings=True))
    ids, states = torch.arange(97), torch.randn(3, 48)
    embedded, logits = llm.get_input_embeddings()(ids), llm.get_output_embeddings()(states)
    lean = LeanDecoder.of(llm)
    assert lean is not None
    assert (lean.logits(states) - logits).abs().max() < 1e-5
    assert llm.get_input_embeddings().weight is llm.get_output_embeddings().weight
    assert torch.equal(llm.get_input_embeddings()(ids), embedded)
    assert (llm.get_output_embeddings()(states) - logits).abs().max() < 1e-5


def test_only_wanted_rows_come_back() -> None:
    llm = build(FAMILY["llama"])
    sequence = torch.randn(30, 48)
    lean = LeanDecoder.of(llm)
    assert lean is not None
    memory = KVMemory(llm.config, 256, torch.float32, torch.device("cpu"))
    wanted = torch.tensor([3, 29])
    with torch.inference_mode():
        (expected,) = plain(llm, [sequence])
        hidden = lean(sequence, torch.arange(30), Ragged.of(memory, [Span(0, 30, 0, 0)], groups=3), wanted)
    assert (hidden - expected[wanted]).abs().max() < 1e-4


def test_the_model_itself_still_works_on_the_shared_weights() -> None:
    llm = build(FAMILY["qwen2"])
    sequence = torch.randn(30, 48)
    with torch.inference_mode():
        (before,) = plain(llm, [sequence])
    storage = {p.untyped_storage().data_ptr() for p in llm.parameters()}
    assert LeanDecoder.of(llm) is not None
    with torch.inference_mode():
        (after,) = plain(llm, [sequence])
        cached = llm.get_decoder()(inputs_embeds=sequence[None], past_key_values=DynamicCache(config=llm.config))
    assert (after - before).abs().max() < 1e-5
    assert (cached.last_hidden_state[0] - before).abs().max() < 1e-5
    assert len({p.untyped_storage().data_ptr() for p in llm.parameters()}) < len(storage)


def test_other_models_keep_their_own_forward() -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    assert LeanDecoder.of(build(GPTNeoXConfig(**sizes))) is None
    assert LeanDecoder.of(build(LlamaConfig(**SIZES, hidden_act="gelu"))) is None
    adapted = build(FAMILY["llama"])
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), adapted)
    assert LeanDecoder.of(adapted) is None

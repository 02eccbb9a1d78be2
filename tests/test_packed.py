"""A pack teaches what its dialogues teach one by one, whatever computes it."""

from __future__ import annotations

import copy

import pytest
import torch
from golden_files import template
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from actors.adapted import AdaptedDecoder
from actors.adapter import AdapterConfig, attach
from actors.config import FrameConfig, ModelConfig
from actors.dialogue import IGNORED, Rendered
from actors.model import VideoLLM
from actors.packed import Packed
from actors.turns import Assistant, Stream, System, User

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=4, sliding_window=None, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False),
}
WIDTH = 20
EVERYWHERE = r"model.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)|lm_head$"


def dialogues() -> list[Rendered]:
    """Four of different lengths, one of them without a frame."""
    tiny = template("tiny", "live1plus")
    made = [
        tiny.render(
            [
                System(content="Help." * count),
                Stream(num_frames=1),
                User(content="Narrate."),
                Assistant(content="A cat. " * count, learn=True),
                Stream(num_frames=count, learn=True),
                Assistant(content="A dog.", learn=True),
            ]
        )
        for count in (1, 2, 4)
    ]
    return [*made, tiny.render([User(content="Who?"), Assistant(content="You.", learn=True)])]


def frames_of(rendered: list[Rendered]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(one.num_frames, 10, WIDTH, generator=generator) for one in rendered]


def model_of(
    family: str,
    targets: str | list[str] = EVERYWHERE,
    dropout: float = 0,
    dtype: torch.dtype = torch.float32,
) -> VideoLLM:
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]), dtype=torch.float32)
    llm.to(torch.bfloat16).to(dtype)  # the same numbers in both types
    frames = FrameConfig(resolution_px=32, pooled=(3, 3), separator=",")
    config = ModelConfig(llm="tiny", vision="tiny", frames=frames, dtype="float32", stream_loss_weight=0.5)
    adapter = AdapterConfig(rank=3, alpha=6, dropout=dropout, targets=targets)
    model = VideoLLM(attach(llm, adapter), config, WIDTH)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def gradients(model: VideoLLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Up to rounding in float32."""
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def one_by_one(model: VideoLLM) -> Tensor:
    """The sum of the losses of single dialogues, by Hugging Face's modules under PEFT."""
    rendered = dialogues()
    losses = []
    for one, frames in zip(rendered, frames_of(rendered), strict=True):
        labels = torch.tensor([one.labels])
        losses.append(model(torch.tensor([one.input_ids]), frames, labels=labels, denominator=1.0).loss)
    return torch.stack(losses).sum()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_has_the_loss_and_gradients_of_its_dialogues(family: str, recompute: bool) -> None:
    model, rendered = model_of(family), dialogues()
    expected = one_by_one(model)
    wanted = gradients(model, expected)
    found = model.packed_loss(Packed.of(rendered), torch.cat(frames_of(rendered)), recompute=recompute)
    assert model._adapted is not None
    torch.testing.assert_close(found.weighted, expected, rtol=1e-5, atol=0)
    check_equal(gradients(model, found.weighted), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_in_bfloat16_learns_as_nearly_the_same_as_the_familys_own_forward(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = dialogues()
    pack, frames = Packed.of(rendered), torch.cat(frames_of(rendered))

    def learned(model: VideoLLM) -> Tensor:
        return torch.cat([one.flatten() for one in gradients(model, model.packed_loss(pack, frames).weighted).values()])

    exact = learned(model_of(family))
    half = model_of(family, dtype=torch.bfloat16)
    own = learned(half)
    assert half._adapted is not None
    monkeypatch.setattr(AdaptedDecoder, "of", lambda llm: None)
    usual = learned(model_of(family, dtype=torch.bfloat16))
    assert not torch.equal(own, usual)
    assert (own - exact).norm() <= 1.25 * (usual - exact).norm()


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["lm_head"]])
def test_adapters_on_some_modules_only_learn_alike(targets: list[str]) -> None:
    model, rendered = model_of("qwen2", targets), dialogues()
    wanted = gradients(model, one_by_one(model))
    found = model.packed_loss(Packed.of(rendered), torch.cat(frames_of(rendered))).weighted
    assert model._adapted is not None
    check_equal(gradients(model, found), wanted)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_that_is_not_known_learns_by_its_own_forward(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdaptedDecoder, "of", lambda llm: None)
    model, rendered = model_of("llama"), dialogues()
    wanted = gradients(model, one_by_one(model))
    found = model.packed_loss(Packed.of(rendered), torch.cat(frames_of(rendered)), recompute=recompute).weighted
    check_equal(gradients(model, found), wanted)


class EveryThird(torch.nn.Dropout):
    """Drops the same inputs at every call, so that two orders of calls can be compared."""

    def forward(self, rows: Tensor) -> Tensor:
        kept = torch.arange(rows.shape[-1]) % 3 != 0
        return rows * kept / (1 - self.p) if self.training else rows


def test_adapters_drop_inputs_of_their_own_as_under_peft() -> None:
    model, rendered = model_of("qwen2", dropout=0.3), dialogues()
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = EveryThird(0.3)
    wanted = gradients(model, one_by_one(model))
    found = model.packed_loss(Packed.of(rendered), torch.cat(frames_of(rendered))).weighted
    check_equal(gradients(model, found), wanted)
    model.eval()
    assert not torch.allclose(model.packed_loss(Packed.of(rendered), torch.cat(frames_of(rendered))).weighted, found)


def test_what_all_begin_with_is_computed_once_and_learned_from_alike() -> None:
    """The system prompt's gradients come from every dialogue that follows it."""
    tiny = template("tiny", "live1plus")
    rendered = [
        tiny.render(
            [
                System(content="You watch a video and say what happens."),
                *turns,
                Assistant(content="A dog " * number + "runs.", learn=True),
                Stream(num_frames=number, learn=True),
            ]
        )
        for number, turns in enumerate([[Stream(num_frames=1)], [User(content="What?")], [Stream(num_frames=3)]], 1)
    ]
    model, packed, frames = model_of("llama"), Packed.of(rendered), frames_of(rendered)
    assert 10 < packed.prefix < min(len(one.input_ids) for one in rendered)
    assert len(packed.input_ids) == sum(len(one.input_ids) for one in rendered) - 2 * packed.prefix
    single = [model.packed_loss(Packed.of([one]), part) for one, part in zip(rendered, frames, strict=True)]
    wanted = gradients(model, torch.stack([loss.weighted for loss in single]).sum())
    check_equal(gradients(model, model.packed_loss(packed, torch.cat(frames)).weighted), wanted)


def test_dialogues_that_are_all_alike_keep_something_of_their_own() -> None:
    rendered = dialogues()[:1] * 3
    packed = Packed.of(rendered)
    model, frames = model_of("llama"), frames_of(dialogues()[:1])[0]
    once = model.packed_loss(Packed.of(rendered[:1]), frames).weighted
    torch.testing.assert_close(model.packed_loss(packed, frames.repeat(3, 1, 1)).weighted, 3 * once)
    assert packed.prefix < packed.lengths[0]


def test_text_and_stream_are_summed_apart_and_weighted_together() -> None:
    model, rendered = model_of("llama"), dialogues()
    packed, frames = Packed.of(rendered), torch.cat(frames_of(rendered))
    found = model.packed_loss(packed, frames)
    torch.testing.assert_close(found.weighted, found.text + 0.5 * found.stream)
    weights = torch.where(packed.input_ids == model.frame_id, 2.0, 3.0)
    weighted = model.packed_loss(packed, frames, weights).weighted
    torch.testing.assert_close(weighted, 3 * found.text + 2 * found.stream)


def test_labels_beyond_the_rows_that_fit_at_once_learn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rendered = model_of("llama"), dialogues()
    packed, frames = Packed.of(rendered), torch.cat(frames_of(rendered))
    wanted = gradients(model, model.packed_loss(packed, frames).weighted)
    monkeypatch.setattr("actors.model.LOGIT_ROWS", 7)
    found = gradients(model, model.packed_loss(packed, frames).weighted)
    check_equal(found, wanted)


def test_only_learned_positions_reach_the_head() -> None:
    model, rendered = model_of("llama", ["q_proj"]), dialogues()
    rows = []
    model.base_llm.get_output_embeddings().register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    packed = Packed.of(rendered)
    model.packed_loss(packed, torch.cat(frames_of(rendered)))
    assert rows == [int((packed.labels != IGNORED).sum())]


def test_a_pack_without_a_label_is_refused() -> None:
    model, rendered = model_of("llama"), dialogues()[-1:]
    packed = Packed.of(rendered)
    packed.labels[:] = IGNORED
    with pytest.raises(ValueError, match="no label"):
        model.packed_loss(packed, torch.empty(0, 10, WIDTH))
    with pytest.raises(ValueError, match="at least one dialogue"):
        Packed.of([])


def test_trained_weights_still_serve_through_their_own_modules() -> None:
    """The fused products are views: what Hugging Face's forward reads stays the same numbers."""
    model, rendered = model_of("llama"), dialogues()
    before = one_by_one(model)
    model.packed_loss(Packed.of(rendered), torch.cat(frames_of(rendered)))
    assert torch.equal(one_by_one(model), before)
    layer = model.base_llm.get_decoder().layers[0].self_attn
    query, key = (layer.get_submodule(name).base_layer.weight for name in ("q_proj", "k_proj"))
    assert query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()

import copy
import json
import lzma
import re
from itertools import pairwise

import pytest
import torch
from golden_files import GOLDEN, template
from safetensors.torch import load
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from actors import checkpoint
from actors.adapter import AdapterConfig, attach
from actors.config import FrameConfig, ModelConfig
from actors.dialogue import IGNORED
from actors.model import VideoLLM, streaming_loss
from actors.objective import STOCK_REPLY, taught
from actors.turns import Assistant, Stream, System, Turn, User

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama2": LlamaConfig(**SIZES, num_key_value_heads=4, tie_word_embeddings=False),
    "llama3": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE),
    "smollm2": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False),
}
FRAMES = FrameConfig(resolution_px=32, pooled=(1, 2), separator=",")  # 3 tokens a frame
WIDTH = 20
CONFIG = ModelConfig(llm="tiny", vision="tiny", frames=FRAMES, dtype="float32")
V = SIZES["vocab_size"]
IDS = torch.tensor([[5, V, V, V, 7, V, V, V, 8, 9], [1, 2, 3, 4, 5, 6, V, V, V, 7]])
LABELS = torch.tensor(
    [[-100, -100, -100, 7, -100, -100, -100, 8, 9, 2], [-100, 3, -100, 5, -100, -100, -100, -100, 7, 2]]
)


def random_llm(family: str = "llama3") -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]), dtype=torch.float32).eval()


def random_model(family: str = "llama3") -> VideoLLM:
    return VideoLLM(random_llm(family), CONFIG, WIDTH).eval()


def random_frames(count: int = 3) -> Tensor:
    return torch.randn(count, FRAMES.num_tokens, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load(lzma.decompress((GOLDEN / "forward" / "live1plus.safetensors.xz").read_bytes()))


@pytest.fixture(scope="module")
def golden_losses() -> dict[str, float]:
    return json.loads((GOLDEN / "forward" / "live1plus.json").read_text())


@pytest.fixture(scope="module")
def tiny(tiny_configs: dict[str, ModelConfig]) -> VideoLLM:
    """The reference's tiny live1plus model, adapter unmerged."""
    return checkpoint.load(tiny_configs["live1plus"], merged=False).model


def test_embeddings_and_logits_equal_the_references(tiny: VideoLLM, golden: dict[str, Tensor]):
    with torch.inference_mode():
        connected = tiny.connect(golden["frame_features"]).flatten(0, 1)
        embeddings = tiny.embed(golden["input_ids"], golden["frame_features"])
        logits = tiny(golden["input_ids"], golden["frame_features"], attention_mask=golden["attention_mask"]).logits
        text_only = tiny(golden["text_only_input_ids"]).logits
    torch.testing.assert_close(connected, golden["connector_output"], atol=1e-5, rtol=0)
    torch.testing.assert_close(embeddings, golden["joint_embed"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[:, ::2], golden["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(text_only, golden["text_only_logits"], atol=1e-4, rtol=0)


def test_a_left_padded_batch_equals_the_references(
    tiny: VideoLLM, golden: dict[str, Tensor], golden_losses: dict[str, float]
):
    ids, mask = golden["batch_input_ids"], golden["batch_attention_mask"]
    with torch.inference_mode():
        logits = tiny(ids, golden["batch_frames"], attention_mask=mask).logits * mask.unsqueeze(-1)
        loss = tiny(ids, golden["batch_frames"], attention_mask=mask, labels=golden["batch_labels"]).loss
    half = golden["batch_logits_padding_zeroed"].float()  # kept in fp16: 11 bits
    torch.testing.assert_close(logits[:, ::5], half, atol=1e-4, rtol=2**-11)
    assert loss.item() == pytest.approx(golden_losses["batch_loss_w1.0"], abs=1e-4)


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0, 2.0])
def test_the_loss_equals_the_references_at_every_weight(
    weight: float, tiny: VideoLLM, golden: dict[str, Tensor], golden_losses: dict[str, float]
):
    logits = tiny(golden["input_ids"], golden["frame_features"]).logits
    at_frame = golden["input_ids"] == tiny.frame_id
    loss = streaming_loss(logits, golden["labels"], at_frame, weight)
    assert loss.item() == pytest.approx(golden_losses[f"loss_w{weight}"], abs=1e-6)


def test_gradients_of_adapter_and_connector_equal_the_references(tiny: VideoLLM, golden: dict[str, Tensor]):
    tiny.zero_grad()
    tiny(golden["input_ids"], golden["frame_features"], labels=golden["labels"]).loss.backward()
    found = {}
    for name, parameter in tiny.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("llm.").replace(
                "connector.", "base_model.model.connector.modules_to_save.default."
            )
            found[f"grad.{name}"] = parameter.grad
    expected = {name: tensor for name, tensor in golden.items() if name.startswith("grad.")}
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_the_connector_in_bf16_is_within_its_rounding(tiny_configs: dict[str, ModelConfig], golden: dict[str, Tensor]):
    model = checkpoint.load(tiny_configs["live1plus"], dtype=torch.bfloat16).model
    found = model.connect(golden["frame_features"])
    assert found.dtype == torch.bfloat16
    # The reference rounds GELU after every step of its formula, torch once: two units in the last place.
    torch.testing.assert_close(found, golden["connector_output_bf16"], atol=2**-6, rtol=2**-6)


def test_a_reply_is_generated_from_embedded_frames(tiny: VideoLLM, golden: dict[str, Tensor]):
    """The tiny model knows its dialogue by heart: it ends the last answer as it was written, eos included."""
    eos = 1023
    assert golden["input_ids"][0, -1] == eos
    prompt, ending = golden["input_ids"][:, :-4], golden["input_ids"][:, -4:]
    generated = tiny.base_llm.generate(
        inputs_embeds=tiny.embed(prompt, golden["frame_features"]),
        attention_mask=torch.ones_like(prompt),
        generation_config=GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=eos, pad_token_id=eos),
    )
    assert torch.equal(generated, ending)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_causal_lm_reads_frames_learns_and_runs_in_steps(family: str):
    model = random_model(family)
    model.llm = attach(model.llm, AdapterConfig(rank=2, alpha=4))
    model.eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    full = model(IDS[:1], random_frames(2)).logits

    cache = DynamicCache(config=model.llm.config)
    steps = []
    for start, stop in pairwise([0, 1, 4, 8, 10]):
        frames = random_frames(2)[(start > 1) : 1 + (start > 1)] if IDS[0, start:stop].eq(V).any() else None
        steps.append(model(IDS[:1, start:stop], frames, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-5, rtol=1e-4)

    loss = model(IDS, random_frames(), labels=LABELS).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

    model.merge()
    torch.testing.assert_close(model(IDS[:1], random_frames(2)).logits, full, atol=1e-5, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_on_a_shared_head_leaves_the_embeddings_alone():
    llm = random_llm("smollm2")
    before = llm.get_input_embeddings().weight.detach().clone()
    assert llm.get_output_embeddings().weight is llm.get_input_embeddings().weight
    model = VideoLLM(attach(llm, AdapterConfig(rank=2, alpha=4)), CONFIG, WIDTH)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.merge()
    assert torch.equal(model.llm.get_input_embeddings().weight, before)
    assert not torch.equal(model.llm.get_output_embeddings().weight, before)


def test_targets_that_match_nothing_are_an_error():
    llm = random_llm()
    for targets in ("transformer.*attn", ["c_attn"]):
        expected = f"{re.escape(repr(targets))} match no linear module of LlamaForCausalLM, which has down_proj"
        with pytest.raises(ValueError, match=expected):
            attach(llm, AdapterConfig(targets=targets))


def test_logits_are_computed_only_where_they_are_wanted():
    model = random_model()
    rows = []
    model.llm.lm_head.register_forward_hook(
        lambda _, inputs, __: rows.append(inputs[0].numel() // SIZES["hidden_size"])
    )
    full = model(IDS, random_frames()).logits
    wanted = IDS == 7
    some = model(IDS, random_frames(), logits_at=wanted).logits
    torch.testing.assert_close(some, full[wanted])
    learned = model(IDS, random_frames(), labels=LABELS)
    torch.testing.assert_close(learned.logits, full[LABELS != IGNORED])
    at_frame = model.frame_id == IDS
    torch.testing.assert_close(learned.loss, streaming_loss(full, LABELS, at_frame, CONFIG.stream_loss_weight))
    assert rows == [IDS.numel(), int(wanted.sum()), int((LABELS != IGNORED).sum())]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (None, "9 frame placeholders in the ids, but 0 frames of 3 tokens"),
        (random_frames(2), "9 frame placeholders in the ids, but 2 frames"),
        (random_frames(4), "9 frame placeholders in the ids, but 4 frames"),
        (random_frames(1)[:, :1], r"shape \[1, 1, 20\], expected \[frames, 3, 20\]"),
        (random_frames(3)[..., :-1], r"shape \[3, 3, 19\], expected \[frames, 3, 20\]"),
        (random_frames(3)[:, 0], r"shape \[3, 20\], expected \[frames, 3, 20\]"),
        (torch.zeros(1, 20), r"shape \[1, 20\], expected \[frames, 3, 20\]"),
    ],
)
def test_frames_that_do_not_match_the_placeholders_are_refused(frames: Tensor | None, message: str):
    with pytest.raises(ValueError, match=message):
        random_model().embed(IDS, frames)


def test_frames_without_a_placeholder_are_refused():
    with pytest.raises(ValueError, match="0 frame placeholders in the ids, but 1 frames"):
        random_model().embed(torch.tensor([[1, 2]]), random_frames(1))


def test_ids_without_a_batch_are_embedded_alike():
    model = random_model()
    assert torch.equal(model.embed(IDS[0], random_frames(2)), model.embed(IDS[:1], random_frames(2))[0])


def test_every_parameter_gets_a_gradient_when_a_batch_has_no_frame():
    model = random_model()
    model.llm = attach(model.llm, AdapterConfig(rank=2, alpha=4))
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[2, 3, 4]])).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not any(p.grad.any() for p in model.connector.parameters())


def test_nothing_learned_is_a_loss_of_zero_with_a_gradient():
    model = random_model()
    loss = model(IDS, random_frames(), labels=torch.full_like(IDS, IGNORED)).loss
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_loss_divides_by_all_labels_and_weighs_those_at_frames():
    logits = torch.randn(1, 4, 8)
    labels = torch.tensor([[1, IGNORED, 2, 3]])
    at_frame = torch.tensor([[True, True, False, True]])
    each = torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="none", ignore_index=IGNORED)
    expected = (0.5 * each[0] + each[2] + 0.5 * each[3]) / 3
    torch.testing.assert_close(streaming_loss(logits, labels, at_frame, 0.5), expected)


def test_parts_of_a_batch_with_a_common_denominator_add_up_to_the_whole():
    model = random_model()
    count = (LABELS != IGNORED).sum()
    whole = model(IDS, random_frames(), labels=LABELS).loss
    first = model(IDS[:1], random_frames()[:2], labels=LABELS[:1], denominator=count).loss
    second = model(IDS[1:], random_frames()[2:], labels=LABELS[1:], denominator=count).loss
    torch.testing.assert_close(first + second, whole)


def test_a_placeholder_inside_the_embedding_table_is_refused():
    llm = random_llm()
    assert VideoLLM(llm, CONFIG, WIDTH).frame_id == V
    with pytest.raises(ValueError, match=f"frame_id is {V - 1}, but ids below {V} have embeddings"):
        VideoLLM(llm, CONFIG, WIDTH, frame_id=V - 1)


def test_an_llm_that_changes_its_logits_after_the_head_is_refused():
    llm = AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8))
    with pytest.raises(ValueError, match="final_logit_softcapping, which is not supported"):
        VideoLLM(llm, CONFIG, WIDTH)


def test_labels_and_chosen_positions_together_are_refused():
    with pytest.raises(ValueError, match="give labels or logits_at"):
        random_model()(IDS, random_frames(), labels=LABELS, logits_at=LABELS != IGNORED)


CONVERSATION: list[Turn] = [
    System(content="Help."),
    User(content="Narrate."),
    Stream(num_frames=3, learn=True),
    Assistant(content="A cat.", learn=True),
    Stream(num_frames=2, learn=1),
    User(content="Where?"),
    Assistant(content="Here.", learn=True),
    Stream(num_frames=2, learn=True),
]


def learned_text(turns: list[Turn]) -> list[str]:
    """What is learned, position by position, as text."""
    tiny_template = template("tiny", "live1plus")
    labels = [label for label in tiny_template.render(turns).labels if label != IGNORED]
    return [tiny_template.tokenizer.decode([label]) for label in labels]


def test_streaming_learns_decisions_and_words():
    assert taught(CONVERSATION, "streaming") == CONVERSATION
    learned = learned_text(taught(CONVERSATION, "streaming"))
    assert learned.count(",") == 4
    assert learned.count("]\n") == 1


def test_interleaved_learns_the_same_words_and_no_decision():
    interleaved = taught(CONVERSATION, "interleaved")
    streaming = template("tiny", "live1plus").render(CONVERSATION)
    rendered = template("tiny", "live1plus").render(interleaved)
    assert rendered.input_ids == streaming.input_ids
    for label, other, at_frame in zip(rendered.labels, streaming.labels, streaming.at_frame, strict=True):
        assert label == (IGNORED if at_frame else other)


def test_per_frame_answers_every_frame_at_which_nobody_speaks():
    stock = Assistant(content=STOCK_REPLY, learn=True)
    unlearned = Assistant(content=STOCK_REPLY, learn=False)
    frame = Stream(num_frames=1)
    assert taught(CONVERSATION, "per_frame") == [
        *CONVERSATION[:2],
        *(frame, stock, frame, stock, frame, CONVERSATION[3]),
        *(frame, stock, frame, CONVERSATION[5], CONVERSATION[6]),
        *(frame, stock, frame, stock),
    ]
    early = [Stream(num_frames=3, learn=1), Assistant(content="A cat.")]
    assert taught(early, "per_frame") == [frame, stock, frame, unlearned, frame, early[1]]

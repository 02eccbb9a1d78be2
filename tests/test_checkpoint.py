import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from huggingface_hub.errors import GatedRepoError
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from actors import checkpoint, weights
from actors.adapter import AdapterConfig
from actors.causal_lm import load_tokenizer
from actors.config import ConfigError, FrameConfig, ModelConfig, load_config
from actors.dialogue import DialogueError
from actors.parts import CheckpointError
from actors.weights import WeightsError
from jobs.export_checkpoint import export

PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
# Of the reference's PEFT, 0.12, which refuses keys that it does not know.
PEFT_012_KEYS = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode"),
    *("init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config"),
    *("lora_alpha", "lora_dropout", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "r"),
    *("rank_pattern", "revision", "target_modules", "task_type", "use_dora", "use_rslora"),
}


def logits(loaded: checkpoint.Loaded) -> torch.Tensor:
    """Logits of a few ids and a frame, the same every time."""
    n, d = loaded.model.frame_shape
    ids = torch.tensor([[5, *[loaded.model.frame_id] * n, 7, 8]])
    frames = torch.randn(1, n, d, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return loaded.model(ids, frames).logits


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, to be damaged."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


@pytest.fixture
def adapter_copy(tiny_configs: dict[str, ModelConfig], tmp_path: Path) -> ModelConfig:
    """Settings with a copy of the reference's adapter, to be changed."""
    config = tiny_configs["live1plus"]
    folder = shutil.copytree(str(config.checkpoint), tmp_path / "adapter")
    return config.model_copy(update={"checkpoint": str(folder)})


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("version", ["live1", "live1plus"])
@pytest.mark.parametrize("merged", [True, False])
def test_the_references_adapter_gives_base_plus_scaled_product(
    version: str, merged: bool, tiny_configs: dict[str, ModelConfig]
):
    config = tiny_configs[version]
    loaded = checkpoint.load(config, merged=merged)
    expected = checkpoint.load(config).model
    base = load_file(Path(config.llm) / "model.safetensors")
    tensors = load_file(Path(str(config.checkpoint)) / "adapter_model.safetensors")
    for name, weight in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in tensors:
            weight = weight + 2 * tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
        torch.testing.assert_close(expected.llm.get_parameter(name).data, weight)
    torch.testing.assert_close(logits(loaded), logits(checkpoint.load(config)), atol=1e-4, rtol=0)
    assert isinstance(loaded.model.llm, PeftModel) is not merged
    for name, tensor in loaded.model.connector.state_dict().items():
        assert torch.equal(tensor, tensors[f"base_model.model.connector.{name}"])
    assert loaded.template.frame_id == loaded.model.frame_id == 1024
    assert loaded.features.startswith("siglip/32px/cls")


def test_the_published_layout_loads_at_reduced_size(tmp_path: Path, tiny_models: Path):
    """Names and shapes of videollm-online-8b-v1plus: rank 128 everywhere and in the head, D 1024 to H."""
    hidden, mlp, heads, kv_heads, vocabulary, layers, rank, width = 64, 112, 8, 2, 1024, 2, 128, 48
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            tie_word_embeddings=False,
        )
    )
    llm.save_pretrained(tmp_path / "llm")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_models / "llm_live1plus" / file, tmp_path / "llm")
    sizes = {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, 16),
        "v_proj": (hidden, 16),
        "o_proj": (hidden, hidden),
        "gate_proj": (hidden, mlp),
        "up_proj": (hidden, mlp),
        "down_proj": (mlp, hidden),
    }
    prefix = "base_model.model"
    shapes = {
        f"{prefix}.connector.0.weight": (hidden, width),
        f"{prefix}.connector.0.bias": (hidden,),
        f"{prefix}.connector.2.weight": (hidden, hidden),
        f"{prefix}.connector.2.bias": (hidden,),
        f"{prefix}.lm_head.lora_A.weight": (rank, hidden),
        f"{prefix}.lm_head.lora_B.weight": (vocabulary, rank),
    }
    for layer in range(layers):
        for block, names in PROJECTIONS.items():
            for name in names:
                inputs, outputs = sizes[name]
                shapes[f"{prefix}.model.layers.{layer}.{block}.{name}.lora_A.weight"] = (rank, inputs)
                shapes[f"{prefix}.model.layers.{layer}.{block}.{name}.lora_B.weight"] = (outputs, rank)
    tensors = {name: torch.randn(shape) * 0.01 for name, shape in shapes.items()}
    tensors[f"{prefix}.lm_head.base_layer.weight"] = llm.lm_head.weight.detach().clone()
    folder = tmp_path / "published"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    written = json.loads((tiny_models / "adapter_live1plus" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(written | {"r": 128, "lora_alpha": 256}))
    (folder / "training_args.bin").write_bytes(b"never read")

    config = ModelConfig(
        llm=str(tmp_path / "llm"),
        vision=str(tiny_models / "siglip"),
        frames=FrameConfig(resolution_px=32, pooled=(3, 3), separator=","),
        checkpoint=str(folder),
    )
    loaded = checkpoint.load(config)
    assert loaded.adapter == AdapterConfig()
    assert loaded.model.frame_shape == (10, width)
    assert logits(loaded).isfinite().all()


def test_a_head_of_its_own_is_used_and_kept(adapter_copy: ModelConfig, tmp_path: Path):
    file = Path(str(adapter_copy.checkpoint)) / "adapter_model.safetensors"
    tensors = load_file(file)
    before = checkpoint.load(adapter_copy)
    tensors["base_model.model.lm_head.base_layer.weight"] += 0.5
    save_file(tensors, file)
    changed = checkpoint.load(adapter_copy, merged=False)
    assert not torch.allclose(logits(changed), logits(before), atol=1e-2)
    assert changed.fingerprint != before.fingerprint
    checkpoint.save(tmp_path / "ours", changed)
    again = checkpoint.load(tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(changed), atol=1e-4, rtol=0)
    assert again.fingerprint == changed.fingerprint


def test_without_a_head_inside_the_references_adapter_loads_alike(adapter_copy: ModelConfig):
    file = Path(str(adapter_copy.checkpoint)) / "adapter_model.safetensors"
    before = checkpoint.load(adapter_copy)
    tensors = load_file(file)
    del tensors["base_model.model.lm_head.base_layer.weight"]
    save_file(tensors, file)
    assert torch.equal(logits(checkpoint.load(adapter_copy)), logits(before))


@pytest.mark.parametrize("merged", [True, False])
def test_our_folder_gives_the_same_model_back(
    merged: bool, tiny_checkpoint: Path, tiny_configs: dict[str, ModelConfig]
):
    original = checkpoint.load(tiny_configs["live1plus"], merged=merged)
    loaded = checkpoint.load(tiny_checkpoint, merged=merged)
    assert torch.equal(logits(loaded), logits(original))
    assert loaded.fingerprint == original.fingerprint == checkpoint.read_settings(tiny_checkpoint).fingerprint
    assert loaded.features == original.features
    assert loaded.adapter == original.adapter
    assert loaded.trained_videos == ["tiny_world"]
    text = "A cat sits.\nIt eats, twice."
    assert loaded.template.tokenizer(text).input_ids == original.template.tokenizer(text).input_ids
    assert {path.name for path in tiny_checkpoint.iterdir()} == {
        *("settings.json", "connector.safetensors", "adapter_model.safetensors", "adapter_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
def test_our_adapter_is_a_plain_peft_adapter(tiny_checkpoint: Path, tiny_models: Path):
    llm = LlamaForCausalLM.from_pretrained(tiny_models / "llm_live1plus", dtype=torch.float32)
    plain = PeftModel.from_pretrained(llm, str(tiny_checkpoint)).merge_and_unload()
    ours = checkpoint.load(tiny_checkpoint).model.llm
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name))


def test_exported_to_the_references_form_nothing_has_changed(
    tiny_checkpoint: Path, tiny_configs: dict[str, ModelConfig], tmp_path: Path
):
    checkpoint.export_published(tmp_path / "export", checkpoint.load(tiny_checkpoint, merged=False))
    original = load_file(Path(str(tiny_configs["live1plus"].checkpoint)) / "adapter_model.safetensors")
    exported = load_file(tmp_path / "export" / "adapter_model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)
    written = json.loads((tmp_path / "export" / "adapter_config.json").read_text())
    assert written.keys() <= PEFT_012_KEYS
    assert written["modules_to_save"] == ["connector"]
    config = tiny_configs["live1plus"].model_copy(update={"checkpoint": str(tmp_path / "export")})
    assert checkpoint.load(config).fingerprint == checkpoint.load(tiny_checkpoint).fingerprint


@pytest.mark.parametrize("form", ["ours", "published"])
def test_an_export_may_replace_one_of_its_form_and_nothing_else(
    form: str, tiny_checkpoint: Path, tiny_configs: dict[str, ModelConfig], tmp_path: Path
):
    folder, settings = tmp_path / "export", tmp_path / "tiny.yaml"
    model = tiny_configs["live1plus"].model_copy(update={"checkpoint": str(tiny_checkpoint)})
    settings.write_text(yaml.safe_dump({"model": model.model_dump(mode="json")}))

    def run(*more: str) -> Path:
        return export(load_config(settings, [f"export.folder={folder}", f"export.form={form}", *more]))

    first = {file.name: file.read_bytes() for file in run().iterdir()}
    with pytest.raises(ConfigError, match=r"exists: choose another export\.folder, or set export\.replace"):
        run()
    (folder / "steps").mkdir()
    with pytest.raises(ConfigError, match="exists"):  # a training run, say
        run("export.replace=true")
    (folder / "steps").rmdir()
    (folder / "left over").touch()
    assert {file.name: file.read_bytes() for file in run("export.replace=true").iterdir()} == first
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match="exists"):
        run("export.replace=true")


def test_the_average_of_two_checkpoints_lies_between_them(tiny_checkpoint: Path):
    loaded, other = (checkpoint.load(tiny_checkpoint, merged=False) for _ in range(2))
    before = {name: each.detach().clone() for name, each in loaded.model.named_parameters()}
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(1)
    checkpoint.average(loaded, other, 0.75)
    for name, parameter in loaded.model.named_parameters():
        assert torch.allclose(parameter, before[name] + (0.25 if parameter.requires_grad else 0))


def test_checkpoints_that_do_not_fit_have_no_average(tiny_checkpoint: Path):
    loaded = checkpoint.load(tiny_checkpoint, merged=False)
    with pytest.raises(CheckpointError, match="have no average"):
        checkpoint.average(loaded, replace(loaded, llm="another"), 0.5)


def test_a_run_goes_on_from_what_was_saved(tiny_checkpoint: Path, tmp_path: Path):
    loaded = checkpoint.load(tiny_checkpoint, dtype=torch.bfloat16, merged=False)
    trainable = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    assert len(trainable) == 4 + 2 * (3 * 7 + 1)
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    ids = torch.tensor([[5, *[1024] * 10, 7, 8]])
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    loaded.model(ids, torch.randn(1, 10, 48), labels=ids.masked_fill(ids == 1024, -100)).loss.backward()
    optimizer.step()
    checkpoint.save(tmp_path / "next", loaded, ["another", "tiny_world"])
    again = checkpoint.load(tmp_path / "next", dtype=torch.bfloat16, merged=False)
    assert torch.equal(logits(again), logits(loaded))
    assert not torch.equal(logits(again), logits(checkpoint.load(tiny_checkpoint, dtype=torch.bfloat16)))
    assert again.fingerprint != loaded.fingerprint
    assert again.trained_videos == ["another", "tiny_world"]


def test_a_merged_model_cannot_be_saved(tiny_checkpoint: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"was merged into the LLM .* load it with merged=False"):
        checkpoint.save(tmp_path / "merged", checkpoint.load(tiny_checkpoint))
    assert not (tmp_path / "merged").exists()


def test_an_interrupted_save_keeps_the_old_folder(copy: Path, monkeypatch: pytest.MonkeyPatch):
    before = checkpoint.load(copy, merged=False)
    monkeypatch.setattr(before.template.tokenizer, "save_pretrained", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.save(copy, before, ["new"])
    assert checkpoint.load(copy).trained_videos == ["tiny_world"]
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_settings_given_now_win_where_they_may_differ(tiny_checkpoint: Path, tiny_configs: dict[str, ModelConfig]):
    config = ModelConfig(
        llm=tiny_configs["live1plus"].llm,
        vision=tiny_configs["live1plus"].vision,
        frames=tiny_configs["live1plus"].frames,
        system_prompt="Be brief.",
        checkpoint=str(tiny_checkpoint),
    )
    loaded = checkpoint.load(config)
    assert loaded.config.system_prompt == "Be brief."
    assert loaded.config.dtype == "float32"
    assert loaded.fingerprint != checkpoint.load(tiny_checkpoint).fingerprint


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def pickle_it(path: Path) -> None:
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated connector": (
        lambda folder: cut_short(folder / "connector.safetensors"),
        "connector.safetensors .* no complete safetensors file",
    ),
    "truncated adapter": (
        lambda folder: cut_short(folder / "adapter_model.safetensors"),
        "adapter_model.safetensors .* no complete safetensors file",
    ),
    "missing connector": (
        lambda folder: (folder / "connector.safetensors").unlink(),
        "connector.safetensors is missing",
    ),
    "pickled adapter": (
        lambda folder: pickle_it(folder / "adapter_model.safetensors"),
        "holds adapter_model.bin, a pickled file, which is never read",
    ),
    "pickle under a safe name": (
        lambda folder: torch.save({}, folder / "connector.safetensors"),
        "no complete safetensors file",
    ),
    "another value": (
        lambda folder: rewrite(folder / "connector.safetensors", lambda tensors: tensors["0.bias"].add_(1)),
        "have digest .* settings.json expects .* changed",
    ),
    "adapter gone": (
        lambda folder: [(folder / f"adapter_{name}").unlink() for name in ("config.json", "model.safetensors")],
        "files were lost, changed or mixed",
    ),
    "settings of a later version": (
        lambda folder: edit_json(folder / "settings.json", format_version=2),
        "has format version 2, expected 1",
    ),
    "settings cut off": (lambda folder: cut_short(folder / "settings.json"), "is damaged or no checkpoint of ours"),
    "settings of something else": (lambda folder: (folder / "settings.json").write_text("[]"), "no checkpoint of ours"),
    "settings with an unknown key": (
        lambda folder: edit_json(folder / "settings.json", extra=1),
        "settings.json is damaged: extra",
    ),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        "holds no tokenizer that can be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(damage: str, copy: Path):
    do, message = DAMAGES[damage]
    do(copy)
    with pytest.raises((CheckpointError, WeightsError), match=message):
        checkpoint.load(copy)


MISFITS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "no connector": (
        lambda t: [t.pop(name) for name in list(t) if "connector" in name],
        "a plain adapter is no video language model",
    ),
    "half a connector": (
        lambda t: t.pop("base_model.model.connector.2.bias"),
        "the connector has 3 tensors, this model expects 4: 1 missing, such as 2.bias",
    ),
    "connector of another LLM": (
        lambda t: t.update({"base_model.model.connector.2.bias": torch.zeros(32)}),
        r"2.bias of the connector has shape \[32\], this model expects \[64\]: .* another LLM",
    ),
    "adapter of another LLM": (
        lambda t: t.update({"base_model.model.lm_head.lora_B.weight": torch.zeros(32, 4)}),
        r"lm_head.lora_B.weight of the adapter has shape \[32, 4\], this model expects \[1024, 4\]",
    ),
    "missing layer": (
        lambda t: [t.pop(name) for name in list(t) if "layers.2." in name],
        "the adapter has 30 tensors, this model expects 44: 14 missing",
    ),
    "layer too many": (
        lambda t: t.update({"base_model.model.model.layers.3.mlp.up_proj.lora_A.weight": torch.zeros(4, 64)}),
        "1 not expected, such as base_model.model.model.layers.3",
    ),
    "head of another LLM": (
        lambda t: t.update({"base_model.model.lm_head.base_layer.weight": torch.zeros(32, 64)}),
        r"of the head has shape \[32, 64\], this model expects \[1024, 64\]",
    ),
    "embeddings of another LLM": (
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(1024, 64)}),
        "embeddings that differ from the LLM's",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_published_adapter_that_does_not_fit_is_refused(misfit: str, adapter_copy: ModelConfig):
    change, message = MISFITS[misfit]
    rewrite(Path(str(adapter_copy.checkpoint)) / "adapter_model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(adapter_copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"use_rslora": True}, "use_rslora is True"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"alpha_pattern": {"lm_head": 3}}, "alpha_pattern is"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save.0 is 'embed_tokens'"),
        ({"target_modules": "transformer.*attn"}, "match no linear module"),
    ],
)
def test_an_adapter_that_would_compute_something_else_is_refused(
    changes: dict[str, object], message: str, adapter_copy: ModelConfig
):
    edit_json(Path(str(adapter_copy.checkpoint)) / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(adapter_copy)


def test_frames_other_than_those_of_training_are_refused(tiny_checkpoint: Path, tiny_configs: dict[str, ModelConfig]):
    config = tiny_configs["live1"].model_copy(update={"checkpoint": str(tiny_checkpoint)})
    with pytest.raises(CheckpointError, match=r"trained on frames of .*pooled=\(3, 3\).* settings say .*pooled=None"):
        checkpoint.load(config)


def test_another_llm_than_that_of_training_is_refused(tiny_checkpoint: Path, tiny_configs: dict[str, ModelConfig]):
    config = tiny_configs["live1plus"].model_copy(
        update={"checkpoint": str(tiny_checkpoint), "llm": tiny_configs["live1"].llm}
    )
    with pytest.raises(CheckpointError, match=r"trained on .*llm_live1plus with digest .*llm_live1 has"):
        checkpoint.load(config)


def test_another_vision_encoder_than_that_of_training_is_refused(
    tiny_checkpoint: Path, tiny_configs: dict[str, ModelConfig], tmp_path: Path
):
    vision = shutil.copytree(tiny_configs["live1plus"].vision, tmp_path / "siglip")
    config = tiny_configs["live1plus"].model_copy(update={"checkpoint": str(tiny_checkpoint), "vision": str(vision)})
    assert checkpoint.load(config).features == checkpoint.load(tiny_checkpoint).features
    rewrite(vision / "model.safetensors", lambda tensors: tensors["logit_bias"].add_(1))
    with pytest.raises(CheckpointError, match=r"frame tokens of siglip/32px/cls\+3x3/.* makes siglip/32px/cls\+3x3/"):
        checkpoint.load(config)


def test_a_damaged_llm_is_refused(tiny_configs: dict[str, ModelConfig], tmp_path: Path):
    llm = shutil.copytree(tiny_configs["live1plus"].llm, tmp_path / "llm")
    config = tiny_configs["live1plus"].model_copy(update={"llm": str(llm)})
    rewrite(llm / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(WeightsError, match=r"lacks 1 weights of a LlamaForCausalLM, such as model.norm.weight"):
        checkpoint.load(config)
    cut_short(llm / "model.safetensors")
    with pytest.raises(WeightsError, match="no complete safetensors file"):
        checkpoint.load(config)


def test_a_gated_llm_without_a_token_says_what_to_do(
    tiny_configs: dict[str, ModelConfig], monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object, **__: object) -> str:
        request = httpx.Request("GET", "https://huggingface.co/meta-llama/Meta-Llama-3-8B-Instruct")
        raise GatedRepoError("gated", response=httpx.Response(401, request=request))

    monkeypatch.setattr(weights, "snapshot_download", refuse)
    config = tiny_configs["live1plus"].model_copy(update={"llm": "meta-llama/Meta-Llama-3-8B-Instruct"})
    with pytest.raises(
        WeightsError, match=r"Meta-Llama-3-8B-Instruct is a gated model: accept its licence .* HF_TOKEN"
    ):
        checkpoint.load(config)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, tiny_configs: dict[str, ModelConfig]):
    with pytest.raises(WeightsError, match="is no folder"):
        checkpoint.load(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"found notes.txt; expected settings.json .* adapter_config.json"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="does not say what its frames are: load it through a ModelConfig"):
        checkpoint.load(str(tiny_configs["live1plus"].checkpoint))


def test_without_a_checkpoint_nothing_is_loaded_silently(
    tiny_configs: dict[str, ModelConfig], caplog: pytest.LogCaptureFixture
):
    config = tiny_configs["live1plus"].model_copy(update={"checkpoint": None})
    with pytest.raises(CheckpointError, match=r"model.checkpoint is not set"):
        checkpoint.load(config)
    with caplog.at_level(logging.WARNING):
        loaded = checkpoint.load_or_untrained(config)
    assert "connector is random" in caplog.text
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    with pytest.raises(WeightsError, match="is no folder"):
        checkpoint.load_or_untrained(config.model_copy(update={"checkpoint": "/nowhere"}))


@pytest.mark.parametrize("vocabulary", [1024, 1100])
def test_the_placeholder_is_outside_the_embeddings_and_the_tokenizer(
    vocabulary: int, tiny_configs: dict[str, ModelConfig], tiny_models: Path, tmp_path: Path
):
    """Embeddings padded beyond the tokenizer, and (as published) a tokenizer that lists the placeholder."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes)).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tiny_models / "llm_live1plus")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<v>"]})
    assert len(tokenizer) == 1025
    tokenizer.save_pretrained(tmp_path)
    loaded = checkpoint.untrained(tiny_configs["live1plus"].model_copy(update={"llm": str(tmp_path)}))
    assert loaded.model.frame_id == loaded.template.frame_id == vocabulary
    rendered = loaded.template.render([{"role": "user", "content": "<v>"}, {"role": "stream", "num_frames": 1}])
    assert rendered.input_ids.count(vocabulary) == 10
    assert loaded.model.embed(torch.tensor([rendered.input_ids]), torch.zeros(1, 10, 48)).isfinite().all()


def test_a_tokenizer_of_another_llm_is_refused(tiny_configs: dict[str, ModelConfig], tmp_path: Path):
    llm = shutil.copytree(tiny_configs["live1plus"].llm, tmp_path / "llm")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes)).save_pretrained(llm)
    with pytest.raises(DialogueError, match="the LLM has 1000 embeddings: this tokenizer belongs to another LLM"):
        checkpoint.untrained(tiny_configs["live1plus"].model_copy(update={"llm": str(llm)}))


def test_an_untrained_model_is_a_function_of_its_seed(tiny_configs: dict[str, ModelConfig]):
    config = tiny_configs["live1plus"].model_copy(update={"checkpoint": None})
    state = torch.random.get_rng_state()
    one, same, other = (checkpoint.untrained(config, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(logits(one), logits(same))
    assert one.fingerprint == same.fingerprint
    assert not torch.equal(logits(one), logits(other))
    assert one.fingerprint != other.fingerprint


def test_training_starts_from_the_untrained_model(tiny_configs: dict[str, ModelConfig], tmp_path: Path):
    config = tiny_configs["live1plus"].model_copy(update={"checkpoint": None})
    start = checkpoint.untrained(config, adapter=AdapterConfig(rank=4, alpha=8))
    assert torch.equal(logits(start), logits(checkpoint.untrained(config)))
    checkpoint.save(tmp_path / "start", start)
    assert checkpoint.load(tmp_path / "start").fingerprint == start.fingerprint


def test_a_connector_without_an_adapter_is_a_checkpoint_too(tiny_configs: dict[str, ModelConfig], tmp_path: Path):
    loaded = checkpoint.untrained(tiny_configs["live1plus"])
    checkpoint.save(tmp_path / "connector", loaded)
    again = checkpoint.load(tmp_path / "connector")
    assert torch.equal(logits(again), logits(loaded))
    with pytest.raises(CheckpointError, match="needs an adapter"):
        checkpoint.export_published(tmp_path / "export", again)

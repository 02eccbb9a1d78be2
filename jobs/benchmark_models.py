"""The models that benchmarks run: the one of a settings file, or a well-known size with random weights.

Speed does not depend on what the weights are, so the sizes that need a GPU are built here from their
dimensions: nothing is downloaded. The tokenizer of the settings' model stands in for theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from actors import checkpoint
from actors.causal_lm import EMBEDDED, causal_lm_folder, load_tokenizer
from actors.config import Config, ConfigError, FrameConfig, ModelConfig
from actors.dialogue import Template
from actors.model import VideoLLM
from actors.runtime import native_dtype

SIZES = {"llama3-8b": (4096, 14336, 32), "llama3-1b": (2048, 8192, 16)}  # width, MLP width, layers
PRESETS = (EMBEDDED, *SIZES)
VISION_WIDTH = 1024  # of SigLIP-L/16-384, which the published models use


@dataclass(frozen=True)
class Subject:
    """The same weights twice: `baseline` exactly as Hugging Face lays them out, `model` for the batched engine.

    On a GPU both are one object: its matrix products do not care for the layout, its memory is dear.
    """

    name: str
    baseline: VideoLLM
    model: VideoLLM
    template: Template

    def frame(self) -> torch.Tensor:
        """Random frame tokens (N, D)."""
        return torch.randn(self.model.frame_shape, generator=torch.Generator().manual_seed(0)).to(torch.float16)


def subject_of(config: Config, device: str, dtype: str | None) -> Subject:
    """The model of the settings file, untrained where they name no checkpoint."""
    wanted = native_dtype(getattr(torch, dtype or config.model.dtype), device)

    def load() -> checkpoint.Loaded:
        if config.model.checkpoint is None:
            return checkpoint.untrained(config.model, device=device, dtype=wanted)
        return checkpoint.load(config.model, device=device, dtype=wanted)

    loaded = load()
    baseline = load().model if device == "cpu" else loaded.model
    return Subject(config.model.llm, baseline, loaded.model, loaded.template)


def subject_of_size(name: str, device: str, dtype: str | None, tokens_of: str = EMBEDDED) -> Subject:
    """A preset's model with random weights, and the tokenizer of the LLM `tokens_of`: a folder needs no more than that.

    Raises ConfigError on a CPU, where it would take hours.
    """
    if device == "cpu":
        raise ConfigError(f"preset {name} needs a GPU: add --device cuda, or leave the preset out")
    frames = FrameConfig(resolution_px=384, cls=True, pooled=(3, 3), separator=",")
    sizes = llama_sizes(name)
    with torch.device(device):
        llm = AutoModelForCausalLM.from_config(
            sizes, dtype=getattr(torch, dtype or "bfloat16"), attn_implementation="sdpa"
        )
    model = VideoLLM(llm, ModelConfig(llm=name, vision=EMBEDDED, frames=frames), VISION_WIDTH)
    model.requires_grad_(False)
    tokenizer = load_tokenizer(causal_lm_folder(tokens_of))
    return Subject(name, model, model, Template(tokenizer, frames, vocab_size=sizes.vocab_size))


def llama_sizes(name: str) -> LlamaConfig:
    """The dimensions of a preset."""
    width, mlp_width, layers = SIZES[name]
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=name == "llama3-1b",
    )

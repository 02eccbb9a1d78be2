"""The language model under a VideoLLM, before any of our training: embedded, a folder, or a hub name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from actors.embedded import embedded_llm
from actors.weights import WeightsError, check_safetensors, weight_files, weights_folder

EMBEDDED = "embedded"  # in place of a folder or hub name: the weights that come in a package


def causal_lm_folder(name: str) -> Path:
    """The local folder of an LLM. Raises WeightsError or EmbeddedModelError if it cannot be had."""
    return embedded_llm() if name == EMBEDDED else weights_folder(name)


def load_causal_lm(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The LLM in `folder`, in eval mode, with every one of its weights read from safetensors.

    Attention is torch's own (SDPA), which needs nothing installed. Raises WeightsError.
    """
    for file in weight_files(folder):
        check_safetensors(file)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise WeightsError(f"{folder} cannot be read as a causal language model: {reason}") from None
    model, report = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)
    if missing := sorted(report["missing_keys"]):
        raise WeightsError(
            f"{folder} lacks {len(missing)} weights of a {type(model).__name__}, such as {missing[0]}: "
            "copy or download all of its files"
        )
    return model.to(device).eval()  # type: ignore[arg-type]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer in `folder`. Raises WeightsError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise WeightsError(
            f"{folder} holds no tokenizer that can be read ({reason}): expected tokenizer.json"
        ) from None
    return cast(PreTrainedTokenizerFast, tokenizer)

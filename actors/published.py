"""Checkpoints in the form of the public reference: one PEFT folder with connector and base head inside.

PEFT wrote the connector there as a module saved whole, and a copy of the base model's head because the
adapter's targets name it. The published videollm-online-8b-v1plus has this form. Nothing in it says which
frames it was trained on, so it is loaded with a ModelConfig that does.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from actors.adapter import AdapterConfig, read_adapter_config
from actors.cache import whole_folder
from actors.parts import CheckpointError, Parts, read_tensors

log = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_CONNECTOR = "base_model.model.connector."
_HEAD = "base_model.model.lm_head.base_layer.weight"
_EMBEDDING = "base_model.model.model.embed_tokens.weight"


def read_published(folder: Path, llm: PreTrainedModel) -> Parts:
    """The parts in such a folder, which are to be used with `llm`. Raises CheckpointError.

    A head that differs from the LLM's own is one of them: the reference puts it in place too.
    """
    try:
        adapter = read_adapter_config(folder / CONFIG_FILE)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    tensors = read_tensors(folder / WEIGHTS_FILE)
    connector = {name.removeprefix(_CONNECTOR): tensors.pop(name) for name in list(tensors) if _CONNECTOR in name}
    if not connector:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} has no {_CONNECTOR}*: a plain adapter is no video language model; "
            "expected a folder saved by the public reference, or by us with settings.json"
        )
    embedding = tensors.pop(_EMBEDDING, None)
    if embedding is not None and not _same(embedding, llm.get_input_embeddings().weight):
        raise CheckpointError(f"{folder / WEIGHTS_FILE} brings embeddings that differ from the LLM's: give its own LLM")
    head = tensors.pop(_HEAD, None)
    if head is not None and _same(head, llm.get_output_embeddings().weight):
        head = None
    if head is not None:
        log.warning("%s brings a head that differs from the LLM's own and takes its place", folder)
    return Parts(connector, tensors, adapter, head)


def write_published(folder: Path, parts: Parts, own_head: Tensor, llm_name: str) -> None:
    """`parts` as a folder that the public reference can load; `own_head` (V, H) is the LLM's.

    Raises CheckpointError without an adapter, which that form cannot do without.
    """
    if parts.adapter is None:
        raise CheckpointError("the public reference's form needs an adapter, and this checkpoint has none")
    tensors = {f"{_CONNECTOR}{name}": tensor for name, tensor in parts.connector.items()} | parts.lora
    if any("lm_head." in name for name in parts.lora):
        head = own_head if parts.head is None else parts.head
        tensors[_HEAD] = head.detach().cpu().contiguous()
    with whole_folder(folder) as part:
        save_file(tensors, part / WEIGHTS_FILE, {"format": "pt"})
        (part / CONFIG_FILE).write_text(json.dumps(_written(parts.adapter, llm_name), indent=2))


def _written(adapter: AdapterConfig, llm_name: str) -> dict[str, object]:
    """Only keys that the reference's PEFT (0.12) knows: it refuses those that later versions added."""
    return {
        "base_model_name_or_path": llm_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "modules_to_save": ["connector"],
        "peft_type": "LORA",
        "r": adapter.rank,
        "target_modules": adapter.targets,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _same(found: Tensor, own: Tensor | torch.nn.Module) -> bool:
    """Whether two weights are equal as the model will hold them."""
    assert isinstance(own, Tensor)
    return found.shape == own.shape and torch.equal(found.to(own), own)

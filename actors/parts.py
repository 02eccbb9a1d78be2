"""What training adds to a language model: connector, adapter, and in the reference's form a head.

However it is written down, a checkpoint comes into a model and out of it as `Parts`. Names and
shapes are checked before anything is put in place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.adapter import AdapterConfig, attach
from actors.config import ModelConfig
from actors.model import VideoLLM
from actors.weights import WeightsError, check_safetensors

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or belongs to another model; says what was found and expected."""


@dataclass(frozen=True)
class Parts:
    """Trained tensors: `connector` as `0.weight` (H, D) and so on, `lora` by PEFT's names on disk.

    `head` (V, H) is there only if it differs from the language model's own.
    """

    connector: dict[str, Tensor]
    lora: dict[str, Tensor]
    adapter: AdapterConfig | None
    head: Tensor | None = None

    def rounded(self, dtype: torch.dtype) -> Parts:
        """The same in another dtype; the adapter's settings and a head stay as they are."""
        connector = {name: tensor.to(dtype) for name, tensor in self.connector.items()}
        return replace(self, connector=connector, lora={name: tensor.to(dtype) for name, tensor in self.lora.items()})

    @cached_property
    def digest(self) -> str:
        """16 hex digits that change with any value, and not with the form of the checkpoint."""
        hasher = hashlib.blake2b(digest_size=8)
        head = {} if self.head is None else {"head": self.head}
        for name, tensor in sorted([*self.connector.items(), *self.lora.items(), *head.items()]):
            hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return hasher.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError for a missing, damaged or pickled one."""
    pickled = [path.with_suffix(suffix).name for suffix in _PICKLED if path.with_suffix(suffix).exists()]
    if not path.exists() and pickled:
        raise CheckpointError(
            f"{path.parent} holds {pickled[0]}, a pickled file, which is never read (it can run code): "
            f"save it as {path.name} with safetensors where you trust it"
        )
    try:
        check_safetensors(path)
    except WeightsError as error:
        raise CheckpointError(str(error)) from None
    return load_file(path)


def assemble(llm: PreTrainedModel, config: ModelConfig, parts: Parts, trainable: bool) -> VideoLLM:
    """A model of `llm` (which is changed) and `parts`, adapter unmerged. Raises CheckpointError.

    What is trained further is held in fp32.
    """
    if parts.head is not None:
        replace_head(llm, parts.head)
    wrapped: PreTrainedModel | PeftModel = llm
    if parts.adapter is not None:
        try:
            wrapped = attach(llm, parts.adapter)
        except ValueError as error:
            raise CheckpointError(f"the adapter does not fit {config.llm}: {error}") from None
        fit("adapter", parts.lora, get_peft_model_state_dict(wrapped, save_embedding_layers=False))
        set_peft_model_state_dict(wrapped, parts.lora)
    width = parts.connector["0.weight"].shape[-1] if "0.weight" in parts.connector else 1
    model = VideoLLM(wrapped, config, width)
    fit("connector", parts.connector, model.connector.state_dict())
    if trainable:
        model.connector.float()
    model.connector.load_state_dict(parts.connector)
    return model


def collect(model: VideoLLM, adapter: AdapterConfig | None, head: Tensor | None = None) -> Parts:
    """The parts of a model as they are now, on the CPU. Raises CheckpointError if its adapter was merged."""
    if adapter is not None and not isinstance(model.llm, PeftModel):
        raise CheckpointError("the adapter was merged into the LLM and cannot be saved: load it with merged=False")
    lora = get_peft_model_state_dict(model.llm, save_embedding_layers=False) if adapter is not None else {}
    return Parts(_on_cpu(model.connector.state_dict()), _on_cpu(lora), adapter, head)


def replace_head(llm: PreTrainedModel, head: Tensor) -> None:
    """Put `head` (V, H) in place of the LLM's own. Raises CheckpointError for another shape."""
    own = llm.get_output_embeddings()
    assert isinstance(own, nn.Linear)
    fit("head", {"lm_head.weight": head}, {"lm_head.weight": own.weight})
    own.weight = nn.Parameter(head.to(own.weight, copy=True), requires_grad=False)
    llm.config.tie_word_embeddings = False


def fit(what: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless both have the same names and shapes."""
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise CheckpointError(
            f"the {what} has {len(found)} tensors, this model expects {len(expected)}: "
            + "; ".join(
                f"{len(names)} {kind}, such as {names[0]}"
                for kind, names in (("missing", missing), ("not expected", unknown))
                if names
            )
        )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name} of the {what} has shape {list(found[name].shape)}, this model expects {list(tensor.shape)}: "
                "the checkpoint belongs to another LLM or vision encoder"
            )


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

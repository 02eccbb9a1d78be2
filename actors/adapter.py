"""The adapter: LoRA matrices beside an LLM's frozen weights, through PEFT."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Literal

from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import BaseModel, Field, ValidationError
from torch import nn
from transformers import PreTrainedModel

from actors.config import Section

ALL_LINEAR = r"model.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)|lm_head$"


class AdapterConfig(Section):
    """Size and place of the LoRA matrices; the defaults are the public reference's.

    `targets` is a regular expression for whole module names, or a list of their last parts.
    """

    rank: int = Field(default=128, ge=1)
    alpha: int = Field(default=256, ge=1)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    targets: str | list[str] = ALL_LINEAR

    def lora(self, llm_name: str | None = None) -> LoraConfig:
        """The same as PEFT writes it down."""
        return LoraConfig(
            base_model_name_or_path=llm_name,
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets,
            task_type="CAUSAL_LM",
        )


class _Written(BaseModel, frozen=True):
    """What of PEFT's `adapter_config.json` matters; anything that would change the arithmetic must be off."""

    peft_type: Literal["LORA"]
    r: int = Field(ge=1)
    lora_alpha: int = Field(ge=1)
    lora_dropout: float = Field(default=0, ge=0, lt=1)
    target_modules: str | list[str]
    modules_to_save: list[Literal["connector"]] | None = None
    bias: Literal["none"] = "none"
    use_dora: Literal[False] = False
    use_rslora: Literal[False] = False
    fan_in_fan_out: Literal[False] = False
    rank_pattern: dict[str, int] = Field(default={}, max_length=0)
    alpha_pattern: dict[str, int] = Field(default={}, max_length=0)
    layers_to_transform: None = None
    layer_replication: None = None


def read_adapter_config(path: Path) -> AdapterConfig:
    """The adapter that PEFT's `adapter_config.json` describes.

    Raises ValueError for a damaged file and for kinds of LoRA that we would compute differently.
    """
    try:
        written = _Written.model_validate(json.loads(path.read_text()))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))} is {p['input']!r}: {p['msg']}" for p in error.errors())
        raise ValueError(f"{path} describes no adapter that we can load: {problems}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): expected PEFT's adapter configuration") from None
    return AdapterConfig(
        rank=written.r, alpha=written.lora_alpha, dropout=written.lora_dropout, targets=written.target_modules
    )


def attach(llm: PreTrainedModel, config: AdapterConfig) -> PeftModel:
    """`llm` frozen, with trainable LoRA matrices in it that change nothing yet.

    Raises ValueError if the targets match no module.
    """
    linear = [name for name, module in llm.named_modules() if isinstance(module, nn.Linear)]
    if not any(matches(config.targets, name) for name in linear):
        raise ValueError(
            f"adapter.targets {config.targets!r} match no linear module of {type(llm).__name__}, which has "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in linear}))}: change adapter.targets"
        )
    if any(matches(config.targets, name) for name in linear if name == "lm_head"):
        _untie(llm)
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 by a name that transformers has just renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return get_peft_model(llm, config.lora())


def matches(targets: str | list[str], name: str) -> bool:
    """Whether a module of that name gets LoRA matrices."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _untie(llm: PreTrainedModel) -> None:
    """Give the head weights of its own where it shares the embedding's.

    Merging an adapter into a shared head would change what the model reads as well as what it says.
    """
    weight = llm.get_output_embeddings().weight
    if isinstance(weight, nn.Parameter) and weight is llm.get_input_embeddings().weight:
        llm.get_output_embeddings().weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        llm.config.tie_word_embeddings = False

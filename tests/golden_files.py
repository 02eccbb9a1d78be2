"""Reads tests/golden: values, tokenizers and templates that several test modules compare with."""

from __future__ import annotations

import json
import lzma
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from actors.config import FrameConfig
from actors.dialogue import Template

GOLDEN = Path(__file__).parent / "golden"

FRAMES = {
    "live1": FrameConfig(resolution_px=32, cls=True),
    "live1plus": FrameConfig(resolution_px=32, cls=True, pooled=(3, 3), separator=","),
}


@cache
def read_json(name: str) -> dict:
    """A JSON file below tests/golden; `name.json` may be stored as `name.json.xz`."""
    plain = GOLDEN / name
    return json.loads(plain.read_text() if plain.exists() else lzma.open(f"{plain}.xz").read())


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """`tiny` (Llama-3 style) or `smollm2` (GPT-2 style)."""
    folder = {"tiny": "tiny/tokenizer", "smollm2": "tokenizers/smollm2"}[name]
    config = read_json(f"{folder}/tokenizer_config.json")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(read_json(f"{folder}/tokenizer.json"))),
        bos_token=config["bos_token"],
        eos_token=config["eos_token"],
        unk_token=config.get("unk_token"),
    )


@cache
def template(tokenizer_name: str, version: str) -> Template:
    """The template of a golden tokenizer with `live1` or `live1plus` frames."""
    return Template(tokenizer(tokenizer_name), FRAMES[version])

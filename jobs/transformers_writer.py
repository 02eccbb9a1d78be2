"""Texts by any causal language model of transformers: a folder, a hub name, or the one in a package."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from actors.causal_lm import causal_lm_folder, load_causal_lm, load_tokenizer
from actors.runtime import limit_threads, native_dtype
from actors.weights import digest
from jobs.writer import Request, Text, WriterConfig

SHORTEST_ANSWER = 16  # tokens that a prompt must leave room for
CHATML = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


class TransformersWriter:
    """Generates batches on a GPU where there is one, else on one CPU thread.

    Greedy by default. With a temperature the draws are seeded by the batch, so that a batch of the same
    requests gives the same texts.
    """

    def __init__(self, config: WriterConfig) -> None:
        folder = causal_lm_folder(config.model)
        self.config = config
        self.batch_size = config.batch_size
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        limit_threads(1)
        self.tokenizer = load_tokenizer(folder)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        dtype = native_dtype(getattr(torch, config.dtype), self.device)
        self.model = load_causal_lm(folder, dtype, self.device)
        self.positions = int(getattr(self.model.config, "max_position_embeddings", 0)) or 1 << 30
        chosen = f"max_new_tokens={config.max_new_tokens} temperature={config.temperature:g} seed={config.seed}"
        self.name = f"transformers {digest(folder)} {chosen}"

    def write(self, requests: Sequence[Request]) -> list[Text]:
        """One batch. A prompt that leaves no room for an answer gets none."""
        prompts = [as_chat(self.tokenizer, request.prompt) for request in requests]
        lengths = [len(ids) for ids in self.tokenizer(prompts, add_special_tokens=False)["input_ids"]]
        fits = [length + SHORTEST_ANSWER <= self.positions for length in lengths]
        answers = iter(self._generate([prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]))
        return [next(answers) if fit else Text("", "the prompt is too long for the model") for fit in fits]

    def _generate(self, prompts: list[str]) -> list[Text]:
        if not prompts:
            return []
        batch = self.tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt").to(self.device)
        length = batch["input_ids"].shape[1]
        settings = GenerationConfig(
            do_sample=self.config.temperature > 0,
            temperature=self.config.temperature or None,
            max_new_tokens=min(self.config.max_new_tokens, self.positions - length),
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=sorted(self._ends()),
        )
        seed = hashlib.sha256("\0".join([str(self.config.seed), *prompts]).encode()).digest()
        torch.manual_seed(int.from_bytes(seed[:8], "big", signed=True))
        with torch.inference_mode():
            made = cast(_Generating, self.model).generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=settings
            )
        return [self._text(ids) for ids in made[:, length:].tolist()]

    def _text(self, ids: list[int]) -> Text:
        ends = self._ends()
        finished = next((index for index, token in enumerate(ids) if token in ends), None)
        words = self.tokenizer.decode(ids[:finished], skip_special_tokens=True)
        return Text(str(words), "" if finished is not None else "unfinished at the longest length")

    def _ends(self) -> set[int]:
        """The tokens that end an answer: the model's and the tokenizer's."""
        config = getattr(self.model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        ids = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id}
        return {int(end) for end in ids if end is not None}


class _Generating(Protocol):
    """What transformers adds to causal language models."""

    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config: GenerationConfig) -> Tensor: ...


def as_chat(tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """The prompt as the user's words, in the form the model was trained on; plain for a model of no form."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    if "<|im_start|>" in tokenizer.get_vocab():
        return CHATML.format(prompt=prompt)
    return f"{prompt}\n\n"

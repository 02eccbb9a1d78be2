"""Answers to a question about recorded frames, all of them at once: how the offline benchmarks ask.

The dialogue up to its answer is embedded, frames and all, and only then generated from: ids alone have no
frames in them (finding 2.1 of docs/differences.md). VideoLLM-online, section 5.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from pydantic import Field
from torch import Tensor
from transformers import GenerationConfig

from actors.config import Section
from actors.dialogue import Template
from actors.model import VideoLLM
from actors.turns import Assistant, Turn
from jobs.dialogues import Dialogue


class Generation(Section):
    """How answers are generated: `beams` greedy ones side by side, of which all are given."""

    max_tokens: int = Field(default=512, ge=1)
    beams: int = Field(default=1, ge=1)


def question_of(dialogue: Dialogue) -> tuple[Turn, ...]:
    """A conversation without its last answer."""
    turns = dialogue.conversation
    return turns[:-1] if isinstance(turns[-1], Assistant) else turns


@torch.inference_mode()
def generate(
    model: VideoLLM, template: Template, dialogue: Dialogue, frames: Tensor, generation: Generation
) -> list[str]:
    """What the model answers where the dialogue's last turn is the assistant's, the likeliest beam first.

    `frames` (F, N, D) are all frames of the dialogue.
    """
    prompt = template.render(question_of(dialogue), prompt=True)
    input_ids = torch.tensor([prompt.input_ids], device=model.device)
    embeddings = model.embed(input_ids, frames.to(model.device))
    config = GenerationConfig(
        max_length=len(prompt.input_ids) + generation.max_tokens,
        num_beams=generation.beams,
        num_return_sequences=generation.beams,
        do_sample=False,
        temperature=1.0,
        top_p=1.0,
        eos_token_id=template.eos_id,
        pad_token_id=template.eos_id,
    )
    answer = cast(Callable[..., Tensor], model.base_llm.generate)
    answers = answer(inputs_embeds=embeddings, attention_mask=torch.ones_like(input_ids), generation_config=config)
    return [template.decode(_until_eos(ids, template.eos_id)).strip() for ids in answers.tolist()]


def _until_eos(ids: list[int], eos_id: int) -> list[int]:
    return ids[: ids.index(eos_id)] if eos_id in ids else ids

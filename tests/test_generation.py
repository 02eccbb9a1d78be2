"""Answers about recorded frames are what the model says with those frames before it."""

from __future__ import annotations

import pytest
import torch

from actors import checkpoint
from actors.checkpoint import Loaded
from actors.config import ModelConfig
from actors.turns import Assistant, Stream, System, Turn, User
from jobs.dialogues import Dialogue
from jobs.generation import Generation, generate, question_of

QUESTION: tuple[Turn, ...] = (System(content="s."), User(content="What is the action?"), Stream(num_frames=3))


def asked(*more: Turn) -> Dialogue:
    return Dialogue(
        dialogue_id="d", task="coin_step", video_id="v", video="", fps=2, frames=(0, 3), conversation=(*QUESTION, *more)
    )


@pytest.fixture(scope="module")
def loaded(tiny_configs: dict[str, ModelConfig]) -> Loaded:
    return checkpoint.load(tiny_configs["live1plus"])


@pytest.fixture(scope="module")
def frames(loaded: Loaded) -> torch.Tensor:
    return torch.randn(3, *loaded.model.frame_shape, generator=torch.Generator().manual_seed(0)).half()


def greedily(loaded: Loaded, frames: torch.Tensor, count: int) -> str:
    """The same with a forward over everything for every token."""
    ids = list(loaded.template.render(QUESTION, prompt=True).input_ids)
    said: list[int] = []
    with torch.inference_mode():
        while len(said) < count:
            token = int(loaded.model(torch.tensor([ids + said]), frames).logits[0, -1].argmax())
            if token == loaded.template.eos_id:
                break
            said.append(token)
    return loaded.template.decode(said).strip()


def test_one_beam_is_what_is_likeliest_after_all_frames(loaded: Loaded, frames: torch.Tensor) -> None:
    expected = greedily(loaded, frames, 12)
    for turns in ((), (Assistant(content="The label.", learn=True),)):
        assert generate(loaded.model, loaded.template, asked(*turns), frames, Generation(max_tokens=12)) == [expected]
    assert expected


def test_other_frames_are_not_the_same_to_it(loaded: Loaded, frames: torch.Tensor) -> None:
    noise = [torch.randn(frames.shape, generator=torch.Generator().manual_seed(seed)).half() for seed in (0, 4, 5)]
    said = [generate(loaded.model, loaded.template, asked(), other, Generation(max_tokens=12))[0] for other in noise]
    assert len(set(said)) == 3


def test_beams_are_all_given(loaded: Loaded, frames: torch.Tensor) -> None:
    answers = generate(loaded.model, loaded.template, asked(), frames, Generation(max_tokens=6, beams=5))
    assert len(answers) == len(set(answers)) == 5


def test_the_answer_is_no_part_of_the_question() -> None:
    assert question_of(asked(Assistant(content="Cut.", learn=True))) == question_of(asked()) == QUESTION

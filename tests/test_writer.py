"""Writers: what is asked of them, what is kept, and a language model as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from actors.causal_lm import load_tokenizer
from jobs.transformers_writer import TransformersWriter, as_chat
from jobs.writer import KeptTexts, Request, TemplateWriter, Text, WriterConfig, open_writer


class Counting:
    """Writes the prompt in capitals, and remembers what it was asked."""

    name = "counting"
    batch_size = 2

    def __init__(self, fails_at: str = "") -> None:
        self.batches: list[list[str]] = []
        self.fails_at = fails_at

    def write(self, requests: Sequence[Request]) -> list[Text]:
        self.batches.append([request.prompt for request in requests])
        if self.fails_at in self.batches[-1]:
            raise RuntimeError("killed")
        return [Text(request.prompt.upper(), "odd" if len(request.prompt) % 2 else "") for request in requests]


def requests(*prompts: str) -> list[Request]:
    return [Request(prompt, by_rule="rule") for prompt in prompts]


def test_the_template_says_what_the_rule_says() -> None:
    assert open_writer(WriterConfig()).write(requests("a", "b")) == [Text("rule"), Text("rule")]
    assert TemplateWriter().write([]) == []


def test_nothing_is_written_twice(tmp_path: Path) -> None:
    first, second, other = Counting(), Counting(), Counting()
    other.name = "another model"
    texts = KeptTexts(first, tmp_path).write(requests("b", "aa", "b", "ccc"))
    assert texts == [Text("B", "odd"), Text("AA"), Text("B", "odd"), Text("CCC", "odd")]
    assert first.batches == [["b", "aa"], ["ccc"]]
    assert KeptTexts(second, tmp_path).write(requests("ccc", "dddd")) == [Text("CCC", "odd"), Text("DDDD")]
    assert second.batches == [["dddd"]]
    KeptTexts(other, tmp_path).write(requests("b"))
    assert other.batches == [["b"]]


def test_what_was_written_before_a_writer_died_is_kept(tmp_path: Path) -> None:
    dying, after = Counting(fails_at="ccc"), Counting()
    with pytest.raises(RuntimeError, match="killed"):
        KeptTexts(dying, tmp_path).write(requests("a", "bb", "ccc", "dddd"))
    KeptTexts(after, tmp_path).write(requests("a", "bb", "ccc", "dddd"))
    assert after.batches == [["ccc", "dddd"]]


@pytest.fixture(scope="module")
def tiny_writer(tiny_models: Path) -> TransformersWriter:
    config = WriterConfig(backend="transformers", model=str(tiny_models / "llm_live1"), max_new_tokens=6)
    return TransformersWriter(config.model_copy(update={"dtype": "float32"}))


def test_a_batch_says_what_each_request_says_alone(tiny_writer: TransformersWriter) -> None:
    asked = requests("Short.", "A request that is a good deal longer than the other.")
    together = tiny_writer.write(asked)
    assert together == [tiny_writer.write([request])[0] for request in asked]
    assert all(text.words or text.problem for text in together)


def test_a_text_without_an_end_is_unfinished(tiny_writer: TransformersWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_writer, "config", tiny_writer.config.model_copy(update={"max_new_tokens": 1}))
    [text] = tiny_writer.write(requests("Go on."))
    model = tiny_writer.model
    ids = tiny_writer.tokenizer(as_chat(tiny_writer.tokenizer, "Go on."), add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    assert token not in tiny_writer._ends()
    assert text == Text(tiny_writer.tokenizer.decode([token]), "unfinished at the longest length")


def test_a_prompt_without_room_for_an_answer_gets_none(tiny_writer: TransformersWriter) -> None:
    long, short = tiny_writer.write(requests("word " * tiny_writer.positions, "Short."))
    assert long == Text("", "the prompt is too long for the model")
    assert short.problem != long.problem


def test_draws_with_a_temperature_are_the_same_again(tiny_models: Path) -> None:
    def drawn(seed: int) -> list[Text]:
        settings = {"model": str(tiny_models / "llm_live1"), "max_new_tokens": 8, "temperature": 5.0, "seed": seed}
        return TransformersWriter(WriterConfig(backend="transformers", **settings)).write(requests("Go on.", "Stop."))

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_model_without_a_form_for_chats_gets_its_own_or_none(tiny_models: Path) -> None:
    tokenizer = load_tokenizer(tiny_models / "llm_live1")
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    assert as_chat(tokenizer, "Hello") == "Hello!"
    tokenizer.chat_template = None
    assert as_chat(tokenizer, "Hello") == "Hello\n\n"
    tokenizer.add_tokens(["<|im_start|>"])
    assert as_chat(tokenizer, "Hello") == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.slow
@pytest.mark.beside
def test_the_embedded_model_answers() -> None:
    writer = TransformersWriter(WriterConfig(backend="transformers", max_new_tokens=24))
    [text] = writer.write(requests("What is the capital of France? Answer with its name alone."))
    assert "Paris" in text.words
    assert text.problem == ""

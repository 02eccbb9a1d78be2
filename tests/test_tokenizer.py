from __future__ import annotations

import pytest
from golden_files import tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from actors.tokenizer import TextTokenizer

NAMES = ("tiny", "smollm2")
PLAIN = {name: TextTokenizer(tokenizer(name)) for name in NAMES}
texts = st.text(max_size=12) | st.lists(st.sampled_from(["<|eot_id|>", "<|im_end|>", " ", "\n", "a", "😀"])).map(
    "".join
)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(texts)
def test_every_text_that_can_be_spelled_comes_back_from_its_tokens(name: str, text: str) -> None:
    ids = [token.id for token in PLAIN[name].encode(text)]
    assert PLAIN[name].control_ids.isdisjoint(ids)
    if tokenizer(name).unk_token_id not in ids:  # SmolLM2's vocabulary lacks a few bytes
        assert PLAIN[name].decode(ids) == text


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(texts)
def test_tokens_cover_the_text_without_gaps(name: str, text: str) -> None:
    tokens = PLAIN[name].encode(text)
    assert {i for token in tokens for i in range(token.start, token.stop)} == set(range(len(text)))
    starts = [token.start for token in tokens]
    assert starts == sorted(starts)


def test_a_character_that_the_vocabulary_lacks_is_unk_and_silent() -> None:
    plain = PLAIN["smollm2"]
    ids = [token.id for token in plain.encode("a\U00040000b")]
    assert tokenizer("smollm2").unk_token_id in ids
    assert "endoftext" not in plain.decode(ids)


def test_control_tokens_inside_the_vocabulary_are_spelled_out() -> None:
    letters = {letter: i for i, letter in enumerate("</s>ab", start=3)}
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, **letters}, unk_token="<unk>"))
    plain = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"))
    assert plain.control_ids == {2}
    assert plain._plain.encode("</s>").ids == [2]  # so it is the vocabulary that offers it
    assert [(token.id, token.start, token.stop) for token in plain.encode("</s>")] == [(letters["<"], 0, 1), (0, 1, 4)]


def test_a_character_that_is_a_control_token_is_left_out() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "\n": 1}, unk_token="<unk>"))
    plain = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="\n", unk_token="<unk>"))
    assert plain.encode("\n") == []


def test_a_tokenizer_without_the_fast_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="is no fast tokenizer"):
        TextTokenizer(object())  # type: ignore[arg-type]

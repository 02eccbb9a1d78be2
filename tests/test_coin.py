"""COIN's five tasks: names and samples as the public reference makes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_data import dialogues, key, samples, text, turns
from golden_files import read_json

from actors.turns import Assistant, User
from jobs.annotations import AnnotationError
from jobs.coin import read_coin, step_name, task_name
from jobs.dialogues import Dialogue


def made(datasets: Path, kind: str, split: str = "train") -> list[Dialogue]:
    rows = [row for row in read_coin(kind, datasets / "coin") if row.split == split]
    return dialogues(rows, datasets, split=split)


@pytest.mark.parametrize(("name", "words"), read_json("data/coin_strings.json")["task"])
def test_tasks_are_named_in_words(name: str, words: str) -> None:
    assert task_name(name) == words


@pytest.mark.parametrize(("label", "name"), read_json("data/coin_strings.json")["step"])
def test_steps_are_named_as_actions(label: str, name: str) -> None:
    assert step_name(label) == name


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("coin_step_train__live1plus", "live1plus"),
        ("coin_step_train__live1", "live1"),
        ("coin_task_train__live1plus", "live1plus"),
        ("coin_procedure_train__live1plus", "live1plus"),
        ("coin_step_test__live1plus__is_training-False", "live1plus"),
        ("coin_task_test__live1plus__is_training-False", "live1plus"),
        ("coin_procedure_test__live1plus__is_training-False", "live1plus"),
    ],
)
def test_samples_match(datasets: Path, name: str, version: str) -> None:
    kind, split = name.split("__")[0].rsplit("_", 1)
    ours = made(datasets, kind, "train" if split == "train" else "validation")
    golden = samples(name)
    assert [key(dialogue) for dialogue in ours] == [sample.key for sample in golden]
    assert [turns(dialogue) for dialogue in ours] == [sample.turns for sample in golden]
    assert [text(dialogue, version, prompt=split == "test") for dialogue in ours] == [s.text for s in golden]
    labels = read_json("data/samples.json")[name]["labels"]
    assert [list(dialogue.labels) for dialogue in ours] == [[x] if isinstance(x, str) else x for x in labels]


def test_next_is_the_first_line_of_the_procedure(datasets: Path) -> None:
    nexts, procedures = (made(datasets, kind, "validation") for kind in ("coin_next", "coin_procedure"))
    assert [key(d) for d in nexts] == [key(d) for d in procedures]
    for ours, procedure in zip(nexts, procedures, strict=True):
        assert ours.labels == procedure.labels[:1]
        question, answer = ours.conversation[1], ours.conversation[-1]
        assert question == procedures[-1].conversation[1]
        assert answer == Assistant(content=ours.labels[0].capitalize() + ".", learn=True)


def test_the_procedure_of_a_task_differs_in_its_question_only(datasets: Path) -> None:
    told, untold = (made(datasets, kind) for kind in ("coin_taskprocedure", "coin_procedure"))
    assert [d.conversation[2:] for d in told] == [d.conversation[2:] for d in untold]
    for ours, other in zip(told, untold, strict=True):
        question, plain = ours.conversation[1], other.conversation[1]
        assert isinstance(question, User)
        assert isinstance(plain, User)
        assert question.content.startswith("To ")
        assert question.content.endswith(", w" + plain.content[1:])


def test_a_missing_file_is_named_with_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"coin.json is missing: coin-dataset.github.io has COIN.json"):
        list(read_coin("coin_step", tmp_path))


def test_a_damaged_file_is_explained_by_the_place_in_it(tmp_path: Path) -> None:
    (tmp_path / "coin.json").write_text('{"database": {"a": {"subset": "training", "class": "X", "start": 0}}}')
    with pytest.raises(AnnotationError, match=r"coin.json: database.a.end: found .* expected: Field required"):
        list(read_coin("coin_step", tmp_path))

"""jobs.offline_benchmarks: what answers about recorded frames are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_data import dialogues as golden_dialogues
from golden_files import read_json

from jobs.coin import KINDS
from jobs.dialogues import Dialogue
from jobs.offline_benchmarks import LTA, Answered, BenchmarkError, categories_of, check, grade
from jobs.public import READERS


@pytest.fixture(scope="module")
def coin(datasets: Path) -> dict[str, list[Dialogue]]:
    """The questions of COIN's test split, by task."""
    rows = {kind: [row for row in READERS[kind](datasets / "coin") if row.split == "validation"] for kind in KINDS}
    return {kind: golden_dialogues(rows[kind], datasets, split="validation") for kind in KINDS}


@pytest.mark.parametrize("task", ["step", "next", "task", "procedure", "taskprocedure"])
def test_an_answer_may_be_any_name_of_the_split_as_in_the_reference(
    task: str, coin: dict[str, list[Dialogue]], datasets: Path
) -> None:
    found = categories_of(coin[f"coin_{task}"], datasets / "coin")
    assert found[f"coin_{task}"] == set(read_json("metrics/coin.json")[task]["categories"])


def test_one_question_alone_has_all_the_names(coin: dict[str, list[Dialogue]], datasets: Path) -> None:
    (one, *_), every = coin["coin_next"], coin["coin_next"]
    assert categories_of([one], datasets / "coin")["coin_next"] == categories_of(every, datasets / "coin")["coin_next"]


def test_without_annotations_names_are_the_answers_of_the_dialogues(coin: dict[str, list[Dialogue]]) -> None:
    alone = categories_of(coin["coin_next"], None)
    assert alone["coin_next"] == {label for one in coin["coin_next"] for label in one.labels}
    assert alone["coin_task"] == set()
    beside = categories_of([*coin["coin_next"], *coin["coin_step"]], None)
    assert beside["coin_next"] > alone["coin_next"]
    assert beside["coin_next"] == beside["coin_step"]


def test_a_name_that_is_never_the_answer_can_be_the_nearest(coin: dict[str, list[Dialogue]], datasets: Path) -> None:
    every, known = categories_of(coin["coin_next"], datasets / "coin"), categories_of(coin["coin_next"], None)
    (other, *_) = sorted(every["coin_next"] - known["coin_next"])
    answered = [Answered(dialogue, [other]) for dialogue in coin["coin_next"]]
    assert grade("coin_next", answered, categories=every["coin_next"]) == {"accuracy": 0}
    assert grade("coin_next", answered, categories=known["coin_next"])["accuracy"] > 0


def test_lta_is_refused_without_its_annotations(coin: dict[str, list[Dialogue]], tmp_path: Path) -> None:
    (dialogue, *_) = coin["coin_task"]
    check([dialogue], None)
    asked = [dialogue.model_copy(update={"task": LTA})]
    with pytest.raises(BenchmarkError, match="name the dataset"):
        check(asked, None)
    check(asked, tmp_path)

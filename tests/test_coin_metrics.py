"""jobs.coin_metrics against the reference's numbers and by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from golden_files import read_json, template

from jobs.coin_metrics import accuracy, corrected_procedure_accuracy, published_procedure_accuracy

METRICS: dict[str, Callable[..., float]] = {
    "step": accuracy,
    "next": accuracy,
    "task": accuracy,
    "procedure": published_procedure_accuracy,
    "taskprocedure": published_procedure_accuracy,
}
CASES = [(task, case) for task in METRICS for case in read_json("metrics/coin.json")[task]["cases"]]
STEPS = ["cut", "mix", "bake", "cool", "eat"]


@pytest.mark.parametrize(("task", "case"), CASES)
def test_published_numbers_equal_the_references(task: str, case: str) -> None:
    golden = read_json("metrics/coin.json")[task]
    answers = golden["cases"][case]
    labels = [golden["labels"][index] for index in answers["sample_idxs"]]
    expected = pytest.approx(answers["result"]["accuracy"])
    assert METRICS[task](answers["texts"], labels, golden["categories"]) == expected
    decode = template("tiny", "live1plus").decode
    decoded = [decode([token for token in ids if token >= 0]) for ids in answers["predictions"]]
    assert METRICS[task](decoded, labels, golden["categories"]) == expected


def test_the_nearest_category_counts_as_the_answer() -> None:
    assert accuracy([" Cut the onion.", "cut onoin"], ["cut onion", "cut onion"], ["cut onion", "cut"]) == 100
    assert accuracy(["Cut.", "mix"], ["mix", "mix"], ["cut", "mix"]) == 50


def listed(steps: list[str]) -> str:
    return "\n".join(f"{number}. {step.capitalize()}." for number, step in enumerate(steps, start=1))


@pytest.mark.parametrize(
    ("answer", "published", "corrected"),
    [
        (listed(STEPS), 100, 100),
        ("1. Cut.", 100, 20),
        (listed([*STEPS, "eat", "eat", "eat", "eat", "eat"]), 100, 50),
        (listed(["cut", "cut", "cut", "cut", "cut"]), 20, 20),
        ("1. Cut.\n\n2. Mix.\n\n3. Bake.\n\n4. Cool.\n\n5. Eat.", 20, 100),
        ("", 100, 0),  # nothing is nearest to the shortest label
    ],
)
def test_one_right_line_of_five_is_a_fifth_when_corrected(answer: str, published: float, corrected: float) -> None:
    assert published_procedure_accuracy([answer], [STEPS], STEPS) == pytest.approx(published)
    assert corrected_procedure_accuracy([answer], [STEPS], STEPS) == pytest.approx(corrected)


def test_lines_are_counted_over_all_answers() -> None:
    answers, labels = [listed(STEPS), "1. Mix."], [STEPS, ["cut"]]
    assert corrected_procedure_accuracy(answers, labels, STEPS) == pytest.approx(100 * 5 / 6)


def test_no_answers_have_no_accuracy() -> None:
    for metric in METRICS.values():
        with pytest.raises(ValueError, match="no answer to count"):
            metric([], [], STEPS)

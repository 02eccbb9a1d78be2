"""jobs.lta_metrics against the reference's numbers and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from golden_files import read_json, template

from jobs.lta import Taxonomy, word
from jobs.lta_metrics import ActionReader, aued, best_distances, evaluate, write_submission

GOLDEN = read_json("metrics/lta.json")


@pytest.fixture(scope="module")
def reader() -> ActionReader:
    return ActionReader(Taxonomy(verbs=GOLDEN["verbs"], nouns=GOLDEN["nouns"]))


def test_words_of_the_taxonomy_are_the_references() -> None:
    assert {entry: word(entry) for entry, _, _ in GOLDEN["no_overlap_word"]} == {
        entry: used for entry, used, _ in GOLDEN["no_overlap_word"]
    }


def test_every_action_has_the_references_labels(reader: ActionReader) -> None:
    for action, verb, noun in GOLDEN["action_to_labels"]:
        assert reader.labels(f"1. {action.capitalize()}.", 1).tolist() == [[verb, noun]]


@pytest.mark.parametrize("case", GOLDEN["text_to_ids"])
def test_an_answer_has_the_references_labels(reader: ActionReader, case: str) -> None:
    golden = GOLDEN["text_to_ids"][case]
    assert reader.labels(golden["text"], golden["num_actions"]).tolist() == golden["ids"]


@pytest.mark.parametrize("case", GOLDEN["text_to_ids_5"])
def test_a_shorter_answer_has_the_references_labels(reader: ActionReader, case: str) -> None:
    assert reader.labels(GOLDEN["text_to_ids"][case]["text"], 5).tolist() == GOLDEN["text_to_ids_5"][case]


def test_of_two_words_that_read_alike_the_later_has_the_label() -> None:
    reader = ActionReader(Taxonomy(verbs=["take_(pick)", "cut", "take_(buy)"], nouns=["cup"]))
    assert reader.labels("1. Take cup.", 1).tolist() == [[2, 0]]
    assert reader.labels("", 1).tolist() == [[2, 0]]


@pytest.mark.parametrize("case", GOLDEN["AUED"])
def test_areas_and_distances_are_the_references(case: str) -> None:
    golden = GOLDEN["AUED"][case]
    predicted, labelled = np.array(golden["preds"]), np.array(golden["labels"])
    distances = best_distances(predicted, labelled)
    assert aued(predicted, labelled) == pytest.approx(golden["AUED"])
    assert distances[-1] == pytest.approx(golden["edit_distance_full"])
    assert distances[4] == pytest.approx(golden["edit_distance_at_z5"])


def test_distances_by_hand() -> None:
    labelled = np.array([[1, 2, 3, 4]])
    predicted = np.array([[[1, 2, 9, 9], [9, 1, 2, 3]]])
    # Of the first three: one of [1 2 9] is wrong; [9 1 2] has 9 too many and no 3.
    assert best_distances(predicted, labelled).tolist() == [[0 / 1, 0 / 2, 1 / 3, 2 / 4]][0]
    assert aued(predicted, labelled) == pytest.approx((0 + 1 / 6 + 5 / 12) / 3)


def test_an_action_is_right_when_verb_and_noun_are() -> None:
    labelled = np.array([[[1, 1], [2, 2], [3, 3], [4, 4]]])
    one_wrong_verb_another_noun = np.array([[[[9, 1], [2, 9], [3, 3], [4, 4]]]])
    metrics = evaluate(one_wrong_verb_another_noun, labelled)
    assert (metrics.verb_ed, metrics.noun_ed, metrics.action_ed) == (0.25, 0.25, 0.5)


def test_generated_beams_have_the_references_areas(reader: ActionReader) -> None:
    golden = GOLDEN["compute_metrics"]
    labelled = np.stack([np.array(golden["verb_labels"]), np.array(golden["noun_labels"])], axis=-1)
    forecasts = np.stack([reader.forecast(answers) for answers in golden["beam_texts"]])
    metrics = evaluate(forecasts, labelled)
    assert metrics.verb_aued == pytest.approx(golden["result"]["verb_AUED"])
    assert metrics.noun_aued == pytest.approx(golden["result"]["noun_AUED"])
    for row, forecast in zip(golden["predictions"], forecasts, strict=True):
        ids = [token for token in row if token >= 0]
        beams = np.array(ids).reshape(golden["num_beams"], -1).tolist()
        answers = [template("tiny", "live1plus").decode(beam) for beam in beams]
        assert reader.forecast(answers).tolist() == forecast.tolist()


def test_the_submission_is_the_references(reader: ActionReader, tmp_path: Path) -> None:
    expected = GOLDEN["test_unannotated_with_fake_device_0"]["content"]
    texts = GOLDEN["compute_metrics"]["beam_texts"]
    forecasts = {name: reader.forecast(answers) for name, answers in zip(expected, texts, strict=True)}
    write_submission(tmp_path / "predictions.json", forecasts)
    assert json.loads((tmp_path / "predictions.json").read_text()) == expected

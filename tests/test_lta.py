"""Long-term anticipation: taxonomy and samples as the public reference has them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from golden_data import dialogues, key, samples, text, turns
from golden_files import read_json

from actors.turns import Stream
from jobs.annotations import AnnotationError
from jobs.lta import read_lta, read_lta_test, read_taxonomy, word


def test_the_taxonomy_is_named_as_in_the_reference(ego4d: Path) -> None:
    taxonomy, golden = read_taxonomy(ego4d), read_json("data/samples.json")["ego4d_lta_train__live1plus"]
    assert [word(verb) for verb in taxonomy.verbs] == golden["verbs"]
    assert [word(noun) for noun in taxonomy.nouns] == golden["nouns"]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_samples_match(datasets: Path, ego4d: Path, split: str) -> None:
    name = {"train": "ego4d_lta_train__live1plus", "validation": "ego4d_lta_val__live1plus__is_training-False"}[split]
    ours = dialogues((row for row in read_lta(ego4d) if row.split == split), datasets, split=split)
    golden, annos = samples(name), read_json("data/samples.json")[name]["annos"]
    assert [key(dialogue) for dialogue in ours] == [sample.key for sample in golden]
    assert [text(d, "live1plus", prompt=split == "validation") for d in ours] == [s.text for s in golden]
    taxonomy = read_taxonomy(ego4d)
    for dialogue, sample, anno in zip(ours, golden, annos, strict=True):
        pairs = zip(anno["verb_labels"], anno["noun_labels"], strict=True)
        assert dialogue.labels == tuple(taxonomy.action(verb, noun) for verb, noun in pairs)
        assert anno["clip_uid"] in dialogue.dialogue_id
        if split == "train":
            assert turns(dialogue) == sample.turns


def test_samples_of_the_test_set_match_and_end_without_an_answer(datasets: Path, ego4d: Path) -> None:
    ours = dialogues(read_lta_test(ego4d), datasets, split="validation")
    golden = samples("ego4d_lta_test_unannotated__live1plus__is_training-False")
    assert [key(dialogue) for dialogue in ours] == [sample.key for sample in golden]
    assert [text(dialogue, "live1plus", prompt=True) for dialogue in ours] == [sample.text for sample in golden]
    assert all(isinstance(dialogue.conversation[-1], Stream) for dialogue in ours)
    assert dialogues(read_lta_test(ego4d), datasets, split="train") == []


def test_a_label_beyond_the_taxonomy_is_explained(ego4d: Path, tmp_path: Path) -> None:
    shutil.copytree(ego4d, tmp_path / "annotations")
    path = tmp_path / "annotations" / "fho_lta_train.json"
    content = json.loads(path.read_text())
    content["clips"][0]["noun_label"] = 99
    path.write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match=r"noun_label 99: the taxonomy has 7 verbs and 13 nouns"):
        list(read_lta(tmp_path / "annotations"))

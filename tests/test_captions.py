"""Captions in the JSON of ActivityNet Captions and YouCook2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.annotations import AnnotationError
from jobs.captions import read_captions


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_captions_are_read_in_order_of_time(tmp_path: Path) -> None:
    content = {
        "v_a": {"duration": 82.73, "timestamps": [[17.37, 60.81], [0.83, 19.86]], "sentences": ["Then.", "First."]},
        "v_b": {"duration": 10, "timestamps": [[5, 2]], "sentences": ["From its end."], "extra": 1},
    }
    a, b = read_captions(write(tmp_path / "train.json", content))
    assert (a.video_id, a.duration, a.kind) == ("v_a", 82.73, "narration")
    assert [(m.time, m.stop, m.text) for m in a.moments] == [(0.83, 19.86, "First."), (17.37, 60.81, "Then.")]
    assert [(m.time, m.stop) for m in b.moments] == [(2, 5)]


def test_youcook2s_own_form_tells_the_split(tmp_path: Path) -> None:
    segments = [{"segment": [90, 102], "id": 0, "sentence": "spread margarine"}]
    content = {
        "database": {
            "GLd3aX16zBg": {"duration": 241.62, "subset": "validation", "recipe_type": "113", "annotations": segments},
            "fn9anlEL4FI": {"duration": 100, "subset": "training"},
        }
    }
    first, second = read_captions(write(tmp_path / "youcook.json", content))
    assert (first.video_id, first.split, second.split) == ("GLd3aX16zBg", "validation", "train")
    assert [(m.time, m.stop, m.text) for m in first.moments] == [(90, 102, "spread margarine")]
    assert second.moments == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"v": {"timestamps": [[0, 1]], "sentences": []}}, r"train.json: v: .*1 timestamps for 0 sentences"),
        ({"v": {"timestamps": [[0]], "sentences": ["a"]}}, r"train.json: v.timestamps.0.1: .*Field required"),
        ({"v": 3}, r"train.json: v: found '3'"),
        ([], r"train.json: file: found"),
    ],
)
def test_a_damaged_file_is_explained_by_the_place_in_it(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        list(read_captions(write(tmp_path / "train.json", content)))

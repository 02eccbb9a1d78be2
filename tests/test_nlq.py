"""Natural-language queries become streaming dialogues as in the public reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden_data import Drawing, Sample, extent, samples, scene_text

from actors.turns import User
from jobs.annotations import VideoAnnotation
from jobs.clock import Extent
from jobs.nlq import QUESTIONS, read_nlq, scenes


def golden_by_query() -> dict[str, Sample]:
    found = {}
    for sample in samples("ego4d_nlq_stream_train__live1plus"):
        words = json.dumps([turn.model_dump() for turn in sample.turns]).split('\\"')[1]
        found[words] = sample
    return found


def test_samples_match(datasets: Path, ego4d: Path) -> None:
    """Overlapping parts and parts without a frame included (finding 6.4, where we do the same)."""
    golden = golden_by_query()
    for row in read_nlq(ego4d):
        if row.split != "train":
            continue
        (query,) = row.tasks
        sample = golden.get(query)
        template = "" if sample is None else sample.question.replace(query, "{query}")
        made = list(scenes(row, extent(datasets, row.video_id), Drawing(template)))
        if sample is None:
            assert made == []
            continue
        (scene,) = made
        assert (row.video_id, scene.frames) == sample.key
        assert scene.turns == (User(content=sample.question), *sample.turns)
        assert scene_text(scene) == sample.text
        del golden[query]
    assert not golden


def test_every_question_names_the_query() -> None:
    assert len(set(QUESTIONS)) == 10
    assert all(question.format(query="where is it?").count('"where is it?"') == 1 for question in QUESTIONS)


@pytest.mark.parametrize("query", ["{braces}", 'with "quotes"'])
def test_a_query_may_hold_any_text(query: str) -> None:
    row = VideoAnnotation(
        video_id="v",
        video="",
        moments=({"time": 1, "stop": 3, "text": query},),
        tasks=(query,),
        source="nlq_train.json",
        kind="nlq",
        span=(0, 10),
    )
    (scene,) = scenes(row, Extent(21, 2, 10), Drawing(QUESTIONS[0]))
    assert query in str(scene.turns[0])

"""jobs.edit_distance against the textbook definition."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from golden_files import read_json
from hypothesis import given
from hypothesis import strategies as st

from jobs.edit_distance import Choices, prefix_distances


def textbook(one: tuple, other: tuple) -> int:
    @cache
    def distance(i: int, j: int) -> int:
        if min(i, j) == 0:
            return max(i, j)
        changed = distance(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, changed)

    return distance(len(one), len(other))


words = st.text("abc ", max_size=8)


@given(words, st.lists(words, min_size=1, max_size=6))
def test_distances_to_texts_are_those_of_the_textbook(text: str, texts: list[str]) -> None:
    choices = Choices(texts)
    expected = [textbook(tuple(text), tuple(choice)) for choice in choices.texts]
    assert choices.distances(text).tolist() == expected
    assert choices.nearest(text) == min(texts, key=lambda choice: (textbook(tuple(text), tuple(choice)), choice))


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 3), min_size=n, max_size=n)] * 3)))
def test_distances_of_beginnings_are_those_of_the_textbook(lists: tuple[list[int], ...]) -> None:
    *predicted, labelled = (tuple(items) for items in lists)
    distances = prefix_distances(np.array(predicted), np.array(labelled))
    for row, items in zip(distances, predicted, strict=True):
        assert row.tolist() == [textbook(items[:z], labelled[:z]) for z in range(1, len(labelled) + 1)]


def test_the_nearest_choice_is_the_references() -> None:
    golden = read_json("metrics/coin.json")["fuzzy_match"]
    choices = Choices(golden["choices"])
    assert [[text, choices.nearest(text)] for text, _ in golden["cases"]] == golden["cases"]


def test_there_must_be_something_to_choose() -> None:
    with pytest.raises(ValueError, match="nothing to choose from"):
        Choices([])

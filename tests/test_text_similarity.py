from __future__ import annotations

import pytest

from jobs.text_similarity import chrf


def test_equal_texts_are_alike_whatever_their_case() -> None:
    assert chrf("A cat sleeps.", "a CAT sleeps.") == pytest.approx(1)


def test_texts_without_a_common_letter_are_not() -> None:
    assert chrf("aaa", "bbb") == 0
    assert chrf("", "A cat sleeps.") == 0


def test_by_hand() -> None:
    # Of the n-grams of "ab" and "ac", one of two letters is common, and no pair: (1/2 + 0) / 2 for both
    # precision and recall.
    assert chrf("ab", "ac") == pytest.approx(0.25)


def test_more_in_common_is_more_alike() -> None:
    said = ["A cat appears.", "A dog appears.", "Rain falls."]
    likeness = [chrf(text, "A cat appears.") for text in said]
    assert likeness == sorted(likeness, reverse=True)

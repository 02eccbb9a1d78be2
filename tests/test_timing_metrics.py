"""jobs.timing_metrics on examples worked by hand, and its matching against all there could be."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.annotations import Moment
from jobs.timing_metrics import Timing, Window, match, timing

WINDOW = Window(before_s=1, after_s=3)


def moments(*times: float, text: str = "") -> list[Moment]:
    """Texts that differ, unless one is given."""
    return [Moment(time=time, text=text or "abcdefghij"[i] * 8) for i, time in enumerate(times)]


def test_by_hand() -> None:
    # Labels at 10, 20, 40 s: 9.5 is early by 0.5, 22 late by 2, 24 and 60 belong to nothing.
    result = timing(moments(9.5, 22, 24, 60), moments(10, 20, 40), 100, WINDOW)
    assert (result.said, result.labelled, result.matched, result.false_alarms) == (4, 3, 2, 2)
    assert result.precision == 2 / 4
    assert result.recall == 2 / 3
    assert result.f1 == 2 * 2 / (4 + 3)
    assert result.mean_error_s == pytest.approx((0.5 + 2) / 2)
    assert result.mean_late_s == pytest.approx((-0.5 + 2) / 2)
    assert result.quiet_s == 100 - 3 * 4
    assert result.false_alarms_per_quiet_hour == pytest.approx(2 * 3600 / 88)


@pytest.mark.parametrize(("said", "matched"), [(8.9, 0), (9.0, 1), (13.0, 1), (13.1, 0)])
def test_the_window_reaches_from_before_to_after_a_label(said: float, matched: int) -> None:
    assert timing(moments(said), moments(10), 60, WINDOW).matched == matched


def test_a_second_response_to_a_label_is_wrong_but_no_false_alarm() -> None:
    result = timing(moments(10, 11), moments(10), 60, WINDOW)
    assert (result.precision, result.recall, result.false_alarms) == (0.5, 1.0, 0)


def test_as_many_labels_as_possible_are_met() -> None:
    # 12 is nearest to the label at 12, but then the one at 10 would have none.
    assert match([12, 14], [10, 12], WINDOW) == [(0, 0), (1, 1)]
    assert match([10, 10.5], [10.4], WINDOW) == [(1, 0)]


times = st.lists(st.integers(0, 12).map(float), max_size=5).map(sorted)


@settings(max_examples=60)
@given(times, times)
def test_no_matching_has_more_or_closer_pairs(said: list[float], labelled: list[float]) -> None:
    def score(pairs: list[tuple[int, int]]) -> tuple[int, float]:
        return len(pairs), -sum(abs(said[i] - labelled[j]) for i, j in pairs)

    possible = [
        list(zip(chosen, order, strict=True))
        for size in range(min(len(said), len(labelled)) + 1)
        for chosen in combinations(range(len(said)), size)
        for order in permutations(range(len(labelled)), size)
    ]
    allowed = [pairs for pairs in possible if all(WINDOW.holds(said[i], labelled[j]) for i, j in pairs)]
    found = match(said, labelled, WINDOW)
    assert found in allowed
    assert score(found) == max(map(score, allowed))


def test_windows_that_overlap_or_leave_the_video_are_counted_once() -> None:
    assert timing([], moments(0, 2, 9), 10, WINDOW).quiet_s == pytest.approx(10 - 5 - 2)
    assert timing([], [], 10, WINDOW).quiet_s == 10


def test_a_response_that_was_given_before_is_a_duplicate() -> None:
    said = [Moment(time=i, text=text) for i, text in enumerate(["A cat.", "A dog.", "a cat", "Three", "four", "five."])]
    assert timing(said, [], 10, WINDOW).duplicate_ratio == 1 / 6
    late = [*said, Moment(time=9, text="A dog.")]
    assert timing(late, [], 10, WINDOW).duplicates == 1


def test_speaking_takes_as_long_as_the_words_do() -> None:
    said = [Moment(time=0, text="one two three four five"), Moment(time=1, text="one two three four five")]
    assert timing(said, [], 10, WINDOW).speaking_share == pytest.approx(0.3)
    assert timing(moments(9.9, text="word " * 50), [], 10, WINDOW).speaking_s == pytest.approx(0.1)


def test_nothing_to_count_is_none() -> None:
    result = timing([], [], 0, WINDOW)
    assert (result.precision, result.recall, result.f1, result.mean_error_s, result.duplicate_ratio) == (None,) * 5
    assert (result.false_alarms_per_quiet_hour, result.speaking_share) == (None, None)


def test_streams_add_up() -> None:
    one, other = (
        timing(moments(1, 30), moments(1), 60, WINDOW),
        timing([], moments(5, 9), 40, WINDOW),
    )
    total = one + other
    assert (total.said, total.labelled, total.matched, total.duration_s) == (2, 3, 1, 100)
    assert total.f1 == 2 / 5
    assert one + Timing() == one

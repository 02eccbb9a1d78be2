"""Responses against events with acceptable words, on examples worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.event_metrics import (
    NOTHING,
    Event,
    EventScores,
    EventsError,
    Said,
    event_scores,
    interval,
    pieces,
    poisson_interval,
    read_events,
    share_interval,
)

EVENTS = [Event(time=2, words=("cat", "kitten")), Event(time=5, words=("dog",))]


def test_right_is_in_time_and_with_a_word() -> None:
    said = [Said(2.5, "A cat comes into view."), Said(6.0, "A bird comes into view.")]
    assert event_scores(said, EVENTS) == EventScores(events=2, responses=2, right=1, timed=2)


def test_plurals_count_and_parts_of_words_do_not() -> None:
    assert EVENTS[0].named_by("Two CATS sleep.")
    assert not EVENTS[0].named_by("A catalogue.")


def test_an_event_counts_once_however_often_it_is_told() -> None:
    said = [Said(1.5, "A cat."), Said(2.0, "A cat."), Said(2.5, "A cat.")]
    scores = event_scores(said, EVENTS)
    assert (scores.right, scores.responses) == (1, 3)
    assert scores.f1 == pytest.approx(2 / 5)


def test_outside_the_window_is_too_late() -> None:
    assert event_scores([Said(3.51, "A cat.")], EVENTS[:1]).timed == 0
    assert event_scores([Said(3.5, "A cat.")], EVENTS[:1]).right == 1


def test_two_responses_between_two_events_find_one_each() -> None:
    events = [Event(time=1, words=("cat",)), Event(time=2, words=("cat",))]
    assert event_scores([Said(0, "cat"), Said(1.5, "cat")], events).right == 2


def test_silence_is_perfect_only_where_nothing_happens() -> None:
    assert event_scores([], []).f1 == 1
    assert event_scores([], EVENTS).f1 == 0
    assert sum([event_scores([], EVENTS)], NOTHING).events == 2


def test_pieces_tear_no_pair_apart() -> None:
    events = [Event(time=at, words=("cat",)) for at in (2, 11, 30, 31, 45)]
    said = [Said(3, "A cat."), Said(12, "A dog."), Said(20, "A cat."), Said(32, "A cat.")]
    cut = pieces(said, events, 10)
    assert [[one.time for one in happened] for _, happened in cut] == [[2], [11], [30, 31], [45]]
    assert [[one.time for one in spoken] for spoken, _ in cut] == [[3], [12, 20], [32], []]
    assert sum((event_scores(*part) for part in cut), NOTHING) == event_scores(said, events)
    assert pieces(said, events, 100) == [(said, events)]
    assert pieces([], [], 10) == [([], [])]
    close = [Said(at, "A cat.") for at in range(50)]
    assert len(pieces(close, events, 10)) == 1


def test_intervals_hold_the_score() -> None:
    parts = [EventScores(2, 2, 2, 2), EventScores(2, 2, 0, 1)] * 10
    low, high = interval(parts)
    assert low < sum(parts, NOTHING).f1 < high
    low, high = share_interval(8, 10)
    assert low == pytest.approx(0.490, abs=1e-3)
    assert high == pytest.approx(0.943, abs=1e-3)
    assert share_interval(0, 0) == (0, 1)


def test_rates_of_few_counts_are_uncertain() -> None:
    assert poisson_interval(0)[0] == 0
    assert poisson_interval(0)[1] == pytest.approx(3.7, abs=0.05)
    low, high = poisson_interval(10)
    assert low == pytest.approx(4.8, abs=0.05)
    assert high == pytest.approx(18.4, abs=0.1)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "video.events.json"
    file.write_text('[{"time": -1, "words": []}]')
    with pytest.raises(EventsError, match=r"video.events.json.*expected"):
        read_events(file)
    file.write_text('[{"time": 3, "words": ["b"]}, {"time": 1, "words": ["a"]}]')
    assert [event.time for event in read_events(file)] == [1, 3]

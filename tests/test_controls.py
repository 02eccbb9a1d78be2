"""jobs.controls get the scores they are known for."""

from __future__ import annotations

import pytest
import torch

from jobs.annotations import Moment
from jobs.controls import (
    LabelledStream,
    always_silent,
    always_speak,
    change_detector,
    fit_change_detector,
    fixed_interval,
    frame_changes,
    grade,
    oracle,
)
from jobs.timing_metrics import Timing, Window

FPS, SECONDS = 2, 60
WINDOW = Window(before_s=1, after_s=3)
EXACT = Window(before_s=0, after_s=0)
TEXTS = ("A cat sleeps.", "Someone cuts bread.", "The door is opened.", "Rain falls on the street.")


def stream_of(*labelled_s: float, seed: int = 0) -> LabelledStream:
    """Frames that look alike, but for a change at each label."""
    generator = torch.Generator().manual_seed(seed)
    times = [frame / FPS for frame in range(FPS * SECONDS)]
    looks = torch.randn(len(labelled_s) + 1, 4, 32, generator=generator)
    shown = [sum(label <= time for label in labelled_s) for time in times]
    tokens = looks[shown] + 0.05 * torch.randn(len(times), 4, 32, generator=generator)
    labels = [Moment(time=time, text=TEXTS[number % len(TEXTS)]) for number, time in enumerate(labelled_s)]
    return LabelledStream(times, frame_changes(tokens.half()), labels, SECONDS)


STREAMS = [stream_of(10, 25, 40), stream_of(5, 50, seed=1)]


def test_silence_finds_nothing_and_raises_no_alarm() -> None:
    result = grade(always_silent, STREAMS, WINDOW)
    assert (result.precision, result.recall, result.f1) == (None, 0, 0)
    assert (result.false_alarms_per_quiet_hour, result.speaking_share) == (0, 0)


def test_speaking_always_finds_everything_among_much_else() -> None:
    result = grade(always_speak, STREAMS, WINDOW)
    assert result.recall == 1
    assert result.precision == 5 / (2 * FPS * SECONDS)
    assert result.mean_error_s == 0
    assert result.duplicate_ratio == (FPS * SECONDS - 1) / (FPS * SECONDS)
    assert result.speaking_share == pytest.approx(1)
    assert result.false_alarms_per_quiet_hour == pytest.approx(FPS * 3600, rel=0.03)


def test_the_oracle_is_perfect() -> None:
    result = grade(oracle, STREAMS, EXACT)
    assert (result.precision, result.recall, result.f1, result.mean_error_s) == (1, 1, 1, 0)
    assert (result.false_alarms, result.duplicates) == (0, 0)
    assert result.text_similarity == 1


def test_a_stock_sentence_is_unlike_what_was_to_be_said() -> None:
    result = grade(always_speak, STREAMS, WINDOW)
    assert result.text_similarity is not None
    assert 0 < result.text_similarity < 0.3


def test_the_oracle_speaks_at_the_first_frame_that_shows_it() -> None:
    stream = stream_of(10.1, 59.9)
    assert [(moment.time, moment.text) for moment in oracle(stream)] == [
        (10.5, TEXTS[0]),
        (59.5, TEXTS[1]),
    ]
    assert oracle(LabelledStream([], [], stream.labels, 0)) == []


def test_a_fixed_interval_is_right_where_the_labels_have_it() -> None:
    regular = [stream_of(*range(0, SECONDS, 10))]
    assert grade(fixed_interval(10), regular, EXACT).f1 == 1
    twice = grade(fixed_interval(5), regular, EXACT)
    assert (twice.precision, twice.recall) == (0.5, 1)
    assert [moment.time for moment in fixed_interval(0.7)(stream_of())[:3]] == [0, 1, 2]


def test_the_change_detector_finds_changes_and_the_beginning() -> None:
    result = grade(change_detector(0.5), STREAMS, EXACT)
    assert (result.recall, result.precision) == (1, 5 / 7)
    assert grade(change_detector(2.0), STREAMS, EXACT).said == 2


def test_the_change_detectors_threshold_is_fitted() -> None:
    threshold = fit_change_detector(STREAMS, EXACT)
    result = grade(change_detector(threshold), STREAMS, EXACT)
    assert result.f1 == pytest.approx(2 * 5 / (5 + 7))
    assert grade(change_detector(threshold / 20), STREAMS, EXACT).f1 < 0.1


def test_changes_are_between_0_for_the_same_and_2_for_the_opposite() -> None:
    tokens = torch.tensor([[[1.0, 0]], [[2.0, 0]], [[0, 1.0]], [[0, -1.0]]])
    assert frame_changes(tokens) == pytest.approx([0, 0, 1, 2])
    assert frame_changes(tokens[:0]) == []


def test_one_frame_has_no_change() -> None:
    stream = LabelledStream([0.0], [0.0], [], 1)
    assert [moment.time for moment in change_detector(0.5)(stream)] == [0]
    with pytest.raises(ValueError, match="no change to detect"):
        fit_change_detector([stream], WINDOW)


def test_no_stream_counts_nothing() -> None:
    assert grade(always_speak, [], WINDOW) == Timing()

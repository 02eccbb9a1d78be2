"""Thresholds tried without running what would decide the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.turns import Assistant, Stream, System, Turn
from jobs.dialogues import Dialogue
from jobs.grader import Heard
from jobs.replay import Utterance
from jobs.streams import play_of
from jobs.threshold_sweep import Point, Sweep, best, holds_at, hopeless
from jobs.timing_metrics import Timing, Window

WINDOW = Window(before_s=0, after_s=0.5)


def stream(num_frames: int, *labelled: int) -> Dialogue:
    """At 2 fps, with something to be said after each of the frames."""
    turns: list[Turn] = [System(content="s.")]
    shown = 0
    for frame in labelled:
        turns += [Stream(num_frames=frame + 1 - shown), Assistant(content=f"Frame {frame}.")]
        shown = frame + 1
    turns.append(Stream(num_frames=num_frames - shown))
    return Dialogue(
        dialogue_id="d",
        task="narration",
        video_id="v",
        video="",
        fps=2,
        frames=(0, num_frames),
        conversation=tuple(turns),
    )


def listen(p_silent: Sequence[float], threshold: float, other: Sequence[int] = (), asked: Sequence[int] = ()) -> Heard:
    """A session whose P(silent) does not depend on what it said; at the frames `other` silence is never likeliest."""
    spoke = [frame for frame, p in enumerate(p_silent) if (p < threshold or frame in other) and frame not in asked]
    said = [Utterance(frame / 2, f"Frame {frame}.") for frame in spoke]
    return Heard(threshold, said, list(p_silent), spoke, list(asked), 0, 0, [])


@given(
    st.lists(st.sampled_from([0.1, 0.4, 0.6, 0.9]), min_size=1, max_size=8),
    st.sets(st.integers(0, 7)),
    st.sets(st.integers(0, 7)),
    st.sampled_from([0.0, 0.1, 0.5, 0.6, 0.95]),
    st.sampled_from([0.0, 0.1, 0.5, 0.6, 0.95]),
)
def test_what_holds_at_another_threshold_is_what_is_heard_there(
    p_silent: list[float], other: set[int], asked: set[int], threshold: float, another: float
) -> None:
    heard = listen(p_silent, threshold, sorted(other), sorted(asked))
    if holds_at(heard, another):
        assert heard.spoke == listen(p_silent, another, sorted(other), sorted(asked)).spoke


def test_a_frame_between_two_thresholds_is_decided_differently() -> None:
    heard = listen([0.99, 0.6, 0.99], threshold=0.7)
    assert [holds_at(heard, threshold) for threshold in (0.5, 0.6, 0.61, 0.9, 0.995)] == [
        *(False, False, True, True, False)
    ]


def test_a_frame_at_which_the_user_spoke_was_not_decided() -> None:
    assert holds_at(listen([0.6, 0.99], threshold=0.5, asked=[0]), 0.7)


class Player:
    """Plays streams of given P(silent) and counts."""

    def __init__(self, *streams: Sequence[float]) -> None:
        self.streams = streams
        self.runs: list[tuple[int, float]] = []

    def __call__(self, indices: Sequence[int], threshold: float) -> Iterator[tuple[int, Heard]]:
        for index in indices:
            self.runs.append((index, threshold))
            yield index, listen(self.streams[index], threshold)


def test_only_streams_that_decide_differently_are_run_again() -> None:
    player = Player([0.99, 0.2, 0.99, 0.99], [0.99, 0.99, 0.8, 0.99])
    sweep = Sweep([play_of(stream(4, 1)), play_of(stream(4, 2))], player)
    points = sweep.curve((0.5, 0.7, 0.9), WINDOW)
    assert player.runs == [(0, 0.5), (1, 0.5), (1, 0.9)]
    assert [(point.threshold, point.timing.f1, point.runs) for point in points] == [
        (0.5, pytest.approx(2 / 3), 2),
        (0.7, pytest.approx(2 / 3), 0),
        (0.9, 1.0, 1),
    ]
    assert best(points).threshold == 0.9
    heard, runs = sweep.at(0.6)
    assert ([one.spoke for one in heard], runs) == ([[1], []], 0)


def test_thresholds_that_cannot_be_the_best_are_not_tried() -> None:
    player = Player([0.99, 0.2] + [0.99] * 8)
    points = Sweep([play_of(stream(10, 1))], player).curve((0.5, 0.995, 0.999), WINDOW)
    assert [point.threshold for point in points] == [0.5, 0.995]
    assert [point.timing.said for point in points] == [1, 10]


def point(threshold: float, matched: int, said: int, false_alarms: int) -> Point:
    return Point(threshold, Timing(said, 10, matched, false_alarms=false_alarms, quiet_s=3600), 1)


def test_of_equal_f1_fewer_false_alarms_are_better_and_then_the_lower_threshold() -> None:
    assert (
        best([point(0.5, 4, 10, 3), point(0.7, 4, 10, 2), point(0.6, 4, 10, 2), point(0.9, 3, 10, 0)]).threshold == 0.6
    )


def test_few_responses_leave_hope() -> None:
    assert not hopeless(Timing(said=2, labelled=10, matched=0), Timing(said=10, labelled=10, matched=9))
    assert hopeless(Timing(said=100, labelled=10, matched=10), Timing(said=10, labelled=10, matched=5))

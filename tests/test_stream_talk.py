"""What is said about made-up streams, from what is in view at each frame."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.turns import Assistant, Stream, User
from jobs.stream_talk import (
    NARRATE,
    Talk,
    View,
    answer_before,
    answer_is_there,
    answer_now,
    answer_so_far,
    narrated,
    noticed,
)

NAMES = ("cat", "dog", "owl")


def seen(*shown: str | None) -> View:
    view = View()
    for name in shown:
        view.next(name)
    return view


def events(*shown: str | None) -> list[tuple[str, str] | None]:
    view = View()
    return [view.next(name) for name in shown]


def test_a_thing_is_told_at_its_second_frame() -> None:
    assert events("cat", "cat", "cat") == [None, ("appears", "cat"), None]


def test_a_flash_is_not_told() -> None:
    assert events(None, "cat", None, None) == [None] * 4
    assert events("cat", "cat", "dog", "cat", "cat") == [None, ("appears", "cat"), None, None, None]


def test_a_dropped_picture_is_not_told() -> None:
    assert events("cat", "cat", None, "cat") == [None, ("appears", "cat"), None, None]


def test_what_leaves_and_comes_back_is_told() -> None:
    assert events("cat", "cat", None, None, "cat", "cat")[3:] == [("gone", "cat"), None, ("returns", "cat")]


def test_what_gives_way_to_another_is_not_gone_but_replaced() -> None:
    assert events("cat", "cat", "dog", "dog")[2:] == [None, ("appears", "dog")]


def test_sentences() -> None:
    assert narrated(("appears", "owl")) == "An owl comes into view."
    assert narrated(("returns", "cat")) == "The cat is back."
    assert narrated(("gone", "cat")) == "The cat is gone."
    assert noticed("dog") == "A dog is here now."


def test_answers() -> None:
    view = seen("cat", "cat", "dog", "dog", "owl", "owl", None, None)
    assert answer_now(view) == "Nothing that I can name."
    assert answer_before(view) == "Before that I saw an owl."
    assert answer_so_far(view) == "I saw a cat, a dog and an owl."
    assert answer_is_there(view, "owl") == "No."
    view = seen("cat", "cat", "dog", "dog")
    assert answer_now(view) == "I see a dog."
    assert answer_before(view) == "Before that I saw a cat."
    assert answer_is_there(view, "dog") == "Yes, I see a dog."
    assert answer_is_there(view, "cat") == "No, I see a dog."
    assert answer_so_far(seen()) == answer_before(seen()) == "Nothing that I can name."


@given(st.integers(0, 10_000), st.lists(st.sampled_from([None, *NAMES]), min_size=1, max_size=40))
def test_every_frame_is_shown_once_and_every_question_answered(seed: int, shown: list[str | None]) -> None:
    turns = Talk(Random(seed), NAMES).conversation(shown, "system")
    assert sum(turn.num_frames for turn in turns if isinstance(turn, Stream)) == len(shown)
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        if isinstance(turn, User):
            assert isinstance(following, Assistant)
        if isinstance(turn, Stream) and isinstance(following, User):
            assert turn.num_learned == turn.num_frames - 1


@pytest.mark.parametrize("seed", range(40))
def test_a_watcher_is_told_of_nothing_else(seed: int) -> None:
    turns = Talk(Random(seed), NAMES).conversation([None, "cat", "cat", None, None, "dog", "dog", "dog"] * 3, "system")
    if not any(isinstance(turn, User) and turn.content not in NARRATE for turn in turns[:2]):
        return
    before = turns[0]
    for turn in turns[1:]:
        if isinstance(turn, Assistant) and isinstance(before, Stream):
            assert turn.content.endswith("is here now.")
        before = turn


def test_who_waits_is_told_every_time_and_may_wait_for_a_relative_in_vain() -> None:
    shown = [None, "cat", "cat", None, None, "teapot", "teapot", None, None, "cat", "cat", "cat"]
    watched = dict[str | None, int]()
    for seed in range(200):
        talk = Talk(Random(seed), ("cat", "dog", "teapot", "wrench"), curious=True, waits=True)
        turns = talk.conversation(shown, "system")
        told = sum(isinstance(turn, Assistant) and "is here now" in turn.content for turn in turns[3:])
        if not talk.view.history[:-3]:  # nothing is remembered of a former context
            assert told == {"cat": 2, "teapot": 1}.get(talk.watched or "", 0)
        watched[talk.watched] = watched.get(talk.watched, 0) + 1
    assert watched["dog"] > 20
    assert "wrench" not in watched


@pytest.mark.parametrize("seed", range(10))
def test_nobody_waits_who_is_not_to(seed: int) -> None:
    talk = Talk(Random(seed), NAMES, curious=True, waits=False)
    talk.conversation([None, "cat", "cat"], "system")
    assert talk.watched is None


@pytest.mark.parametrize("seed", range(10))
def test_a_stream_that_is_narrated_has_one_request_before_it_and_a_sentence_for_every_event(seed: int) -> None:
    shown = [None, "cat", "cat", None, None, "dog", "dog", "dog", "cat", "cat"]
    turns = Talk(Random(seed), NAMES, narrated=True).conversation(shown, "system")
    assert [turn.content for turn in turns if isinstance(turn, User)] == [turns[1].content]
    assert turns[1].content in NARRATE
    assert [turn.content for turn in turns if isinstance(turn, Assistant)] == [
        "All right.",
        "A cat comes into view.",
        "The cat is gone.",
        "A dog comes into view.",
        "The cat is back.",
    ]

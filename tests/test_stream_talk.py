"""What is said about made-up streams, from what is in view at each frame."""

from __future__ import annotations

import itertools
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.turns import Assistant, Stream, Turn, User
from jobs.stream_talk import (
    AGREED,
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
    assert answer_before(view, reminded=True) == "Before the dog I saw a cat."
    assert answer_before(seen("cat", "cat", None, None), reminded=True) == "Before that I saw a cat."
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


WAITED = [None, "cat", "cat", None, None, "teapot", "teapot", None, None, "cat", "cat", "cat", None, None]


def waiting(seed: int) -> tuple[Talk, list[Turn]]:
    talk = Talk(Random(seed), ("cat", "dog", "teapot", "wrench"), curious=True, waits=True, sudden=True)
    return talk, talk.conversation(WAITED, "system")[1:]


@pytest.mark.parametrize("seed", range(60))
def test_who_waits_is_told_every_time_of_what_was_asked_for_last(seed: int) -> None:
    _, turns = waiting(seed)
    frame, watched, told = 0, None, list[tuple[int, str]]()
    wanted = list[tuple[int, str]]()
    for turn, following in itertools.pairwise([*turns, None]):
        if isinstance(turn, Stream):
            coming = {2: "cat", 6: "teapot", 10: "cat"}
            passed = range(frame, frame + turn.num_frames)
            wanted += [(at, name) for at, name in coming.items() if at in passed and name == watched]
            frame += turn.num_frames
        elif isinstance(turn, User) and isinstance(following, Assistant) and following.content.startswith(AGREED):
            watched = next((name for name in ("cat", "dog", "teapot", "wrench") if name in turn.content), None)
        elif isinstance(turn, Assistant) and "is here now" in turn.content and not turn.content.startswith(AGREED):
            told.append((frame - 1, turn.content.split()[1]))
    assert told == wanted


def test_who_waits_may_say_so_late_and_again_and_for_a_relative_in_vain() -> None:
    talks = [waiting(seed) for seed in range(200)]
    requests = [
        [place for place, turn in enumerate(turns) if isinstance(turn, User) and "narrat" not in turn.content.lower()
         and any(turn.content.startswith(word) for word in ("Tell me when", "Let me know", "Say so"))]
        for _, turns in talks
    ]  # fmt: skip
    assert all(requests), "somebody waits in every stream"
    assert 60 < sum(places[0] == 0 for places in requests) < 140, "half of them from the beginning"
    assert sum(len(places) > 1 for places in requests) > 30
    watched = [talk.watched for talk, _ in talks]
    assert watched.count("dog") > 20
    assert watched.count("cat") > 20


def test_questions_about_what_was_before_can_be_frequent_while_something_else_is_in_view() -> None:
    shown = [*[None] * 2, *["cat"] * 8, *["dog"] * 8]

    def about_before(earlier: float) -> int:
        found = 0
        for seed in range(100):
            talk = Talk(Random(seed), NAMES, curious=True, waits=False, questions=(2, 5), earlier=earlier)
            turns = talk.conversation(shown, "system")
            found += sum(isinstance(turn, Assistant) and turn.content == "Before that I saw a cat." for turn in turns)
        return found

    assert about_before(1) > 1.5 * about_before(0) > 0


@pytest.mark.parametrize("seed", range(50))
def test_as_many_questions_as_wanted_are_asked_at_most(seed: int) -> None:
    shown = [*[None] * 10, *["cat"] * 10, *[None] * 30]
    turns = Talk(Random(seed), NAMES, curious=True, waits=False, questions=(3, 3)).conversation(shown, "system")
    asked = [turn for turn in turns if isinstance(turn, User) and turn.content not in NARRATE]
    assert 1 <= len(asked) <= 3


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

"""Chats written by rule from what is annotated."""

from __future__ import annotations

import itertools
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from jobs.annotations import Moment
from jobs.goalstep import read_goalstep
from jobs.questions import CURRENT, NEXT, PAST, about_anything
from jobs.template_chat import CAPTIONS, STEPS, converse

TOLD = (
    Moment(time=5, stop=60, text="cut the onion"),
    Moment(time=70, stop=130, text="boil the soup"),
    Moment(time=140, stop=190, text="serve"),
)
ASKED = st.lists(
    st.tuples(st.floats(5, 190), st.sampled_from((*PAST, *CURRENT, *NEXT))),
    min_size=1,
    max_size=3,
    unique_by=lambda asked: asked[0],
)


def test_there_are_three_times_fifty_questions() -> None:
    assert [len(questions) for questions in (PAST, CURRENT, NEXT)] == [50, 50, 50]
    assert len({*PAST, *CURRENT, *NEXT}) == 150


def test_some_of_each_kind_can_be_asked_about_any_video() -> None:
    for questions in (PAST, CURRENT, NEXT):
        assert 4 <= len(about_anything(questions)) < 50
    assert "Which step is this?" not in about_anything(CURRENT)


@given(ASKED, st.sampled_from((STEPS, CAPTIONS)))
def test_answers_are_true_of_what_is_annotated(asked: list, phrases: object) -> None:
    messages = converse(TOLD, 200, asked, phrases)
    assert [message.time for message in messages] == sorted(message.time for message in messages)
    assert messages[0].role == "user"
    for question, answer in itertools.pairwise(messages):
        if question.role != "user":
            continue
        assert (answer.role, answer.time) == ("assistant", question.time)
        named = [moment for moment in TOLD if moment.text in answer.text]
        if question.text in PAST:
            assert all(moment.stop <= question.time for moment in named)
        elif question.text in CURRENT:
            assert all(moment.time <= question.time <= moment.stop for moment in named)
        else:
            assert all(moment.time > question.time for moment in named)


def test_what_starts_after_the_first_question_is_said_then() -> None:
    messages = converse(TOLD, 200, [(65, "What comes next?")], STEPS)
    assert [(message.time, message.text) for message in messages] == [
        (65, "What comes next?"),
        (65, "The next step is: boil the soup."),
        (70, "Now boil the soup."),
        (140, "Now serve."),
        (190, "Well done, that was the last step."),
    ]


def test_activities_and_those_within_them_are_rows(ego4d: Path) -> None:
    rows = list(read_goalstep(ego4d))
    assert [(row.video_id, row.part, len(row.moments), row.split) for row in rows] == [
        ("v_train_a", "0", 3, "train"),
        ("v_train_a", "1", 2, "train"),
        ("v_val_goal", "0", 1, "validation"),
    ]

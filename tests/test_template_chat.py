"""Chats written by rule from the steps of an activity."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

from golden_data import extent
from hypothesis import given
from hypothesis import strategies as st

from actors.turns import Assistant, User
from jobs.annotations import Moment, VideoAnnotation
from jobs.clock import Extent
from jobs.dialogues import DataConfig
from jobs.goalstep import read_goalstep
from jobs.livechat import unfit
from jobs.questions import CURRENT, NEXT, PAST
from jobs.tasks import dialogues_of
from jobs.template_chat import converse, scenes

STEPS = (
    Moment(time=5, stop=60, text="cut the onion"),
    Moment(time=70, stop=130, text="boil the soup"),
    Moment(time=140, stop=190, text="serve"),
)


def test_there_are_three_times_fifty_questions() -> None:
    assert [len(questions) for questions in (PAST, CURRENT, NEXT)] == [50, 50, 50]
    assert len({*PAST, *CURRENT, *NEXT}) == 150


@given(st.integers(0, 100_000))
def test_answers_are_true_of_the_steps(seed: int) -> None:
    messages = converse(STEPS, 200, random.Random(seed))
    assert [message.time for message in messages] == sorted(message.time for message in messages)
    assert messages[0].role == "user"
    for question, answer in itertools.pairwise(messages):
        if question.role != "user":
            continue
        assert (answer.role, answer.time) == ("assistant", question.time)
        named = [step for step in STEPS if step.text in answer.text]
        if question.text in PAST:
            assert all(step.stop <= question.time for step in named)
        elif question.text in CURRENT:
            assert all(step.time <= question.time <= step.stop for step in named)
        else:
            assert all(step.time > question.time for step in named)


def test_a_chat_that_is_too_short_or_out_of_the_video_is_none() -> None:
    row = VideoAnnotation(video_id="v", video="", moments=STEPS[:1], source="s", kind="goalstep")
    assert list(scenes(row, Extent(41, 2, 20), random.Random(0))) == []
    assert list(scenes(row, Extent(3, 2, 1), random.Random(0))) == []


def test_each_copy_of_an_activity_is_another_chat() -> None:
    """Those that begin in the last minute are too short."""
    row = VideoAnnotation(video_id="v", video="", moments=STEPS, source="s", kind="goalstep")
    made = [dialogues_of(row, Extent(401, 2, 200), DataConfig(), "Be brief.", copy=copy) for copy in range(10)]
    conversations = {dialogue.conversation for narration in made for dialogue in narration.dialogues}
    assert len(conversations) == sum(len(narration.dialogues) for narration in made) >= 5
    for conversation in conversations:
        assert any(isinstance(turn, User) for turn in conversation)
        assert any(isinstance(turn, Assistant) and turn.learn for turn in conversation)


def test_activities_and_those_within_them_are_rows(datasets: Path, ego4d: Path) -> None:
    rows = list(read_goalstep(ego4d))
    assert [(row.video_id, row.part, len(row.moments), row.split) for row in rows] == [
        ("v_train_a", "0", 3, "train"),
        ("v_train_a", "1", 2, "train"),
        ("v_val_goal", "0", 1, "validation"),
    ]
    messages = converse(rows[0].moments, extent(datasets, "v_train_a").duration, random.Random(0))
    assert unfit(messages) in (None, "lasts less than 60 s")

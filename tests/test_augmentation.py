"""Mistakes in dialogues: every path of the public reference."""

from __future__ import annotations

import random

import pytest
from golden_files import read_json
from hypothesis import given
from hypothesis import strategies as st

from actors.turns import Assistant, Turn, parse
from jobs.augmentation import augment, mistake
from jobs.scenes import count_frames

GOLDEN = read_json("data/augment.json")
CONVERSATIONS: dict[str, list[Turn]] = {name: parse(turns) for name, turns in GOLDEN["conversations"].items()}
FORCED = [case for case in GOLDEN["forced"] if "fake_content" in case]


def learned(turns: list[Turn]) -> list[int]:
    return [index for index, turn in enumerate(turns) if isinstance(turn, Assistant) and turn.learn]


@pytest.mark.parametrize(
    "case", FORCED, ids=lambda case: f"{case['conversation']}-{case['pick_nth_learned_assistant']}"
)
def test_every_forced_path_matches(case: dict) -> None:
    turns = CONVERSATIONS[case["conversation"]]
    index = learned(turns)[case["pick_nth_learned_assistant"]]
    assert list(mistake(turns, index, case["fake_content"], bool(case["fix_bit"]))) == parse(case["result"])


def test_a_dialogue_with_one_reply_is_left_as_it_is() -> None:
    turns = CONVERSATIONS["one_assistant"]
    assert all(augment(turns, random.Random(seed)) == tuple(turns) for seed in range(20))


@pytest.mark.parametrize("name", sorted(CONVERSATIONS))
def test_draws_reach_every_forced_path_and_no_other(name: str) -> None:
    possible = [parse(case["result"]) for case in FORCED if case["conversation"] == name]
    drawn = [list(augment(CONVERSATIONS[name], random.Random(seed))) for seed in range(400)]
    if possible:
        assert all(turns in possible for turns in drawn)
        assert all(turns in drawn for turns in possible)


@given(st.sampled_from(sorted(CONVERSATIONS)), st.integers(0, 10_000))
def test_a_mistake_changes_no_number_of_frames(name: str, seed: int) -> None:
    turns = CONVERSATIONS[name]
    assert count_frames(augment(turns, random.Random(seed))) == count_frames(turns)

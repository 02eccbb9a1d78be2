"""Requests for chats, the words that come back, and which chats are of use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from golden_data import extent
from golden_files import read_json

from jobs.annotations import Moment
from jobs.goalstep import Activity, read_activities
from jobs.livechat import ChatError, parse_chat, unfit

GOLDEN = read_json("data/livechat_generation.json")

# Finding 6.2: the reference's filter looks for times at the start of a reply only, for "second" in any
# sense, and in the user's words too.
KEPT_HERE_ONLY = {"second_ordinal", "secondary", "user_says_second"}
KEPT_THERE_ONLY = {"10s_in_middle", "1.5s_at_start", "10 s", "10sec"}


@pytest.fixture(scope="module")
def activities(datasets: Path, ego4d: Path) -> list[Activity]:
    videos = {name: extent(datasets, name) for name in ("v_train_a", "v_goal2", "v_val_goal")}
    return list(read_activities(ego4d, videos))


def chat(messages: list[dict]) -> list[Moment]:
    return [Moment(role=m["role"], time=m["time"], text=m["content"]) for m in messages]


def test_prompts_and_reply_times_match(activities: list[Activity]) -> None:
    ours = [{"video_uid": a.video_id, "prompt": a.prompt, "timestamps": list(a.times)} for a in activities]
    assert ours == GOLDEN["annotations"]


@pytest.mark.parametrize("case", GOLDEN["generated"], ids=lambda case: f"annotation{case['index']}")
def test_requests_match(activities: list[Activity], case: dict) -> None:
    for draw, [message] in zip(case["draws"], case["messages"], strict=True):
        questions = re.findall(r"^\S+s User: (.*)$", message["content"], re.MULTILINE)
        assert activities[case["index"]].request(questions, draw["uniform_3"]) == message["content"]


def test_videos_that_are_not_there_have_no_request(ego4d: Path) -> None:
    assert list(read_activities(ego4d, {})) == []


@pytest.mark.parametrize("name", sorted(GOLDEN["parsing"]))
def test_chats_are_read_as_in_the_reference(name: str) -> None:
    case = GOLDEN["parsing"][name]
    if case["saved"] is None:
        with pytest.raises(ChatError, match=r"expected a time before"):
            parse_chat(case["llm_output"])
    else:
        assert parse_chat(case["llm_output"]) == chat(case["saved"]["conversation"])


def test_a_time_before_the_video_is_no_chat() -> None:
    with pytest.raises(ChatError, match="'-5s User: hi'"):
        parse_chat("-5s User: hi")


@pytest.mark.parametrize("name", sorted(GOLDEN["filter"]["cases"]))
def test_chats_that_tell_a_time_are_left_out_wherever_they_tell_it(name: str) -> None:
    kept = unfit(chat(GOLDEN["filter"]["cases"][name]["conversation"])) is None
    there = name in GOLDEN["filter"]["kept"]
    assert kept == (there or name in KEPT_HERE_ONLY) - (name in KEPT_THERE_ONLY)
    assert there or name not in KEPT_THERE_ONLY
    assert not there or name not in KEPT_HERE_ONLY

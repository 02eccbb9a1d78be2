"""Rows and what is written for them: chats about steps and captions, and rewritten narrations."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from actors.turns import Assistant, Stream, User
from jobs.annotations import AnnotationsConfig, DatasetConfig, Moment, VideoAnnotation
from jobs.chat_writing import chat_request, read_chat
from jobs.clock import Extent
from jobs.coverage import Quarantined
from jobs.dialogues import DataConfig
from jobs.goalstep import BLANK
from jobs.questions import CURRENT, NEXT, PAST
from jobs.rewriting import LINES, rewriting_requests, rewritten
from jobs.row_writing import RowWriting, WrittenRow, needs_writing
from jobs.second_person import base_form, second_person
from jobs.tasks import dialogues_of
from jobs.writer import Request, TemplateWriter, Text, UnusableText

STEPS = (
    Moment(time=5, stop=60, text="cut the onion"),
    Moment(time=70, stop=130, text="boil the soup"),
    Moment(time=140, stop=190, text="serve"),
)
VIDEO = Extent(401, 2, 200)
CHATS = {"format": "goalstep", "path": "p", "videos": "v"}
NARRATIONS = {"format": "ego4d_narration", "path": "p", "videos": "v"}


class Scripted:
    """Writes what a function says."""

    name = "scripted"
    batch_size = 8

    def __init__(self, words: Callable[[Request], str | Text]) -> None:
        self.words = words

    def write(self, requests: Sequence[Request]) -> list[Text]:
        made = [self.words(request) for request in requests]
        return [text if isinstance(text, Text) else Text(text) for text in made]


@pytest.fixture(autouse=True)
def the_video(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.row_writing.extent_of", lambda row, fps: VIDEO)


def row(moments: Sequence[Moment] = STEPS, kind: str = "goalstep", dataset: str = "d") -> VideoAnnotation:
    return VideoAnnotation(
        video_id="v", video="v.mp4", moments=tuple(moments), source="s", kind=kind, part="0", dataset=dataset
    )


def writing(settings: dict[str, object], writer: object = None, conversations: int = 1) -> RowWriting:
    annotations = AnnotationsConfig(
        paths=(), datasets={"d": DatasetConfig.model_validate(settings)}, conversations=conversations
    )
    return RowWriting(writer or TemplateWriter(), annotations, fps=2, seed=0)


def test_an_activity_becomes_as_many_chats_as_are_wanted() -> None:
    [made] = writing(CHATS)([row()])
    assert [written.annotation.part for written in made] == [f"0-chat{number}" for number in range(10)]
    good = [written for written in made if not written.quarantined]
    assert len(good) >= 5
    assert {written.quarantined[0].reason for written in made if written.quarantined} <= {"lasts less than 60 s"}
    conversations = set()
    for written in good:
        for dialogue in dialogues_of(written.annotation, VIDEO, DataConfig(), "Be brief.").dialogues:
            assert any(isinstance(turn, User) for turn in dialogue.conversation)
            assert any(isinstance(turn, Assistant) and turn.learn for turn in dialogue.conversation)
            conversations.add(dialogue.conversation)
    assert len(conversations) == len(good)


def test_the_same_chats_are_asked_for_again() -> None:
    def prompts() -> list[str]:
        seen: list[str] = []
        writing(CHATS, Scripted(lambda request: seen.append(request.prompt) or ""))([row()])
        return seen

    assert prompts() == prompts()
    assert len(set(prompts())) == 10


def test_a_request_asks_up_to_three_questions_and_leaves_the_answers_blank() -> None:
    counts = set()
    for seed in range(40):
        request = chat_request("v", STEPS, VIDEO, random.Random(seed))
        asked = [line.split("User: ")[1] for line in request.prompt.splitlines() if "User: " in line]
        assert set(asked) <= {*PAST, *CURRENT, *NEXT}
        assert request.prompt.count(BLANK) >= len(asked)
        assert [m.text for m in read_chat(request.by_rule, STEPS) if m.role == "user"] == asked
        counts.add(len(asked))
    assert counts == {1, 2, 3}


def test_captions_that_only_begin_are_not_asked_about_as_if_they_lasted() -> None:
    told = [moment.model_copy(update={"stop": None}) for moment in STEPS]
    for seed in range(40):
        request = chat_request("v", told, VIDEO, random.Random(seed), captions=True)
        asked = [m.text for m in read_chat(request.by_rule, told) if m.role == "user"]
        assert not set(asked) & set(CURRENT)


def test_a_video_of_ones_own_is_narrated_and_asked_about() -> None:
    [made] = writing(CHATS, conversations=2)([row(kind="narration", dataset="")])
    assert [(written.annotation.kind, written.annotation.part) for written in made] == [
        ("narration", "0"),
        ("caption_chat", "0-chat0"),
        ("caption_chat", "0-chat1"),
    ]
    chats = [dialogues_of(written.annotation, VIDEO, DataConfig(), "Be brief.").dialogues for written in made[1:]]
    turns = [turn for [dialogue] in chats for turn in dialogue.conversation]
    said = [turn.content for turn in turns if isinstance(turn, Assistant)]
    assert any(moment.text in text for moment in STEPS for text in said)
    assert any(isinstance(turn, Stream) and turn.learn for turn in turns)


def test_a_chat_of_ones_own_gets_no_other_beside_it() -> None:
    [made] = writing(CHATS, conversations=2)([row(kind="chat", dataset="")])
    assert [written.annotation.kind for written in made] == ["chat"]


def test_a_chat_about_captions_tells_no_time_but_those_they_name() -> None:
    captions = [Moment(time=3, text="Boil it for 90 seconds."), Moment(time=5, text="Stir.")]
    asked = "2.0s User: What now?\n2.0s Assistant: "
    assert len(read_chat(asked + "Boil it for 90 Seconds.", captions)) == 2
    with pytest.raises(UnusableText, match="tells a time"):
        read_chat(asked + "At 5.0s you stir.", captions)


def test_an_activity_beyond_the_video_stays_what_it_is() -> None:
    late = [Moment(time=500, stop=600, text="serve")]
    [[written]] = writing(CHATS)([row(late)])
    assert written.annotation.kind == "goalstep"
    made = dialogues_of(written.annotation, VIDEO, DataConfig(), "Be brief.")
    assert made.dialogues == []
    assert made.dropped.total() == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("Sure! Here is the conversation.", "no line is a message"),
        ("", "no line is a message"),
        ("User: What now?\nAssistant: Cut.", "a line has no time"),
        ("2s Assistant: Cut.\n90s Assistant: Boil.", "does not begin with a question"),
        ("2s User: What now?\n90s User: And then?", "nothing is answered"),
        ("2s User: What now?\n2s Assistant: ...\n90s Assistant: Boil.", "a blank was left"),
        ("2s User: What now?\n2s Assistant: Cut.\n40s Assistant: Boil.", "lasts less than 60 s"),
        ("2s User: What now?\n2s Assistant: Cut.\n4000s Assistant: Boil.", "lasts more than 3600 s"),
        ("2s User: What now?\n2s Assistant: Cut until 12.5s.\n90s Assistant: Boil.", "tells a time"),
        (Text("2s User: What", "unfinished at the longest length"), "unfinished at the longest length"),
    ],
)
def test_a_chat_of_no_use_is_quarantined_with_its_words_and_the_reason(words: str | Text, reason: str) -> None:
    [made] = writing(CHATS | {"conversations": 1}, Scripted(lambda request: words))([row()])
    [written] = made
    [bad] = written.quarantined
    assert (bad.reason, bad.text, bad.video_id) == (reason, words.words if isinstance(words, Text) else words, "v")
    assert "cut the onion" in bad.prompt
    assert written.annotation.moments == ()


def test_narrations_are_rewritten_a_few_at_a_time_and_those_that_fail_are_counted() -> None:
    moments = [Moment(time=number, text=f"C picks up {number} knives.") for number in range(2 * LINES + 3)]

    def words(request: Request) -> str:
        return "I cannot." if f"picks up {LINES} " in request.prompt else request.by_rule

    [[written]] = writing(NARRATIONS | {"rewrite": True}, Scripted(words))([row(moments, "ego4d_narration")])
    texts = [moment.text for moment in written.annotation.moments]
    assert texts == [f"You pick up {n} knives." for n in range(2 * LINES + 3) if not LINES <= n < 2 * LINES]
    assert written.dropped == {"not rewritten": LINES}
    assert [bad.reason for bad in written.quarantined] == ["other lines than were asked for"]
    assert written.annotation.kind == "ego4d_refined_narration"
    assert isinstance(written.quarantined[0], Quarantined)


def test_lines_keep_their_times_and_must_all_come_back() -> None:
    moments = [Moment(time=2, text="C cuts."), Moment(time=3, text="C waits.")]
    [(part, request)] = rewriting_requests(moments)
    assert request.by_rule == "1. You cut.\n2. You wait."
    assert rewritten(part, "Here you are:\n1. You cut  it.\n 2) You wait.") == [
        Moment(time=2, text="You cut it."),
        Moment(time=3, text="You wait."),
    ]
    for words in ("1. You cut.", "1. You cut.\n1. You wait.", "2. You wait.\n1. You cut.", "1. a\n2. b\n3. c"):
        with pytest.raises(UnusableText, match="other lines than were asked for"):
            rewritten(part, words)
    with pytest.raises(UnusableText, match="still speaks of C"):
        rewritten(part, "1. C cuts.\n2. You wait.")


@pytest.mark.parametrize(
    ("told", "to_you"),
    [
        ("C picks up a knife.", "You pick up a knife."),
        ("C washes his hands and dries them.", "You wash your hands and dry them."),
        ("C moves knives and forks.", "You move knives and forks."),
        ("C is in C's kitchen.", "You are in your kitchen."),
        ("C passes the ball to X.", "You pass the ball to X."),
        ("Man X talks to C.", "Man X talks to you."),
        ("C.", "you."),
    ],
)
def test_sentences_about_c_are_told_to_you(told: str, to_you: str) -> None:
    assert second_person(told) == to_you


@pytest.mark.parametrize(
    ("verb", "base"),
    [("has", "have"), ("carries", "carry"), ("ties", "tie"), ("fixes", "fix"), ("presses", "press"), ("uses", "use")],
)
def test_verbs_lose_the_ending_of_the_third_person(verb: str, base: str) -> None:
    assert base_form(verb) == base


def test_only_what_is_written_about_waits_for_a_writer() -> None:
    datasets = {
        "chats": CHATS,
        "told": NARRATIONS,
        "refined": NARRATIONS | {"rewrite": True},
        "captions": {"format": "captions", "path": "p", "videos": "v"},
    }
    wanted = {}
    for conversations in (0, 1):
        settings = AnnotationsConfig.model_validate({"datasets": datasets, "conversations": conversations})
        wanted[conversations] = {name for name in (*datasets, "") if needs_writing(settings, name)}
    assert wanted == {0: {"chats", "refined"}, 1: {"chats", "refined", "captions", ""}}


def test_rows_travel_as_json() -> None:
    [made] = writing(CHATS)([row()])
    for written in made:
        assert WrittenRow.model_validate_json(written.model_dump_json()) == written


def test_rewriting_is_for_narrations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format goalstep has nothing to rewrite: ego4d_narration and"):
        DatasetConfig.model_validate(CHATS | {"rewrite": True})

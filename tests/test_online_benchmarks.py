"""StreamingBench and OVO-Bench on small files in their published form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.turns import Stream, User
from jobs.grader import Heard
from jobs.online_benchmarks import (
    CHOICE,
    Asked,
    OnlineBenchmarkError,
    Probed,
    read_ovobench,
    read_streamingbench,
    score,
    streams_of,
)
from jobs.replay import Utterance
from jobs.streams import play_of

FRAMES = {"sample_1_real": 60, "sample_1_proactive": 60, "105": 40}
CHOSEN = {
    "task_type": "Object Perception",
    "question": "What is on the table?",
    "time_stamp": "00:00:10",
    "answer": "B",
    "options": ["A. A cat.", "B. A cup.", "C. A hat.", "D. A dog."],
    "required_ability": "working memory",
}
STREAMINGBENCH = [
    {"time": "[0:00:00 - 0:01:00]", "video_path": "./videos/sample_1_real.mp4", "questions": [CHOSEN]},
    [
        {
            "time": "[0:00:00 - 0:01:00]",
            "video_path": "./videos/sample_1_real.mp4",
            "questions": [
                CHOSEN
                | {"task_type": "Sequential Question Answering", "time_stamp": "00:00:12", "options": ["Red.", "Blue."]}
            ],
        }
    ],
    {
        "video_path": "./videos/sample_1_proactive.mp4",
        "questions": [
            {
                "task_type": "Proactive Output",
                "question": 'When the bell rings, output "DING".',
                "time_stamp": "00:00:04",
                "ground_truth_time_stamp": "00:00:11",
                "ground_truth_output": "DING",
            }
        ],
    },
]
OVOBENCH = [
    {
        "id": 1,
        "task": "EPM",
        "video": "src/105.mp4",
        "question": "Where was the pan?",
        "options": ["Here", "There"],
        "gt": 1,
        "realtime": 8.4,
    },
    {
        "id": 2,
        "task": "REC",
        "video": "src/105.mp4",
        "activity": "jump",
        "test_info": [{"realtime": 5.0, "count": 1}, {"realtime": 9.0, "count": 12}],
    },
    {
        "id": 3,
        "task": "SSR",
        "video": "src/105.mp4",
        "tutorial": "tea",
        "test_info": [{"realtime": 3.0, "type": 0, "step": "Boil water."}],
    },
    {
        "id": 4,
        "task": "CRR",
        "video": "src/105.mp4",
        "question": "Who came?",
        "answer": "Tom",
        "ask_time": 2,
        "clue_time": 6,
        "test_info": [{"realtime": 7.0, "type": 1}],
    },
]


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def heard(*said: Utterance) -> Heard:
    return Heard(0.5, list(said), [], [], [], 0, 0, [])


def answers(stream: Probed, *texts: str) -> Heard:
    """Answers to the questions of a stream, when they are asked."""
    questions = play_of(stream.dialogue).questions
    return heard(*(Utterance(q.time, text, q.text) for q, text in zip(questions, texts, strict=True)))


@pytest.fixture
def streaming(tmp_path: Path) -> list[Asked]:
    return read_streamingbench(write(tmp_path / "questions_real.json", STREAMINGBENCH))


@pytest.fixture
def ovo(tmp_path: Path) -> list[Asked]:
    return read_ovobench(write(tmp_path / "ovo_bench_new.json", OVOBENCH))


def test_streamingbench_is_read_in_all_its_forms(streaming: list[Asked]) -> None:
    assert [(one.time, one.answer, one.due_s) for one in streaming] == [
        (10, "B", None),
        (12, "B", None),
        (4, "DING", 11),
    ]
    assert streaming[0].text == f"What is on the table?\nA. A cat.\nB. A cup.\nC. A hat.\nD. A dog.\n{CHOICE}"
    assert "\nA. Red.\nB. Blue.\n" in streaming[1].text


def test_ovobench_is_read_in_all_its_forms(ovo: list[Asked]) -> None:
    assert [(one.task, one.time, one.answer) for one in ovo] == [
        ("EPM", 8.4, "B"),
        ("REC", 5.0, "1"),
        ("REC", 9.0, "12"),
        ("SSR", 3.0, "No"),
        ("CRR", 7.0, "Yes"),
    ]
    assert "jump" in ovo[1].text
    assert "Boil water." in ovo[3].text


def test_questions_about_one_video_are_asked_in_one_stream(ovo: list[Asked]) -> None:
    (stream,) = streams_of(ovo, FRAMES, 2, "s.", polled=False)
    assert [one.time for one in stream.asked] == [3, 5, 7, 8.4, 9]
    assert [question.time for question in play_of(stream.dialogue).questions] == [3, 5, 7, 8, 9]
    assert stream.dialogue.frames == (0, 19)


def test_polled_each_has_a_stream_of_its_own(ovo: list[Asked]) -> None:
    streams = streams_of(ovo, FRAMES, 2, "s.", polled=True)
    assert [stream.dialogue.num_frames for stream in streams] == [17, 11, 19, 7, 15]
    assert all(len(stream.asked) == 1 for stream in streams)
    assert len({stream.dialogue.dialogue_id for stream in streams}) == 5


def test_what_is_to_come_is_waited_for(streaming: list[Asked]) -> None:
    stream = streams_of(streaming[2:], FRAMES, 2, "s.", polled=False)[0]
    kinds = [turn.num_frames if isinstance(turn, Stream) else turn.content for turn in stream.dialogue.conversation[1:]]
    assert kinds == [9, 'When the bell rings, output "DING".', 22]


def test_a_video_without_frames_is_left_out_and_a_short_one_ends_earlier(ovo: list[Asked]) -> None:
    assert streams_of(ovo, {}, 2, "s.", polled=False) == []
    (stream,) = streams_of(ovo, {"105": 8}, 2, "s.", polled=False)
    assert stream.dialogue.num_frames == 8
    assert sum(isinstance(turn, User) for turn in stream.dialogue.conversation) == 5


def test_ovobench_is_scored_as_published(ovo: list[Asked]) -> None:
    streams = streams_of(ovo, FRAMES, 2, "s.", polled=False)
    scores = score(streams, [answers(streams[0], "No.", "1 time", "No", "B. There", "1 and 3")])["ovobench"]
    assert scores == {
        "CRR": 0,
        "EPM": 100,
        "REC": 50,
        "SSR": 100,
        "forward responding": 50,
        "backward tracing": 100,
        "all": 62.5,
    }


def test_streamingbench_is_scored_as_published(streaming: list[Asked]) -> None:
    both, proactive = streams_of(streaming, FRAMES, 2, "s.", polled=False)
    said = [
        answers(both, "B", "A. Red."),
        heard(Utterance(4, "Yes.", "q"), Utterance(12.5, "DING"), Utterance(30, "x")),
    ]
    scores = score([both, proactive], said)["streamingbench"]
    assert scores == {
        "Object Perception": 100,
        "Proactive Output": 100,
        "Sequential Question Answering": 0,
        "all": pytest.approx(200 / 3),
    }


@pytest.mark.parametrize("said", [(), (Utterance(13.5, "DING"),), (Utterance(11, "Dong"),), (Utterance(6, "DING"),)])
def test_late_early_wrong_or_nothing_is_not_right(streaming: list[Asked], said: tuple[Utterance, ...]) -> None:
    (stream,) = streams_of(streaming[2:], FRAMES, 2, "s.", polled=False)
    assert score([stream], [heard(*said)])["streamingbench"]["Proactive Output"] == 0


def test_a_question_without_an_answer_is_wrong(ovo: list[Asked]) -> None:
    (stream,) = streams_of(ovo, FRAMES, 2, "s.", polled=False)
    assert score([stream], [heard()])["ovobench"]["all"] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, "expected the benchmark's own file"),
        ([{"task": "XYZ", "video": "v.mp4"}], "task 'XYZ': expected one of EPM"),
        ([{"task": "EPM", "video": "v.mp4"}], "with question, options, gt and realtime"),
    ],
)
def test_another_file_is_refused(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(OnlineBenchmarkError, match=message):
        read_ovobench(write(tmp_path / "f.json", content))
    with pytest.raises(OnlineBenchmarkError, match="cannot be read"):
        read_streamingbench(tmp_path / "gone.json")

"""Events beside a video, graded in the streams that show it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.turns import Stream, System
from jobs.dialogues import Dialogue
from jobs.event_metrics import EventScores, EventsError
from jobs.graded_events import events_of, grade_events
from jobs.grader import Decided, Heard
from jobs.replay import Utterance
from jobs.stream_groups import GradedStream
from jobs.streams import play_of


def stream(video: Path | str, said: list[Utterance], frames: tuple[int, int] = (20, 40)) -> GradedStream:
    """Seconds 10 to 20 of the video, unless other frames of 2 fps are given."""
    dialogue = Dialogue(
        dialogue_id="d",
        task="narration",
        video_id="v",
        video=str(video),
        fps=2,
        frames=frames,
        conversation=(System(content="s."), Stream(num_frames=frames[1] - frames[0])),
    )
    heard = Heard(0.5, said, [0.9] * 20, [], [], 0, 0, [])
    return GradedStream(play_of(dialogue), heard, Decided({"strict": [], "paper": []}, [0.0] * 20))


@pytest.fixture
def video(tmp_path: Path) -> Path:
    events = [{"time": 9.9, "words": ["dog"]}, {"time": 12, "words": ["cat"]}, {"time": 18, "words": ["bird"]}]
    (tmp_path / "v.events.json").write_text(json.dumps(events))
    return tmp_path / "v.mp4"


def test_a_stream_has_the_events_of_its_frames_in_its_own_time(video: Path) -> None:
    found = events_of(stream(video, []))
    assert found is not None
    assert [(event.time, event.words) for event in found] == [(2, ("cat",)), (8, ("bird",))]


def test_what_was_said_is_graded_by_time_and_words(video: Path) -> None:
    said = [Utterance(2.5, "A cat."), Utterance(6, "A dog.", question="What is it?"), Utterance(8, "A dog.")]
    graded = grade_events([stream(video, said), stream("", said), stream(video, [], (40, 60))])
    assert graded is not None
    assert graded.num_streams == 2
    assert graded.scores == EventScores(events=2, responses=2, right=1, timed=2)


def test_videos_without_events_are_not_graded(tmp_path: Path) -> None:
    assert grade_events([stream(tmp_path / "v.mp4", []), stream("", [])]) is None


def test_a_file_of_something_else_is_refused(video: Path) -> None:
    video.with_suffix(".events.json").write_text("{}")
    with pytest.raises(EventsError, match=r"v\.events\.json: expected"):
        grade_events([stream(video, [])])

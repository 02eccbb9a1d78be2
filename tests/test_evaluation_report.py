"""What a reader of an evaluation sees beside each other."""

from __future__ import annotations

from actors.turns import Assistant, Stream, System, User
from jobs.dialogues import Dialogue
from jobs.evaluation_report import side_by_side
from jobs.grader import Decided, Heard
from jobs.replay import Utterance
from jobs.stream_groups import GradedStream
from jobs.streams import play_of
from jobs.timing_metrics import Window


def test_examples_show_questions_answers_and_what_belongs_together() -> None:
    dialogue = Dialogue(
        dialogue_id="d",
        task="made",
        video_id="v",
        video="v",
        fps=2,
        frames=(0, 40),
        conversation=[
            System(content="You help."),
            Stream(num_frames=1),
            User(content="Tell me when a dog comes."),
            Assistant(content="I will."),
            Stream(num_frames=9),
            Assistant(content="A dog."),
            Stream(num_frames=20),
            Assistant(content="A cat."),
            Stream(num_frames=10),
        ],
        labels=[],
    )
    said = [Utterance(0, "All right.", "Tell me when a dog comes."), Utterance(5, "A wolf."), Utterance(10, "A bird.")]
    heard = Heard(0.5, said, [1.0] * 40, [10, 20], [0], suppressed=0, evictions=0, refused=[])
    stream = GradedStream(play_of(dialogue), heard, Decided({}, []))
    rows = [tuple(m and (m.time, m.text) for m in row) for row in side_by_side(stream, Window(1, 3))]
    assert rows == [
        ((0, "*user:* Tell me when a dog comes."), (0, "*answer:* All right.")),
        ((4.5, "A dog."), (5, "A wolf.")),
        ((14.5, "A cat."), None),
        (None, (10, "A bird.")),
    ]

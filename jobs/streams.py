"""Dialogues as streams: the user's turns at their times, and what the model should say of its own accord."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from actors.messages import SessionSettings
from actors.turns import Assistant, Stream, System, User
from jobs.annotations import Moment
from jobs.dialogues import Dialogue
from jobs.replay import FrameChunk, Question, Recording

CHUNK_FRAMES = 32


@dataclass(frozen=True)
class Played:
    """A dialogue's stream: time 0 is its first frame, `labels` is what should be said unasked, in order of time."""

    dialogue: Dialogue
    questions: list[Question]
    labels: list[Moment]

    @property
    def times(self) -> list[float]:
        return [index / self.dialogue.fps for index in range(self.dialogue.num_frames)]

    @property
    def duration_s(self) -> float:
        return self.dialogue.num_frames / self.dialogue.fps


def play_of(dialogue: Dialogue) -> Played:
    """The turns of a dialogue at their times.

    An answer to the user comes when the user asks: only what the assistant says of its own accord is a label.
    """
    shown = 0
    questions: list[Question] = []
    labels: list[Moment] = []
    turns = [turn for turn in dialogue.conversation if not isinstance(turn, Stream) or turn.num_frames]
    for before, turn in pairwise([System(content=""), *turns]):
        time = max(shown - 1, 0) / dialogue.fps
        match turn:
            case Stream():
                shown += turn.num_frames
            case User():
                questions.append(Question(turn.content, time, opening=shown == 0))
            case Assistant() if not isinstance(before, User):
                labels.append(Moment(time=time, text=turn.content))
    return Played(dialogue, questions, labels)


def recording_of(dialogue: Dialogue, tokens: torch.Tensor, settings: SessionSettings, name: str) -> Recording:
    """What to replay, with the tokens (F, N, D) of the dialogue's frames.

    The dialogue's system prompt is the session's, unless the settings have instructions of their own.
    """
    first = dialogue.conversation[0] if dialogue.conversation else None
    if isinstance(first, System) and settings.instructions is None:
        settings = settings.model_copy(update={"instructions": first.content})
    played = play_of(dialogue)
    return Recording(name, _chunks(played.times, tokens), played.questions, settings)


def _chunks(times: Sequence[float], tokens: torch.Tensor) -> list[FrameChunk]:
    starts = range(0, len(times), CHUNK_FRAMES)
    return [FrameChunk(times[i : i + CHUNK_FRAMES], tokens[i : i + CHUNK_FRAMES]) for i in starts]

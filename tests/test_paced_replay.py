"""jobs.paced_replay: a stream that goes on while the model computes, on a clock of the test's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
import torch

from actors import checkpoint
from actors.batched import BatchedEngine
from actors.checkpoint import Loaded
from actors.config import ModelConfig
from actors.engine import EngineConfig
from actors.messages import SessionSettings
from actors.session import Decision, Session
from jobs.paced_replay import replay_paced
from jobs.replay import FrameChunk, Question, Recording, Utterance, replay

LENGTH = 3


class Talker(BatchedEngine):
    """Speaks at the frames of `speaks`, counted as they are decided, LENGTH tokens each."""

    def __init__(self, loaded: Loaded, speaks: set[int]) -> None:
        super().__init__(loaded.model, loaded.template, EngineConfig(kv_memory_gb=0.05, speculate=1))
        self.speaks = speaks
        self.seen = count()

    def decide(self, logits: torch.Tensor) -> list[Decision]:
        return [Decision(*((0.1, False) if next(self.seen) in self.speaks else (0.9, True))) for _ in logits]

    def choose(self, session: Session, logits: torch.Tensor) -> int:
        said = len(session.response.ids) if session.response else 0
        return 40 + said if said < LENGTH else self.template.eos_id


@pytest.fixture(scope="module")
def loaded(tiny_configs: dict[str, ModelConfig]) -> Loaded:
    return checkpoint.load(tiny_configs["live1plus"])


def recording(loaded: Loaded, num_frames: int, *questions: Question) -> Recording:
    tokens = torch.randn(num_frames, *loaded.model.frame_shape, generator=torch.Generator().manual_seed(0)).half()
    chunk = FrameChunk([index / 2 for index in range(num_frames)], tokens)
    return Recording("a", [chunk], questions, SessionSettings(max_response_tokens=8))


def every_step_takes(seconds: float) -> Callable[[], float]:
    """A clock that is read before and after each step."""
    readings = count()
    return lambda: next(readings) * seconds


def test_a_model_that_takes_no_time_says_the_same_at_the_same_times(loaded: Loaded) -> None:
    asked = recording(loaded, 12, Question("Narrate."), Question("Now?", 2.2))
    (plain,) = replay(Talker(loaded, {6, 9}), [asked])
    paced = replay_paced(Talker(loaded, {6, 9}), asked, credits=4, clock=every_step_takes(0))
    assert paced.transcript.turns == plain.turns
    assert paced.said == plain.utterances
    assert paced.lags_s == [0] * 12
    assert paced.dropped == []


def test_what_is_said_is_heard_when_its_first_words_are_there(loaded: Loaded) -> None:
    engine = Talker(loaded, {4})
    paced = replay_paced(engine, recording(loaded, 8), credits=8, clock=every_step_takes(0.125))
    text = loaded.template.decode([40, 41, 42]).strip()
    # Decided an eighth of a second after its frame at 2 s, the first token another eighth later.
    assert paced.said == [Utterance(2.25, text)]
    assert paced.transcript.utterances == [Utterance(2.0, text)]
    assert engine.sessions == {}


def test_frames_wait_while_it_speaks_and_are_caught_up_with(loaded: Loaded) -> None:
    paced = replay_paced(Talker(loaded, {2}), recording(loaded, 12), credits=8, clock=every_step_takes(0.25))
    assert paced.lags_s[:3] == [0.25] * 3
    # Deciding and four tokens end at 2.25 s: the frames of 1.5 and 2 s were there.
    assert paced.lags_s[3:6] == [1.0, 0.75, 0.5]
    assert paced.lags_s[-1] == 0.25
    assert len(paced.lags_s) == 12


def test_a_model_that_is_too_slow_loses_frames_the_newest_stays(loaded: Loaded) -> None:
    paced = replay_paced(Talker(loaded, set()), recording(loaded, 20), credits=1, clock=every_step_takes(1.1))
    decided = paced.transcript.times
    assert paced.dropped
    assert sorted([*decided, *paced.dropped]) == [index / 2 for index in range(20)]
    assert decided == sorted(decided)
    assert decided[-1] == 9.5
    assert max(paced.lags_s) < 3.4


def test_without_a_frame_it_ends(loaded: Loaded) -> None:
    paced = replay_paced(Talker(loaded, set()), Recording("a", []), credits=1)
    assert (paced.said, paced.lags_s, paced.transcript.ended) == ([], [], True)

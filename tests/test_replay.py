"""jobs.replay: recorded frames through the session and engine that serve."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from actors import checkpoint
from actors.backends import build_engine, load_model
from actors.batched import BatchedEngine
from actors.checkpoint import Loaded
from actors.config import Config, ConfigError, ModelConfig
from actors.engine import Engine, EngineConfig
from actors.messages import SessionSettings
from actors.session import Decision, Session
from jobs.replay import FrameChunk, Question, Recording, Transcript, Utterance, replay


@pytest.fixture(scope="module")
def loaded(tiny_configs: dict[str, ModelConfig]) -> Loaded:
    return checkpoint.load(tiny_configs["live1plus"])


@pytest.fixture(scope="module")
def engine(loaded: Loaded) -> Engine:
    """The batched engine on the tiny model."""
    return build_engine(loaded.model, loaded.template, EngineConfig(kv_memory_gb=0.05))


class Talker(BatchedEngine):
    """Speaks at every fifth frame (frames hold their number) and says as many tokens as `length`."""

    length = 3

    def decide(self, logits: torch.Tensor) -> list[Decision]:
        raise NotImplementedError  # replaced per test: the logits don't tell which frame it is

    def choose(self, session: Session, logits: torch.Tensor) -> int:
        said = len(session.response.ids) if session.response else 0
        return 40 + said if said < self.length else self.template.eos_id


def chunks(loaded: Loaded, num_frames: int, size: int = 5, fps: float = 2.0, seed: int = 0) -> list[FrameChunk]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(num_frames, *loaded.model.frame_shape, generator=generator).half()
    times = [index / fps for index in range(num_frames)]
    return [FrameChunk(times[i : i + size], tokens[i : i + size]) for i in range(0, num_frames, size)]


def one(engine: Engine, recording: Recording) -> Transcript:
    (transcript,) = replay(engine, [recording])
    return transcript


SHORT = SessionSettings(max_response_tokens=4)


def test_every_frame_is_decided_once_and_the_session_is_closed(loaded: Loaded, engine: Engine) -> None:
    transcript = one(engine, Recording("a", chunks(loaded, 23), settings=SHORT))
    assert transcript.times == [index / 2 for index in range(23)]
    assert len(transcript.p_silent) == 23
    assert all(0 <= p <= 1 for p in transcript.p_silent)
    assert transcript.ended
    assert engine.sessions == {}


def test_questions_are_asked_at_their_frames_in_order_of_time(loaded: Loaded, engine: Engine) -> None:
    asked = [Question("What now?", 3.2), Question("Narrate."), Question("And the end?", 99.0)]
    transcript = one(engine, Recording("a", chunks(loaded, 12), asked, SHORT))
    assert transcript.questions == [
        Question("Narrate.", 0.0),
        Question("What now?", 3.5),
        Question("And the end?", 5.5),
    ]
    answers = [turn for turn in transcript.utterances if turn.question is not None]
    assert {answer.question for answer in answers} <= {"Narrate.", "What now?", "And the end?"}


def test_an_opening_is_said_and_answered_before_the_first_frame(loaded: Loaded) -> None:
    engine = Talker(loaded.model, loaded.template, EngineConfig(kv_memory_gb=0.05))
    engine.decide = lambda logits: [Decision(1.0, True)] * len(logits)  # type: ignore[method-assign]
    opening = Question("Narrate.", opening=True)
    transcript = one(engine, Recording("a", chunks(loaded, 8), [Question("Now?"), opening]))
    text = loaded.template.decode([40, 41, 42]).strip()
    assert transcript.turns == [
        opening,
        Utterance(0.0, text, "Narrate."),
        Question("Now?", 0.0),
        Utterance(0.0, text, "Now?"),
    ]
    assert transcript.asked == [-1, 0]
    assert len(transcript.times) == 8


def test_an_answer_follows_its_question_in_the_transcript(loaded: Loaded) -> None:
    engine = Talker(loaded.model, loaded.template, EngineConfig(kv_memory_gb=0.05))
    engine.decide = lambda logits: [Decision(1.0, True)] * len(logits)  # type: ignore[method-assign]
    transcript = one(engine, Recording("a", chunks(loaded, 8), [Question("Narrate."), Question("Now?", 2.0)]))
    text = loaded.template.decode([40, 41, 42]).strip()
    assert transcript.turns == [
        Question("Narrate.", 0.0),
        Utterance(0.0, text, "Narrate."),
        Question("Now?", 2.0),
        Utterance(2.0, text, "Now?"),
    ]


def test_what_is_said_of_its_own_accord_has_no_question(loaded: Loaded) -> None:
    engine = Talker(loaded.model, loaded.template, EngineConfig(kv_memory_gb=0.05, speculate=1))
    seen = iter(range(100))
    engine.decide = lambda logits: [  # type: ignore[method-assign]
        Decision(*((0.1, False) if next(seen) % 5 == 4 else (0.9, True))) for _ in logits
    ]
    transcript = one(engine, Recording("a", chunks(loaded, 12)))
    assert [(turn.time, turn.question) for turn in transcript.utterances] == [(2.0, None), (4.5, None)]


def test_silence_and_cut_answers_are_told_apart(loaded: Loaded) -> None:
    engine = Talker(loaded.model, loaded.template, EngineConfig(kv_memory_gb=0.05))
    engine.decide = lambda logits: [Decision(1.0, True)] * len(logits)  # type: ignore[method-assign]
    recording = Recording("a", chunks(loaded, 3), [Question("?")], SessionSettings(max_response_tokens=2))
    assert [turn.complete for turn in one(engine, recording).utterances] == [False]
    engine.length = 0
    transcript = one(engine, recording)
    assert (transcript.utterances, transcript.suppressed) == ([], 1)


def test_streams_that_share_an_engine_say_what_they_say_alone(loaded: Loaded, engine: Engine) -> None:
    recordings = [
        Recording(str(seed), chunks(loaded, 9 + seed, seed=seed), [Question("Narrate.")], SHORT) for seed in range(5)
    ]
    alone = {transcript.name: transcript for transcript in replay(engine, recordings)}
    shared = {transcript.name: transcript for transcript in replay(engine, recordings, at_once=3)}
    assert alone.keys() == shared.keys()
    for name, transcript in alone.items():
        assert shared[name].turns == transcript.turns
        assert shared[name].p_silent == pytest.approx(transcript.p_silent, abs=1e-4)


def test_frames_are_taken_when_they_are_needed(loaded: Loaded, engine: Engine) -> None:
    taken = 0

    def source() -> Iterator[FrameChunk]:
        nonlocal taken
        for chunk in chunks(loaded, 100):
            taken += len(chunk.times)
            yield chunk

    most_ahead = 0

    def decided(transcript: Transcript) -> None:
        nonlocal most_ahead
        most_ahead = max(most_ahead, taken - len(transcript.times))

    (transcript,) = replay(engine, [Recording("a", source(), settings=SHORT)], decided=decided)
    assert len(transcript.times) == taken == 100
    assert most_ahead < 40


def test_an_error_of_a_source_is_raised_and_leaves_no_session(loaded: Loaded, engine: Engine) -> None:
    def source() -> Iterator[FrameChunk]:
        yield from chunks(loaded, 5)
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        one(engine, Recording("a", source(), settings=SHORT))
    assert engine.sessions == {}


def test_a_stream_without_a_frame_ends(loaded: Loaded, engine: Engine) -> None:
    transcript = one(engine, Recording("a", [], settings=SHORT))
    assert (transcript.times, transcript.turns, transcript.ended) == ([], [], True)


def test_a_question_too_long_for_the_window_is_refused_with_the_reason(loaded: Loaded) -> None:
    engine = build_engine(loaded.model, loaded.template, EngineConfig(kv_memory_gb=0.05, max_positions=800))
    asked = [Question("why " * 800, 1.0)]
    transcript = one(engine, Recording("a", chunks(loaded, 5), asked, SHORT))
    assert len(transcript.times) == 5
    (reason,) = transcript.refused
    assert "ask a shorter question" in reason


def test_a_model_without_training_must_be_allowed_by_name(tiny_configs: dict[str, ModelConfig]) -> None:
    model = tiny_configs["live1plus"].model_copy(update={"checkpoint": None}).model_dump()
    with pytest.raises(ConfigError, match=r"checkpoint is not set: .* engine\.untrained"):
        load_model(Config({"model": model}))
    loaded = load_model(Config({"model": model, "engine": {"untrained": True}}))
    assert loaded.config.checkpoint is None

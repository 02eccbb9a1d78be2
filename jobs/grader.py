"""One process that grades: a checkpoint, the frame tokens, and what the model makes of single dialogues.

`jobs.evaluate` has one Grader, or many as actors of a Ray cluster. What a Grader gives is data that JSON can
say, so that it can be kept; adding up and comparing are for `jobs.evaluate`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from actors.backends import build_engine, load_model
from actors.checkpoint import Loaded
from actors.config import Config, Section
from actors.engine import Engine, EngineConfig
from actors.messages import SessionSettings
from actors.runtime import limit_threads
from jobs.controls import frame_changes
from jobs.dataset import TrainingSet
from jobs.dialogues import Dialogue
from jobs.encode_frames import StoreConfig
from jobs.frame_store import FrameStore
from jobs.generation import Generation, generate
from jobs.metrics import Forward, Mode, Reply, evaluate, forward_of
from jobs.paced_replay import replay_paced
from jobs.replay import Transcript, Utterance, replay
from jobs.streams import recording_of

logger = logging.getLogger(__name__)

MODES: tuple[Mode, ...] = ("strict", "paper")


@dataclass(frozen=True)
class Identity:
    """What is graded: the model, the encoder of its frame tokens, and what its checkpoint says of itself."""

    fingerprint: str
    features: str
    fps: float
    trained_videos: list[str] = field(repr=False)
    threshold: float | None
    calibrated_on: str | None


class Deciding(Section):
    """How a session turns what the model thinks of a frame into a decision."""

    threshold: float
    decide_by: Literal["argmax", "threshold"]

    def by_argmax(self, mode: Mode) -> bool:
        """Published numbers always count so; `strict` ones tell what would be served."""
        return mode == "paper" or self.decide_by == "argmax"


@dataclass(frozen=True)
class Decided:
    """Every reply of a dialogue with the labelled past, by mode; and how far each frame is from the one before."""

    replies: dict[Mode, list[Reply]]
    changes: list[float]


@dataclass(frozen=True)
class Heard:
    """What the model said in a dialogue's stream, hearing itself, and P(silent) of every frame.

    `spoke` are frames at which it spoke of its own accord, `asked` those at which the user had spoken.
    """

    threshold: float
    said: list[Utterance]
    p_silent: list[float]
    spoke: list[int]
    asked: list[int]
    suppressed: int
    evictions: int
    refused: list[str]

    @classmethod
    def of(cls, transcript: Transcript, threshold: float) -> Heard:
        return cls(
            threshold,
            transcript.utterances,
            transcript.p_silent,
            transcript.spoke,
            transcript.asked,
            transcript.suppressed,
            transcript.evictions,
            transcript.refused,
        )


class Pace(Section):
    """How a stream goes on while the model computes: as many frames as `credits` wait undecided."""

    settings: SessionSettings
    credits: int = Field(ge=1)


@dataclass(frozen=True)
class Live:
    """What was heard at the stream's pace on this machine, each with the time its first words were there.

    `lags_s` of every decided frame; `dropped` counts frames that found no room.
    """

    said: list[Utterance]
    lags_s: list[float]
    dropped: int


class Grader:
    """Grades dialogues with the checkpoint of `config`. Nothing is loaded before it is needed.

    Raises what loading a checkpoint and opening a store raise, and DatasetError where dialogues and store
    do not fit.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._loaded: Loaded | None = None

    def identity(self) -> Identity:
        """What is graded here."""
        loaded = self._load()
        chosen = loaded.calibration
        return Identity(
            loaded.fingerprint,
            loaded.features,
            self.store.info.fps,
            loaded.trained_videos,
            loaded.threshold,
            None if chosen is None else f"{chosen.num_dialogues} dialogues of {chosen.data}",
        )

    def there(self, dialogues: Sequence[Dialogue]) -> list[int]:
        """Indices of the dialogues whose frame tokens are in the store, all of them checked."""
        self._load()
        kept = {id(dialogue) for dialogue in TrainingSet(dialogues, self.store, self.loaded.template).dialogues}
        return [index for index, dialogue in enumerate(dialogues) if id(dialogue) in kept]

    def decide(self, dialogues: Sequence[Dialogue], deciding: Deciding) -> list[Decided]:
        """Teacher-forced: the graded replies of each dialogue."""
        self._load()
        with self._plain_attention():
            return [self._decide(dialogue, deciding) for dialogue in dialogues]

    def play(self, dialogues: Sequence[Dialogue], settings: SessionSettings) -> list[Heard]:
        """Self-conditioned: each dialogue's stream through the session and the engine that serve, all at once."""
        self._load()
        recordings = [
            recording_of(dialogue, self._frames(dialogue), settings, str(index))
            for index, dialogue in enumerate(dialogues)
        ]
        heard = {t.name: t for t in replay(self.engine, recordings, min(len(recordings), self.engine.room))}
        return [Heard.of(heard[recording.name], settings.threshold) for recording in recordings]

    def live(self, dialogues: Sequence[Dialogue], pace: Pace) -> list[Live]:
        """Each dialogue's stream by itself, going on while the model computes."""
        self._load()
        lives = []
        for index, dialogue in enumerate(dialogues):
            recording = recording_of(dialogue, self._frames(dialogue), pace.settings, str(index))
            paced = replay_paced(self.engine, recording, pace.credits)
            lives.append(Live(paced.said, paced.lags_s, len(paced.dropped)))
        return lives

    def answer(self, dialogues: Sequence[Dialogue], generation: Generation) -> list[list[str]]:
        """Offline: the answers to each dialogue's question, the likeliest first, after all of its frames."""
        self._load()
        with self._plain_attention():
            return [
                generate(self.loaded.model, self.loaded.template, dialogue, self._frames(dialogue), generation)
                for dialogue in dialogues
            ]

    # -- plumbing ---------------------------------------------------------------------------------

    def _load(self) -> Loaded:
        if self._loaded is None:
            engine = self.config.section("engine", EngineConfig)
            limit_threads(engine.threads)
            loaded = load_model(self.config)
            folder = self.config.section("store", StoreConfig).folder
            self.store = FrameStore.open(folder, expect_fingerprint=loaded.features)
            self._attention = loaded.model.base_llm.config._attn_implementation
            self.engine: Engine = build_engine(loaded.model, loaded.template, engine)
            self.loaded = self._loaded = loaded
        return self._loaded

    def _decide(self, dialogue: Dialogue, deciding: Deciding) -> Decided:
        template, tokens = self.loaded.template, self._frames(dialogue)
        rendered, forward = template.render(dialogue.conversation), _Remembering(forward_of(self.loaded.model))
        replies = {
            mode: evaluate(forward, template, rendered, tokens, deciding.threshold, mode, deciding.by_argmax(mode))
            for mode in MODES
        }
        return Decided(replies, frame_changes(tokens))

    def _frames(self, dialogue: Dialogue) -> Tensor:
        info = self.store.info
        if dialogue.num_frames == 0:
            return torch.empty(0, info.num_tokens, info.width, dtype=torch.float16)
        return self.store.frames(dialogue.video_id, *dialogue.frames)

    @contextmanager
    def _plain_attention(self) -> Iterator[None]:
        """The model's own attention in place of the engine's, which reads its KV memory."""
        llm = self.loaded.model.base_llm
        taken_over = llm.config._attn_implementation
        llm.set_attn_implementation(self._attention)
        try:
            yield
        finally:
            llm.set_attn_implementation(taken_over)


class _Remembering:
    """A forward that gives its first result again where it is asked the same: both modes begin alike."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.first: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, input_ids: Tensor, frames: Tensor, positions: Tensor) -> Tensor:
        if self.first is None:
            self.first = input_ids, positions, self.forward(input_ids, frames, positions)
        asked_ids, asked_positions, logits = self.first
        if input_ids.equal(asked_ids) and positions.equal(asked_positions):
            return logits
        return self.forward(input_ids, frames, positions)

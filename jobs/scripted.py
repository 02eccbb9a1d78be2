"""Streams whose decisions are scripted, so that both backends do the same work whatever the weights say.

The model still runs and its logits are still turned into decisions and tokens; only then the script takes
their place. A stream can also be put where it would be after thousands of frames: its log is folded without
a model, and the KV cache is filled with random numbers, on whose values no operation's time depends.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import torch
from transformers import DynamicCache

from actors.batched import BatchedEngine
from actors.dialogue import Template
from actors.messages import FramesDecided, LogEntry, ResponseEnded, SessionSettings
from actors.reference import ReferenceEngine
from actors.session import Decision, Limits, Session, Work

FPS = 2
REPLY_TOKENS = 12
SETTINGS = SessionSettings(max_response_tokens=64)


class Scripted(Session):
    """Speaks at the frames of `speaks`, always `REPLY_TOKENS` tokens."""

    speaks: ClassVar[Collection[int]] = ()

    def resolve_frames(self, work: Work, decisions: Sequence[Decision]) -> list[LogEntry]:
        first = self.next_seq
        return super().resolve_frames(
            work, [Decision(0.0 if first + i in self.speaks else 1.0, True) for i in range(len(decisions))]
        )

    def resolve_token(self, work: Work, token_id: int) -> list[LogEntry]:
        said = len(self.response.ids) if self.response else 0
        word = self.template.plain.encode(" street")[0].id
        return super().resolve_token(work, word if said < REPLY_TOKENS else self.template.eos_id)


def scripted(speaks: Collection[int]) -> type[Scripted]:
    return type("Scripted", (Scripted,), {"speaks": frozenset(speaks)})


class PlacedReference(ReferenceEngine):
    def fill(self, session: Session) -> None:
        """Random keys and values for the whole context."""
        config = self.model.base_llm.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (1, config.num_key_value_heads, session.context.length, width)
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            states = torch.randn(2, *shape, dtype=self.model.base_llm.dtype, device=self.model.device)
            cache.update(states[0], states[1], layer)
        self._caches[session.session_id] = cache
        session.fed = session.context.length


class PlacedBatched(BatchedEngine):
    def fill(self, session: Session) -> None:
        """Random keys and values for the whole context."""
        region = self._regions[session.session_id]
        for layer in range(len(self.memory.keys)):
            for states in self.memory.of(layer, region.start, region.start + session.context.length):
                states.normal_()
        session.fed = session.context.length


PlacedEngine = PlacedReference | PlacedBatched


class Folded(Scripted):
    """A stream that runs without a model and notes its log, to be restored elsewhere."""

    def __init__(self, template: Template, system_prompt: str, limits: Limits, frame: torch.Tensor) -> None:
        super().__init__("folded", template, system_prompt, SETTINGS, limits)
        self.frame = frame
        self.log: list[LogEntry] = []
        self.evicted_at: list[int] = []

    def run(self, frames: int) -> list[LogEntry]:
        """The log of the first `frames` silent frames; `evicted_at` holds those that a rebuild precedes."""
        while self.next_seq < frames:
            self.add_frame(self.next_seq, self.next_seq / FPS, self.frame)
            made = self.advance()
            if made:
                self.evicted_at.append(self.next_seq)
            self.log += made
            self.fed = self.context.length
            work = self.work()
            assert work is not None
            self.log += self.resolve_frames(work, [Decision(1.0, True)])
        return self.log


def place(engine: PlacedEngine, session_id: str, log: Sequence[LogEntry], frame: torch.Tensor) -> Session:
    """A session of that id that has lived through `log`, its whole context in the cache."""
    engine.close(session_id)
    session = engine.open(session_id, SETTINGS)
    for entry in log:
        if isinstance(entry, FramesDecided):
            for offset, time in enumerate(entry.times):
                session.add_frame(entry.first_seq + offset, time, frame)
    session.restore(log)
    engine.fill(session)
    return session


def add_frame(session: Session, frame: torch.Tensor) -> None:
    """The frame after all that the session has met."""
    seq = session.next_seq + session.waiting_frames
    session.add_frame(seq, seq / FPS, frame)


def count(log: Sequence[LogEntry]) -> tuple[int, int]:
    """Frames decided and responses ended."""
    frames = sum(len(entry.times) for entry in log if isinstance(entry, FramesDecided))
    return frames, sum(isinstance(entry, ResponseEnded) for entry in log)

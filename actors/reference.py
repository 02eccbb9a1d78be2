"""The reference backend: one session and one frame a step on a growing Hugging Face cache.

It follows the public reference's loop (LiveInfer) position by position, with every logit computed
and no batching, and rebuilds an evicted context by plain re-prefill. Slow on purpose: it is the
oracle of parity tests and the baseline of the benchmark.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache

from actors.dialogue import Template
from actors.engine import EngineConfig, KVUse, NoCapacity, StepResult
from actors.messages import LogEntry, SessionSettings
from actors.model import VideoLLM
from actors.sampling import decide, sample
from actors.session import Decision, Session, Work


class ReferenceEngine:
    """Sessions take turns; each has its own cache."""

    session_type: type[Session] = Session

    def __init__(self, model: VideoLLM, template: Template, config: EngineConfig) -> None:
        self.model = model.eval()
        self.template = template
        self.config = config
        self.limits = config.limits(model.base_llm.config)
        self.sessions: dict[str, Session] = {}
        self.idle = True
        self._caches: dict[str, DynamicCache] = {}

    @property
    def room(self) -> int:
        return self.config.max_sessions - len(self.sessions)

    @property
    def kv_use(self) -> KVUse:
        filled = sum(session.fed for session in list(self.sessions.values()))
        return KVUse(filled, filled, self.config.max_sessions * self.limits.capacity)

    def open(self, session_id: str, settings: SessionSettings) -> Session:
        if len(self.sessions) >= self.config.max_sessions:
            raise NoCapacity(
                f"{len(self.sessions)} sessions are open, engine.max_sessions is {self.config.max_sessions}"
            )
        session = self.session_type(session_id, self.template, self.model.config.system_prompt, settings, self.limits)
        self.sessions[session_id] = session
        return session

    def close(self, session_id: str) -> None:
        self.sessions.pop(session_id, None)
        self._caches.pop(session_id, None)

    def step(self) -> StepResult:
        results: StepResult = []
        self.idle = True
        for session_id, session in list(self.sessions.items()):
            entries = session.advance()
            work = session.work()
            if work is not None:
                entries += self._run(session, work)
                self.sessions[session_id] = self.sessions.pop(session_id)
            if entries:
                results.append((session_id, entries))
                self.idle = False
            if work is not None:
                self.idle = False
                break
        return results

    def _run(self, session: Session, work: Work) -> list[LogEntry]:
        logits = self.forward(session, work)
        if work.kind == "prefill":
            session.resolve_prefill(work)
            return []
        if work.kind == "frames":
            return session.resolve_frames(work, self.decide(logits[work.marks]))
        return session.resolve_token(work, self.choose(session, logits[work.marks[-1]]))

    @torch.inference_mode()
    def forward(self, session: Session, work: Work) -> torch.Tensor:
        """Append the work's positions to the session's cache; logits (T, V) of all of them."""
        if work.start == 0:
            self._caches[session.session_id] = DynamicCache(config=self.model.base_llm.config)
        cache = self._caches[session.session_id]
        device = self.model.device
        ids = torch.tensor([work.ids], device=device)
        frames = torch.stack(work.frames).to(device) if work.frames else None
        output = self.model.base_llm(inputs_embeds=self.model.embed(ids, frames), past_key_values=cache, use_cache=True)
        return output.logits[0]

    def decide(self, logits: torch.Tensor) -> list[Decision]:
        """Decisions for rows of logits (R, V)."""
        return decide(logits, self.template.silence_id)

    def choose(self, session: Session, logits: torch.Tensor) -> int:
        """The next token for one row of logits (V,)."""
        response = session.response
        said = response.ids if response else []
        return sample(logits, session.settings, said, (session.responses, len(said)))

"""The batched engine: one forward a step over pieces of many sessions, on preallocated KV memory.

With the same decisions as the reference backend. A step appends decode tokens, frames and chunks of
prefill together; logits are computed only where a decision or a token needs them; several waiting
frames of a session are appended as if silent, and the cache is cut back behind the first that speaks.
VideoLLM-online, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actors.attention import ATTENTION, Ragged, Span, pages_work
from actors.dialogue import Template
from actors.engine import EngineConfig, EngineError, KVUse, NoCapacity, StepResult
from actors.kv import PAGE, KVMemory, Region, whole_pages
from actors.lean import LeanDecoder
from actors.messages import LogEntry, SessionSettings
from actors.model import VideoLLM
from actors.sampling import decide, sample
from actors.scheduler import Scheduler
from actors.session import Decision, Session, Work

DEFAULT_KV_GB = 1.0


class BatchedEngine:
    """Many sessions on one model. Raises ValueError where the budget holds not even one session."""

    session_type: type[Session] = Session

    def __init__(self, model: VideoLLM, template: Template, config: EngineConfig) -> None:
        self.model = model.eval()
        self.template = template
        self.config = config
        llm = model.base_llm
        self.limits = config.limits(llm.config)
        self.idle = True
        self.sessions: dict[str, Session] = {}
        self.scheduler = Scheduler(config.token_budget, config.speculate)
        _refuse_sliding_windows(llm.config, self.limits.capacity)
        _refuse_changing_angles(llm.config, self.limits.capacity)
        llm.set_attn_implementation(ATTENTION)
        self._lean = LeanDecoder.of(llm)  # before what is free is counted: it lays weights out anew
        self.memory = KVMemory(llm.config, self._affordable_positions(), llm.dtype, model.device)
        self._regions: dict[str, Region] = {}
        self._groups = llm.config.num_attention_heads // self.memory.kv_heads
        self.memory.paged = pages_work(self.memory, self._groups)
        self._no_mask = torch.empty(1, 1, 1, 1, device=model.device)

    @property
    def room(self) -> int:
        return min(self.config.max_sessions - len(self.sessions), self.memory.fitting(self.limits.capacity))

    @property
    def kv_use(self) -> KVUse:
        filled = sum(session.fed for session in list(self.sessions.values()))
        return KVUse(filled, self.memory.positions - self.memory.free_positions, self.memory.positions)

    def open(self, session_id: str, settings: SessionSettings) -> Session:
        if len(self.sessions) >= self.config.max_sessions:
            raise NoCapacity(
                f"{len(self.sessions)} sessions are open, engine.max_sessions is {self.config.max_sessions}"
            )
        session = self.session_type(session_id, self.template, self.model.config.system_prompt, settings, self.limits)
        self._regions[session_id] = self.memory.reserve(self.limits.capacity)
        self.sessions[session_id] = session
        return session

    def close(self, session_id: str) -> None:
        self.sessions.pop(session_id, None)
        self.scheduler.forget(session_id)
        if region := self._regions.pop(session_id, None):
            self.memory.release(region)

    @torch.inference_mode()
    def step(self) -> StepResult:
        logged: dict[str, list[LogEntry]] = {}
        for session_id, session in self.sessions.items():
            if entries := session.advance():
                logged[session_id] = entries
        plan = self.scheduler.plan(self.sessions.values())
        self.idle = not plan and not logged
        if plan:
            for session, entries in self._resolve(plan, self._forward(plan)):
                logged.setdefault(session.session_id, []).extend(entries)
        return [(session_id, entries) for session_id, entries in logged.items() if entries]

    def _forward(self, plan: list[tuple[Session, Work]]) -> Tensor:
        """Append all pieces; logits (R, V) at the marks, in plan order."""
        device = self.model.device
        spans: list[Span] = []
        ids: list[int] = []
        frames: list[Tensor] = []
        positions: list[Tensor] = []
        wanted: list[int] = []
        for session, work in plan:
            region = self._regions[session.session_id]
            if work.start + len(work.ids) > region.length:  # would be another session's memory
                raise RuntimeError(
                    f"session {session.session_id!r} has {work.start + len(work.ids)} positions, its region of the KV "
                    f"memory {region.length}"
                )
            first = len(ids)
            ids += work.ids
            frames += work.frames
            wanted += [first + mark for mark in work.marks]
            positions.append(torch.arange(work.start, work.start + len(work.ids)))
            spans.append(Span(first, len(ids), region.start, work.start))
        embeddings = self.model.embed(
            torch.tensor([ids], device=device), torch.stack(frames).to(device) if frames else None
        )
        ragged = Ragged.of(self.memory, spans, self._groups)
        marks = torch.tensor(wanted, device=device, dtype=torch.long)
        hidden = self._decode(embeddings[0], torch.cat(positions).to(device), ragged, marks)
        head = self._lean.logits if self._lean is not None else self.model.base_llm.get_output_embeddings()
        logits: Tensor = head(hidden)
        return logits

    def _decode(self, embeddings: Tensor, positions: Tensor, ragged: Ragged, marks: Tensor) -> Tensor:
        """Embeddings (T, H) at `positions` (T,) to the last hidden states (R, H) at `marks` (R,)."""
        if self._lean is not None:
            return self._lean(embeddings, positions, ragged, marks)
        output = self.model.base_llm.get_decoder()(
            inputs_embeds=embeddings.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            attention_mask=self._no_mask,
            use_cache=False,
            ragged=ragged,
        )
        states: Tensor = output.last_hidden_state[0]
        return states[marks]

    def _resolve(self, plan: list[tuple[Session, Work]], logits: Tensor) -> list[tuple[Session, list[LogEntry]]]:
        """Decisions and tokens, each from its rows of `logits`."""
        rows = logits.split([len(work.marks) for _, work in plan])
        frame_rows = [part for (_, work), part in zip(plan, rows, strict=True) if work.kind == "frames"]
        decisions = iter(self.decide(torch.cat(frame_rows)) if frame_rows else [])
        resolved: list[tuple[Session, list[LogEntry]]] = []
        for (session, work), part in zip(plan, rows, strict=True):
            if work.kind == "prefill":
                session.resolve_prefill(work)
            elif work.kind == "token":
                resolved.append((session, session.resolve_token(work, self.choose(session, part[0]))))
            else:
                before = session.next_seq
                resolved.append((session, session.resolve_frames(work, [next(decisions) for _ in work.marks])))
                self.scheduler.note(session, session.next_seq - before, session.response is not None)
        return resolved

    def decide(self, logits: Tensor) -> list[Decision]:
        """Decisions for rows of logits (R, V)."""
        return decide(logits, self.template.silence_id)

    def choose(self, session: Session, logits: Tensor) -> int:
        """The next token for one row of logits (V,)."""
        said = session.response.ids if session.response else []
        return sample(logits, session.settings, said, (session.responses, len(said)))

    def _affordable_positions(self) -> int:
        llm = self.model.base_llm
        each = KVMemory.bytes_per_position(llm.config, llm.dtype)
        if self.config.kv_memory_share is not None:
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(self.model.device)
            budget = free * self.config.kv_memory_share
        else:
            budget = (self.config.kv_memory_gb or DEFAULT_KV_GB) * 1e9
        positions = int(budget / each)
        if positions < whole_pages(self.limits.capacity):
            raise EngineError(
                f"engine.kv_memory_gb of {budget / 1e9:.2f} holds {positions} positions, one session needs "
                f"{self.limits.capacity} ({self.limits.capacity * each / 1e9:.2f} GB), both in whole pages of {PAGE}: "
                "raise it or lower engine.max_positions"
            )
        return positions


def _refuse_changing_angles(config: object, capacity: int) -> None:
    """longrope turns all rows of a batch by the length of the longest: sessions would change each other."""
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and original is not None and capacity > original:
        raise EngineError(
            f"the LLM's positions (rope type longrope) depend on the longest context beyond {original}, "
            f"contexts may have {capacity}: set engine.max_positions to {original}, or engine.backend to reference"
        )


def _refuse_sliding_windows(config: object, capacity: int) -> None:
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ([] if window is None else ["sliding_attention"])
    if window is not None and window < capacity and "sliding_attention" in layers:
        raise EngineError(
            f"the LLM attends within {window} positions, contexts may have {capacity}: "
            f"set engine.max_positions to {window}"
        )

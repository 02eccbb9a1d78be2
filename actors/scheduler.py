"""What one step appends: decode tokens of speaking sessions first, then frames, then prefill.

A step has a budget of positions, so that its time is bounded and nobody waits long. It serves those
that were served longest ago, and prefill always gets a part of the budget, so none starves. Sessions that prefill
do so one after the other, first come, first served: after a takeover of many, half of them go on in half the
time, where equal shares would let all of them wait for the last. What would fit into one step, such as a long question,
has half of that to itself, so that it waits for no rebuild. Among the
served, live sessions with a frame or two take what they need first; runs of those that are behind, or of
recorded video, share what is left. How many waiting frames of a session are appended at once as if silent follows how
often it speaks: what lies behind a frame that speaks is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterable

from actors.session import Session, Work

PREFILL_SHARE = 4
FORGET = 0.95
STEP_OVERHEAD = 40.0  # positions that could be appended in the time a step takes anyway


class Scheduler:
    """Chooses work of at most about `token_budget` positions; remembers turns and speaking rates."""

    def __init__(self, token_budget: int, speculate: int) -> None:
        self.token_budget = token_budget
        self.speculate = speculate
        self._served: dict[str, int] = {}
        self._speaking_rate: dict[str, float] = {}
        self._prefilling: list[Session] = []  # first come first
        self._step = 0

    def plan(self, sessions: Iterable[Session]) -> list[tuple[Session, Work]]:
        """The work of one step, at most one piece per session. Sessions must have been advanced."""
        self._step += 1
        ordered = sorted(sessions, key=lambda session: self._served.get(session.session_id, 0))
        prefilling = [s for s in ordered if s.pending > self.token_budget // 2]
        earlier = [s for s in self._prefilling if s in prefilling]
        prefilling = self._prefilling = [*earlier, *(s for s in prefilling if s not in earlier)]
        speaking = [s for s in ordered if s.response is not None and s not in prefilling]
        others = [s for s in ordered if s.response is None and s not in prefilling and s.ready]
        # Who has a word to add goes before who has a question to read: that gets what is left, not a share of little.
        speaking = sorted(speaking[: self.token_budget], key=lambda session: session.pending)
        plan: list[tuple[Session, Work]] = []
        left = self.token_budget
        left -= self._take(plan, speaking, left, frames=False)
        reserved = self.token_budget // PREFILL_SHARE if prefilling else 0
        room = max(left - reserved, 1)
        others = others[: max(room // others[0].template.frames.num_tokens, 1)] if others else []
        others.sort(key=lambda session: session.waiting_frames)
        left -= self._take(plan, others, room, frames=True)
        left = max(left, reserved)
        if prefilling and prefilling[0].pending > self.token_budget:
            short = [session for session in prefilling if session.pending <= self.token_budget]
            left -= self._take(plan, short, left // 2, frames=False, evenly=False)
            prefilling = [session for session in prefilling if session not in short]
        self._take(plan, prefilling, left, frames=False, evenly=False)
        for session, _ in plan:
            self._served[session.session_id] = self._step
        return plan

    def note(self, session: Session, frames: int, spoke: bool) -> None:
        """What became of a run of frames: how many were kept, and whether the last one spoke."""
        rate = self._speaking_rate.get(session.session_id, 0.1)
        kept = FORGET**frames
        self._speaking_rate[session.session_id] = rate * kept + (1 - FORGET) * spoke

    def forget(self, session_id: str) -> None:
        self._served.pop(session_id, None)
        self._speaking_rate.pop(session_id, None)

    def run_length(self, session: Session) -> int:
        """Frames to append at once: the most kept frames per cost, a step costing some positions in itself."""
        rate = min(max(self._speaking_rate.get(session.session_id, 0.1), 1e-3), 1.0)
        lengths = [1 << i for i in range(self.speculate.bit_length()) if 1 << i <= self.speculate]
        overhead = STEP_OVERHEAD / session.template.frames.num_tokens
        return max(lengths, key=lambda n: (1 - (1 - rate) ** n) / (overhead + n))

    def _take(
        self, plan: list[tuple[Session, Work]], sessions: list[Session], budget: int, frames: bool, evenly: bool = True
    ) -> int:
        """Add work of `sessions` while `budget` lasts, in equal shares or all that each has; the positions it takes."""
        used = 0
        waiting = len(sessions)
        for session in sessions:
            if used >= budget:
                break
            share = max((budget - used) // (waiting if evenly else 1), 1)
            waiting -= 1
            work = session.work(self.run_length(session) if frames else 1, share)
            if work is not None:
                plan.append((session, work))
                used += len(work.ids)
        return used

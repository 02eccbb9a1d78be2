"""The context of one session: what the LLM has been given, as ids and frame tokens, and how it is rebuilt.

A context only grows: a frame, a turn opened (by a query or spontaneously), its tokens, its end.
It is kept in groups, each a frame with the turns that follow it, because eviction cuts between
frames and keeps or drops an exchange whole. Rebuilding renders the kept groups again behind the
system prompt, so positions restart at 0 and stay within the model's limit for ever.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

import torch

from actors.dialogue import DialogueWriter, Template


@dataclass
class FrameItem:
    """One frame in the context: `tokens` (N, D) before the connector."""

    seq: int
    time: float
    tokens: torch.Tensor


@dataclass
class TurnItem:
    """One assistant turn, with the query it answers (None when spontaneous)."""

    query: str | None
    ids: list[int] = field(default_factory=list)
    text: str = ""
    closed: bool = False


@dataclass
class Group:
    """A frame (None before the first) with the turns after it; `start` is its first position."""

    frame: FrameItem | None
    start: int
    turns: list[TurnItem] = field(default_factory=list)


@dataclass
class Eviction:
    """What a rebuild keeps: frames from `first_seq`, the pinned query, remembered responses."""

    first_seq: int
    pinned: str
    memory: str


class Context:
    """Ids and frame tokens in context order; `ids` holds `template.frame_id` N times per frame."""

    def __init__(self, template: Template, system_prompt: str) -> None:
        self.template = template
        self.pinned = ""
        self.memory = ""
        self._begin(system_prompt)

    def _begin(self, system_prompt: str) -> None:
        self.system_prompt = system_prompt
        self.ids: list[int] = []
        self.groups: list[Group] = [Group(None, 0)]
        self._writer: DialogueWriter = self.template.writer()
        self._frame_starts: list[int] = []
        self._frame_tokens: list[torch.Tensor] = []
        self.ids += self._writer.system(system_prompt)

    @property
    def length(self) -> int:
        return len(self.ids)

    def frame_ids(self, count: int) -> list[list[int]]:
        """The ids each of the next `count` frames would append if all were silent."""
        writer = self._writer.copy()
        return [writer.frame() for _ in range(count)]

    def query_cost(self, text: str) -> int:
        """Positions a query takes, up to and including the generation point."""
        return len(self._writer.copy().user(text))

    def add_frame(self, seq: int, time: float, tokens: torch.Tensor) -> None:
        self._write_frame(FrameItem(seq, time, tokens))

    def open_turn(self, query: str | None) -> None:
        """Write the query, or the end of the bracket, up to the generation point."""
        if query is not None and not self.pinned:
            self.pinned = query
        self._write_opening(TurnItem(query))

    def add_tokens(self, ids: list[int]) -> None:
        self.groups[-1].turns[-1].ids += ids
        self.ids += ids

    def close_turn(self, text: str) -> None:
        turn = self.groups[-1].turns[-1]
        turn.text, turn.closed = text, True
        self.ids += self._writer.close()

    def span(self, start: int, stop: int) -> tuple[list[int], list[torch.Tensor]]:
        """Ids of positions [start, stop) and the tokens of the frames in it; cuts must fall between frames."""
        first, last = bisect_left(self._frame_starts, start), bisect_left(self._frame_starts, stop)
        return self.ids[start:stop], self._frame_tokens[first:last]

    def cut(self, start: int, limit: int) -> int:
        """The largest position at most `limit` after `start` that does not split a frame.

        The end of the first frame is returned when even that lies beyond `limit`.
        """
        stop = min(start + limit, self.length)
        at = bisect_left(self._frame_starts, stop) - 1
        if at < 0:
            return stop
        frame_start = self._frame_starts[at]
        frame_end = frame_start + self.template.frames.num_tokens
        if frame_start < stop < frame_end:
            return frame_start if frame_start > start else frame_end
        return stop

    def plan_eviction(self, keep: int, memory_tokens: int, system_prompt: str) -> Eviction:
        """The newest groups that fit in `keep` positions behind the prompt to come, pinned query and memory."""
        lines = [line for line in self.memory.split("\n") if line]
        pinned = self.pinned if len(self.template.plain.encode(self.pinned)) <= keep // 4 else ""
        base = self.base_cost(system_prompt, pinned, memory_tokens)
        first = len(self.groups)
        while first > 1 and self.length - self.groups[first - 1].start + base <= keep:
            first -= 1
        for group in self.groups[:first]:
            lines += [turn.text for turn in group.turns if turn.closed and turn.text]
        kept = [group for group in self.groups[first:] if group.frame]
        last = next((group.frame.seq for group in reversed(self.groups) if group.frame), -1)
        first_seq = kept[0].frame.seq if kept and kept[0].frame else last + 1
        # Who takes the session over pins the first question of the log that is left to it.
        asked = [turn.query for group in self.groups[first:] for turn in group.turns if turn.query is not None]
        return Eviction(first_seq, "" if asked[:1] == [pinned] else pinned, self._remember(lines, memory_tokens))

    def rebuild(self, eviction: Eviction, system_prompt: str) -> None:
        """Start over with what `eviction` keeps. Everything is to be prefilled again."""
        groups = [group for group in self.groups if group.frame and group.frame.seq >= eviction.first_seq]
        self._begin(system_prompt)
        self.memory = eviction.memory
        asked = (turn.query for group in groups for turn in group.turns if turn.query)
        self.pinned = eviction.pinned or next(asked, "")
        self._write_base(self._writer, self.ids, eviction.pinned, eviction.memory)
        for group in groups:
            if group.frame is not None:
                self._write_frame(group.frame)
            for turn in group.turns:
                self._write_opening(turn)
                self.ids += turn.ids
                if turn.closed:
                    self.ids += self._writer.close()

    def _write_frame(self, frame: FrameItem) -> None:
        start = len(self.ids)
        self.ids += self._writer.frame()
        self.groups.append(Group(frame, start))
        self._frame_starts.append(len(self.ids) - self.template.frames.num_tokens)
        self._frame_tokens.append(frame.tokens)

    def _write_opening(self, turn: TurnItem) -> None:
        self.groups[-1].turns.append(turn)
        self.ids += self._writer.speak() if turn.query is None else self._writer.user(turn.query)

    def _write_base(self, writer: DialogueWriter, ids: list[int], pinned: str, memory: str) -> None:
        if memory:
            ids += writer.user(pinned) if pinned else writer.speak()
            ids += writer.answer(memory.replace("\n", " "))
            ids += writer.close()
        elif pinned:
            writer.ask(pinned)

    def base_cost(self, system_prompt: str, pinned: str, memory_tokens: int) -> int:
        """Positions at most that stand before the kept frames after a rebuild, the first frame included."""
        writer, ids = self.template.writer(), list[int]()
        ids += writer.system(system_prompt)
        self._write_base(writer, ids, pinned, "")
        return len(ids) + len(writer.frame()) + memory_tokens + 8

    def _remember(self, lines: list[str], budget: int) -> str:
        kept: list[str] = []
        used = 0
        for line in reversed(lines):
            line = " ".join(line.split())
            used += len(self.template.plain.encode(" " + line))
            if used > budget:
                break
            kept.insert(0, line)
        return "\n".join(kept)

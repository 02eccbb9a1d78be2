"""One live video's clock, pending input and decisions: the streaming loop as pure logic.

A session turns input (frames, queries, interrupts, settings) into log entries, and every change
of its state is the application of a log entry. What an engine runs and what a replica rebuilds
from the log are therefore the same fold: `apply` is the only place where the context grows.

The engine drives it: `advance` logs what needs no model, `work` says which positions to append
and where logits are wanted, `resolve_*` turns the model's answer into entries. Positions of the
context that are already in the KV cache are counted in `fed`.
"""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from actors.context import Context, Eviction
from actors.dialogue import Template
from actors.messages import (
    End,
    Evicted,
    FramesDecided,
    FrameSkipped,
    InputRefused,
    Interrupt,
    LogEntry,
    Query,
    QueryConsumed,
    ResponseEnded,
    ResponseStarted,
    ResponseTokens,
    SessionEnded,
    SessionSettings,
    SettingsApplied,
    SettingsChange,
)

REMEMBERED_RESPONSES = 3
NEARLY_EQUAL = 0.9
SHORT_TEXT = 512  # letters, up to which they are compared one by one
MOST_KEPT = 0.75  # of its trigger that a client's window may keep
IDLE_PREFILL = 64
OPENING = 16
UTF8_BYTES = 4


class SessionError(ValueError):
    """Settings that cannot hold for a session of this model; says the limit and what was asked."""


@dataclass(frozen=True)
class Limits:
    """Context lengths in positions: rebuild before passing `trigger`, down to about `keep`.

    `capacity` is what the KV memory holds for one session; a response that starts at `trigger`
    must still fit. `memory_tokens` is the budget for text of dropped turns. Without `trigger`
    the window is as long as `capacity` allows, without `keep` half of that.
    """

    capacity: int
    trigger: int | None = None
    keep: int | None = None
    memory_tokens: int = 128

    def window(self, settings: SessionSettings) -> tuple[int, int]:
        """(trigger, keep) for a session's settings. Raises SessionError where they don't fit."""
        room = self.capacity - settings.max_response_tokens - OPENING
        trigger = settings.window_trigger or min(self.trigger or room, room)
        keep = settings.window_keep or min(
            self.keep or trigger // 2, trigger // 2 if settings.window_trigger else trigger
        )
        if trigger > room:
            raise SessionError(
                f"window_trigger is {trigger}, but only {room} positions are left by a capacity of {self.capacity} "
                f"and max_response_tokens {settings.max_response_tokens}: lower one of the two"
            )
        if not 0 < keep < trigger:
            raise SessionError(f"window_keep is {keep}, expected less than window_trigger ({trigger})")
        if settings.window_keep and keep > MOST_KEPT * trigger:
            raise SessionError(
                f"window_keep is {keep}, more than {MOST_KEPT:g} of window_trigger ({trigger}): the context would be "
                "rebuilt every few frames; lower it"
            )
        return trigger, keep


@dataclass(frozen=True)
class Decision:
    """What the model says at a frame: P(silent), and whether silence is the most likely token.

    `margin` is the distance of that choice to a tie: the gap between silence and the best other
    token in logits. Comparators of two engines read it; decisions do not.
    """

    p_silent: float
    silence_wins: bool
    margin: float = float("inf")


@dataclass
class Work:
    """Positions to append behind the `start` first ones, and where logits are wanted.

    `marks` are offsets in `ids` of the positions whose logits are needed: the last of every frame
    in `frames` work, the last of all in `token` work, none in `prefill` work.
    """

    kind: Literal["frames", "token", "prefill"]
    start: int
    ids: list[int]
    frames: list[torch.Tensor]
    marks: list[int]


@dataclass
class Response:
    """The turn being spoken. The text of the first `shown` ids is out; `anchor` is where it was before."""

    response_id: str
    query_id: str | None
    ids: list[int] = field(default_factory=list)
    anchor: int = 0
    shown: int = 0


class Session:
    """State of one stream. Raises SessionError when the limits leave no room to speak."""

    def __init__(
        self, session_id: str, template: Template, system_prompt: str, settings: SessionSettings, limits: Limits
    ) -> None:
        self.session_id = session_id
        self.template = template
        self.default_prompt = system_prompt
        self.settings = settings
        self.limits = limits
        self.trigger, self.keep = limits.window(settings)
        self.fed = 0
        self.next_seq = 0
        self.clock = 0.0
        self.ended = False
        self.responses = 0
        self.suppressed = 0
        self.spoken = self.forgotten = 0  # tokens of responses; positions that left the context with evictions
        self.response: Response | None = None
        self.context = Context(template, settings.instructions or system_prompt)
        self._frames: dict[int, tuple[float, torch.Tensor | None, str]] = {}
        self._commands: deque[Query | SettingsChange] = deque()
        self._timed: list[Query] = []
        self._cut = False
        self._end: End | None = None
        self._given_up = ""
        self.recent: tuple[str, ...] = ()
        self._check(settings)

    # -- input -------------------------------------------------------------------------------

    def add_frame(self, seq: int, time: float, tokens: torch.Tensor) -> None:
        """A frame's tokens (N, D). The first of a seq wins; one already decided is ignored."""
        if seq >= self.next_seq:
            self._frames.setdefault(seq, (time, tokens, ""))

    def skip_frame(self, seq: int, time: float, reason: str) -> None:
        if seq >= self.next_seq:
            self._frames.setdefault(seq, (time, None, reason))

    def add(self, message: Query | Interrupt | SettingsChange | End) -> None:
        match message:
            case Interrupt():
                open_id = self.response and self.response.response_id
                self._cut = self._cut or (open_id is not None and message.response_id in (None, open_id))
            case End():
                self._end = message
            case SettingsChange():
                self._commands.append(message)
            case Query():
                self._cut = self._cut or (message.interrupt and self.response is not None)
                if message.time is None:
                    self._commands.append(message)
                else:
                    self._timed.append(message)
                    self._timed.sort(key=lambda query: query.time or 0.0)

    def give_up(self, reason: str) -> None:
        """End at once, without the input that is left: nobody listens any more."""
        self._given_up = reason

    @property
    def waiting_frames(self) -> int:
        return len(self._frames)

    @property
    def pending(self) -> int:
        """Positions of the context that are not in the KV cache yet."""
        return self.context.length - self.fed

    @property
    def ready(self) -> bool:
        """Whether `work` has something to append: the next frame, or more of the context than waits for one."""
        waits = self.response is not None or self.next_seq in self._frames or self.pending > IDLE_PREFILL
        return waits and not self.ended

    # -- driven by the engine -------------------------------------------------------------------

    def advance(self) -> list[LogEntry]:
        """Apply and return all that needs no model: cuts, due queries and settings, skips, evictions, the end."""
        entries: list[LogEntry] = []
        while not self.ended:
            found = self._next_without_model()
            if found is None:
                break
            for entry in found:
                self._emit(entries, entry)
        return entries

    def work(self, max_frames: int = 1, max_positions: int = 1 << 30) -> Work | None:
        """What to append next, or None. Call `advance` first.

        Up to `max_frames` waiting frames come as one run, as if all but the last were silent; the
        run ends where a query or setting falls due. More pending positions than `max_positions`
        come as `prefill` work, cut between frames.
        """
        if self.ended:
            return None
        pending = self.pending
        run = [] if self.response else self._run(max_frames, max_positions - pending)
        if not self.response and not run:
            return self._prefill(max_positions) if pending > IDLE_PREFILL else None
        if pending > max_positions:
            return self._prefill(max_positions)
        ids, frames = self.context.span(self.fed, self.context.length)
        if self.response:
            return Work("token", self.fed, ids, frames, [len(ids) - 1])
        marks = []
        for piece, (_, tokens) in zip(self.context.frame_ids(len(run)), run, strict=True):
            ids += piece
            frames.append(tokens)
            marks.append(len(ids) - 1)
        return Work("frames", self.fed, ids, frames, marks)

    def resolve_prefill(self, work: Work) -> None:
        self.fed = work.start + len(work.ids)

    def resolve_frames(self, work: Work, decisions: Sequence[Decision]) -> list[LogEntry]:
        """Keep the run up to the first frame that wants to speak; the cache is valid up to `fed` afterwards."""
        threshold, by_argmax = self.settings.threshold, self.settings.decide_by == "argmax"
        kept = 0
        speak = False
        while kept < len(decisions) and not speak:
            decision = decisions[kept]
            speak = decision.p_silent < threshold or (by_argmax and not decision.silence_wins)
            kept += 1
        first = self.next_seq
        times = [self._frames[first + i][0] for i in range(kept)]
        entries: list[LogEntry] = []
        self._emit(
            entries,
            FramesDecided(first_seq=first, times=times, p_silent=[d.p_silent for d in decisions[:kept]]),
        )
        self.fed = work.start + work.marks[kept - 1] + 1
        if speak and self._due_query() is None:
            self._emit(entries, self._start_response(None))
        return entries

    def resolve_token(self, work: Work, token_id: int) -> list[LogEntry]:
        """Write one generated token into the open turn, or end it at eos or at the length limit."""
        self.fed = work.start + len(work.ids)
        response = self._speaking()
        entries: list[LogEntry] = []
        if token_id == self.template.eos_id:
            self._emit(entries, self._end_response("eos"))
            return entries
        last = len(response.ids) + 1 >= self.settings.max_response_tokens
        text = self._delta([*response.ids, token_id], final=last)
        self._emit(entries, ResponseTokens(response_id=response.response_id, ids=[token_id], text=text))
        if last:
            self._emit(entries, self._end_response("length"))
        return entries

    # -- the fold -------------------------------------------------------------------------------

    def apply(self, entry: LogEntry) -> None:
        """The one transition of the session's state. Frames must have been added before they are decided.

        A frame whose tokens are gone can only lie before the window; it is counted, not kept.
        """
        match entry:
            case FramesDecided():
                for offset, time in enumerate(entry.times):
                    seq = entry.first_seq + offset
                    _, tokens, _ = self._frames.pop(seq, (time, None, ""))
                    if tokens is not None:
                        self.context.add_frame(seq, time, tokens)
                    self.next_seq, self.clock = seq + 1, time
            case FrameSkipped():
                self._frames.pop(entry.seq, None)
                self.next_seq = entry.seq + 1
            case QueryConsumed():
                self._forget_command(entry.query_id)
                self.context.open_turn(entry.text)
            case InputRefused():
                self._forget_command(entry.query_id)
            case ResponseStarted():
                self.responses = int(entry.response_id.rpartition("-")[2]) + 1
                self.response = Response(entry.response_id, entry.query_id)
                if entry.query_id is None:
                    self.context.open_turn(None)
            case ResponseTokens():
                response = self._speaking()
                response.ids += entry.ids
                self.spoken += len(entry.ids)
                if entry.text:
                    response.anchor, response.shown = response.shown, len(response.ids)
                self.context.add_tokens(list(entry.ids))
            case ResponseEnded():
                response = self._speaking()
                self.context.close_turn(entry.text)
                self.suppressed += entry.reason == "duplicate"
                if response.query_id is None:
                    self.recent = (*self.recent, entry.text)[-REMEMBERED_RESPONSES:]
                self.response = None
                self._cut = False
            case SettingsApplied():
                self._forget_command(None)
                self.settings = entry.settings
                self.trigger, self.keep = self.limits.window(entry.settings)
            case Evicted():
                self.context.rebuild(Eviction(entry.first_seq, entry.pinned, entry.memory), self._prompt())
                # Not from what is here: a takeover folds no more than the window.
                before = self.forgotten if entry.forgotten is None else entry.forgotten  # older versions do not say
                self.forgotten = before + entry.positions_before - self.context.length
                self.next_seq = max(self.next_seq, entry.first_seq)
                self.fed = 0
            case SessionEnded():
                self.ended = True

    def restore(self, entries: Iterable[LogEntry]) -> None:
        """Fold a log. Its frames must have been added; afterwards the session goes on as if it had run here.

        Raises SessionError where a context has no room here, for its prompt or for the response that is open.
        """
        for entry in entries:
            self.apply(entry)
        self._check(self.settings)
        self.fed = 0
        # Frames before the window, whose decisions are no longer in the log.
        self._frames = {seq: frame for seq, frame in self._frames.items() if seq >= self.next_seq}
        if self.response is not None:
            needed = self.context.length + max(0, self.settings.max_response_tokens - len(self.response.ids)) + 1
            if needed > self.limits.capacity:
                raise SessionError(
                    f"the response that is being spoken may need {needed} positions, a context here has "
                    f"{self.limits.capacity}: raise engine.max_positions"
                )

    # -- rules -----------------------------------------------------------------------------------

    def _emit(self, entries: list[LogEntry], entry: LogEntry) -> None:
        self.apply(entry)
        entries.append(entry)

    def _next_without_model(self) -> list[LogEntry] | None:
        if self._given_up:
            cut: list[LogEntry] = [self._end_response("interrupted")] if self.response is not None else []
            return [*cut, self._ended(self._given_up)]
        if self.response is not None:
            return [self._end_response("interrupted")] if self._cut else None
        if self._commands and self._commands[0].after_seq < self.next_seq:
            head = self._commands[0]
            return self._consume(head) if isinstance(head, Query) else self._change_settings(head)
        if query := self._due_timed():
            return self._consume(query)
        if self.next_seq not in self._frames:
            if self.context.length > self.limits.capacity:  # taken over from a replica with room for more
                return [self._evict(self.keep)]
            return self._finish()
        time, tokens, reason = self._frames[self.next_seq]
        if tokens is None:
            return [FrameSkipped(seq=self.next_seq, time=time, reason=reason)]
        if self.context.length + len(self.context.frame_ids(1)[0]) > self.trigger:
            return [self._evict(self.keep)]
        return None

    def _run(self, max_frames: int, room: int) -> list[tuple[float, torch.Tensor]]:
        """Waiting frames that may be appended together: none dropped, nothing due before the last."""
        run: list[tuple[float, torch.Tensor]] = []
        room = min(max(room, 0), self.trigger - self.context.length)
        costs = [len(piece) for piece in self.context.frame_ids(2)]
        while len(run) < max_frames:
            time, tokens, _ = self._frames.get(self.next_seq + len(run), (0.0, None, ""))
            room -= costs[min(len(run), 1)]
            if tokens is None or (room < 0 and run):
                break
            run.append((time, tokens))
            if self._falls_due(self.next_seq + len(run) - 1, time):
                break
        return run

    def _falls_due(self, seq: int, time: float) -> bool:
        timed = bool(self._timed) and (self._timed[0].time or 0.0) <= time
        return timed or bool(self._commands and self._commands[0].after_seq <= seq)

    def _due_timed(self) -> Query | None:
        if self._timed and self.next_seq > 0 and (self._timed[0].time or 0.0) <= self.clock:
            return self._timed[0]
        return None

    def _due_query(self) -> Query | None:
        live = next(
            (c for c in self._commands if isinstance(c, Query) and c.after_seq < self.next_seq),
            None,
        )
        return live or self._due_timed()

    def _finish(self) -> list[LogEntry] | None:
        if self._end is None or self.next_seq <= self._end.after_seq:
            return None
        if self._timed:
            return self._consume(self._timed[0])
        return [self._ended("end of input")]

    def _ended(self, reason: str) -> SessionEnded:
        given = max(self.context.length + self.forgotten, self.spoken)
        return SessionEnded(reason=reason, positions=given, spoken=self.spoken)

    def _consume(self, query: Query) -> list[LogEntry]:
        needed = self.context.query_cost(query.text) + self.settings.max_response_tokens + 1
        if self.context.length + needed > self.limits.capacity:
            if needed > self.limits.capacity - self.keep:
                reason = (
                    f"question and answer need {needed} positions, the window leaves "
                    f"{self.limits.capacity - self.keep}: ask a shorter question or lower max_response_tokens"
                )
                return [InputRefused(query_id=query.query_id, reason=reason)]
            return [self._evict(self.keep)]
        seq, time = self.next_seq - 1, self.clock
        return [
            QueryConsumed(query_id=query.query_id, text=query.text, seq=seq, time=time),
            self._start_response(query.query_id),
        ]

    def _change_settings(self, change: SettingsChange) -> list[LogEntry]:
        try:
            self._check(change.settings)
        except SessionError as error:
            return [InputRefused(query_id=None, reason=str(error))]
        entries: list[LogEntry] = [SettingsApplied(settings=change.settings)]
        prompt = change.settings.instructions or self.default_prompt
        if prompt != self._prompt():
            entries.append(self._evict(self.limits.window(change.settings)[0], prompt))
        return entries

    def _check(self, settings: SessionSettings) -> None:
        """Raises SessionError when prompt, memory and one frame don't fit into what a rebuild keeps."""
        _, keep = self.limits.window(settings)
        prompt = settings.instructions or self.default_prompt
        base = self.context.base_cost(prompt, "", self.limits.memory_tokens) + keep // 4
        if base > keep:
            raise SessionError(
                f"system prompt, memory and one frame need {base} positions, window_keep is {keep}: "
                "give a longer window or shorter instructions"
            )

    def _evict(self, keep: int, prompt: str | None = None) -> Evicted:
        """With the present system prompt, or with `prompt` from now on."""
        prompt = self._prompt() if prompt is None else prompt
        plan = self.context.plan_eviction(keep, self.limits.memory_tokens, prompt)
        return Evicted(
            first_seq=plan.first_seq,
            positions_before=self.context.length,
            forgotten=self.forgotten,
            pinned=plan.pinned,
            memory=plan.memory,
        )

    def _start_response(self, query_id: str | None) -> ResponseStarted:
        return ResponseStarted(
            response_id=f"{self.session_id}-{self.responses}", query_id=query_id, seq=self.next_seq - 1, time=self.clock
        )

    def _end_response(self, reason: Literal["eos", "length", "interrupted"]) -> ResponseEnded:
        response = self._speaking()
        text = self.template.decode(response.ids).removeprefix(" ")
        duplicate = (
            reason == "eos"
            and self.settings.suppress_duplicates
            and response.query_id is None
            and any(nearly_equal(text, earlier) for earlier in self.recent)
        )
        return ResponseEnded(response_id=response.response_id, reason="duplicate" if duplicate else reason, text=text)

    def _delta(self, ids: list[int], final: bool) -> str:
        """Text that `ids` made readable beyond what is out; half a character waits for its rest.

        Decoded from a little before the new ids, so that a long response costs no more than a short one.
        """
        response = self._speaking()
        text = self.template.decode(ids[response.anchor :])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not final and len(ids) - response.shown < UTF8_BYTES:
            return ""
        new = text[len(self.template.decode(ids[response.anchor : response.shown])) :]
        return new if response.shown else new.removeprefix(" ")

    def _forget_command(self, query_id: str | None) -> None:
        """Drop the query of that id, or the oldest settings change for None."""
        done = next(
            (c for c in self._commands if (c.query_id if isinstance(c, Query) else None) == query_id),
            None,
        )
        if done is not None:
            self._commands.remove(done)
        elif query_id is not None:
            self._timed = [query for query in self._timed if query.query_id != query_id]

    def _prefill(self, max_positions: int) -> Work:
        stop = self.context.cut(self.fed, max_positions)
        ids, frames = self.context.span(self.fed, stop)
        return Work("prefill", self.fed, ids, frames, [])

    def _speaking(self) -> Response:
        if self.response is None:
            raise RuntimeError(f"session {self.session_id} is not speaking")
        return self.response

    def _prompt(self) -> str:
        return self.settings.instructions or self.default_prompt


def nearly_equal(text: str, other: str) -> bool:
    """Whether two responses say the same but for case, punctuation and a few characters, or words of long ones."""
    plain = ["".join(c for c in t.casefold() if c.isalnum() or c.isspace()) for t in (text, other)]
    if max(map(len, plain)) > SHORT_TEXT:  # by letters it would take seconds
        return difflib.SequenceMatcher(None, plain[0].split(), plain[1].split(), autojunk=False).ratio() >= NEARLY_EQUAL
    return difflib.SequenceMatcher(None, plain[0], plain[1], autojunk=False).ratio() >= NEARLY_EQUAL

"""The four streaming metrics: LM perplexity, time difference, fluency, LM correctness.

They grade a model on a dialogue by teacher forcing: at every frame its decision to stay silent or
to speak, in every answer its next token. Where it stays silent at the frame an answer is due, the
frames that follow are appended, as if the answer had not been given, to see how late it speaks.
A *reply* is what leads up to one answer, and the answer. VideoLLM-online, section 4.1.

Two modes: `paper` counts as the public reference does, number for number, for comparison with
published results; `strict`, for our own reports, does not reward silence and grades only what can be
known. docs/metrics.md has them side by side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp
from typing import Literal, Protocol

import torch
from torch import Tensor

from actors.dialogue import IGNORED, Rendered, Template
from actors.model import VideoLLM
from actors.turns import Assistant

Mode = Literal["paper", "strict"]
Outcome = Literal[
    "early",
    "on_time",
    "late",
    "never",
    "unasked",
    "silent_in_last_turn_counted_as_0",
    "silent_nothing_to_append_counted_as_0",
]

Row = tuple[float, float, float, float]
NOTHING_GRADED: Row = (1.0, 0.0, 1.0, 1.0)


class Forward(Protocol):
    """A model: ids (T,), frames (F, N, D) and ascending positions (P,) to the logits (P, V) there."""

    def __call__(self, input_ids: Tensor, frames: Tensor, positions: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Reply:
    """How one reply went. Values are none where there was nothing to grade.

    `frame_diff` is in frames: positive spoke early, negative late. `num_correct` counts the answer's
    tokens before the first wrong one.
    """

    start: int
    stop: int
    num_frames: int
    num_decisions: int
    num_text: int
    nll: float | None
    num_correct: int | None
    p_silent: list[float]
    frame_diff: int | None = None
    fluency: float | None = None
    outcome: Outcome | None = None

    @property
    def lm_ppl(self) -> float | None:
        return None if self.nll is None else exp(self.nll)

    @property
    def lm_correctness(self) -> float | None:
        return None if self.num_correct is None else self.num_correct / self.num_text


@dataclass(frozen=True)
class StreamMetrics:
    """The four metrics of one or many dialogues; `time_diff` in seconds, `outcomes` counts replies."""

    lm_ppl: float | None
    time_diff: float | None
    fluency: float | None
    lm_correctness: float | None
    outcomes: dict[Outcome, int]


def forward_of(model: VideoLLM) -> Forward:
    """`model` as a Forward: logits are computed at the positions asked for only."""

    @torch.inference_mode()
    def forward(input_ids: Tensor, frames: Tensor, positions: Tensor) -> Tensor:
        chosen = torch.zeros(1, len(input_ids), dtype=torch.bool)
        chosen[0, positions] = True
        device = model.device
        return model(input_ids[None].to(device), frames.to(device), logits_at=chosen.to(device)).logits

    return forward


def evaluate(
    forward: Forward,
    template: Template,
    dialogue: Rendered,
    frames: Tensor,
    threshold: float = 0.725,
    mode: Mode = "strict",
    by_argmax: bool = True,
) -> list[Reply]:
    """Every reply of a dialogue, graded. `frames` (F, N, D) are all of the dialogue's frames.

    With `by_argmax` the model also speaks where silence is not the likeliest, as in the public reference.
    One forward pass over the dialogue and one for each reply whose answer did not come in time.
    """
    if len(frames) != dialogue.num_frames:
        raise ValueError(f"the dialogue has {dialogue.num_frames} frames, {len(frames)} were given")
    reader = _Reader(forward, template, dialogue, frames, threshold, by_argmax)
    return _paper_replies(reader) if mode == "paper" else _strict_replies(reader)


def summarize(dialogues: Sequence[Sequence[Reply]], fps: float, mode: Mode = "strict") -> StreamMetrics:
    """The metrics of several dialogues' replies, all graded in `mode`."""
    replies = [reply for dialogue in dialogues for reply in dialogue]
    outcomes = dict(Counter(reply.outcome for reply in replies if reply.outcome))
    if mode == "paper":
        return paper_average([paper_row(dialogue) for dialogue in dialogues], fps, outcomes)
    num_text = sum(reply.num_text for reply in replies)
    nll = sum(reply.nll * reply.num_text for reply in replies if reply.nll is not None)
    diff = _mean([abs(reply.frame_diff) for reply in replies if reply.frame_diff is not None])
    return StreamMetrics(
        lm_ppl=exp(nll / num_text) if num_text else None,
        time_diff=None if diff is None else diff / fps,
        fluency=_mean([reply.fluency for reply in replies if reply.fluency is not None]),
        lm_correctness=_mean([reply.lm_correctness for reply in replies if reply.lm_correctness is not None]),
        outcomes=outcomes,
    )


def paper_row(replies: Sequence[Reply]) -> Row:
    """Perplexity, frame difference, fluency, correctness of one dialogue, with the defaults of `paper`."""
    means = (
        _mean([reply.lm_ppl for reply in replies if reply.lm_ppl is not None]),
        _mean([abs(reply.frame_diff) for reply in replies if reply.frame_diff is not None]),
        _mean([reply.fluency for reply in replies if reply.fluency is not None]),
        _mean([reply.lm_correctness for reply in replies if reply.lm_correctness is not None]),
    )
    lm_ppl, frame_diff, fluency, correctness = (
        default if mean is None else mean for mean, default in zip(means, NOTHING_GRADED, strict=True)
    )
    return lm_ppl, frame_diff, fluency, correctness


def paper_average(rows: Sequence[Row], fps: float, outcomes: dict[Outcome, int]) -> StreamMetrics:
    """Mean over dialogues, each counted once however many replies it has."""
    columns = zip(*(rows or [NOTHING_GRADED]), strict=True)
    lm_ppl, frame_diff, fluency, correctness = (sum(column) / len(column) for column in columns)
    return StreamMetrics(lm_ppl, frame_diff / fps, fluency, correctness, outcomes)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


class _Reader:
    """One dialogue with the model's logits where something is learned, and what they decide."""

    def __init__(
        self,
        forward: Forward,
        template: Template,
        dialogue: Rendered,
        frames: Tensor,
        threshold: float,
        by_argmax: bool,
    ) -> None:
        self.forward = forward
        self.template = template
        self.dialogue = dialogue
        self.frames = frames
        self.threshold = threshold
        self.by_argmax = by_argmax
        self.input_ids = torch.tensor(dialogue.input_ids, dtype=torch.long)
        learned = [i for i, label in enumerate(dialogue.labels) if label != IGNORED]
        self._row = {position: row for row, position in enumerate(learned)}
        self._logits = forward(self.input_ids, frames, torch.tensor(learned)) if learned else torch.empty(0, 1)

    def learned(self, start: int, stop: int, at_frame: bool) -> list[int]:
        """Learned positions in [start, stop): decisions at frames, or the others."""
        dialogue = self.dialogue
        return [i for i in range(start, stop) if i in self._row and dialogue.at_frame[i] == at_frame]

    def num_frames(self, start: int, stop: int) -> int:
        return sum(self.dialogue.at_frame[start:stop])

    def read(self, start: int, stop: int, decided: list[int], text: list[int]) -> tuple[Reply, list[bool]]:
        """A reply over [start, stop) with what the model says at `text`; its decisions at `decided`, to be graded."""
        nll, num_correct = self._text(text) if text else (None, None)
        p_silent, speaks = self._decide(self._at(decided)) if decided else ([], [])
        reply = Reply(
            start=start,
            stop=stop,
            num_frames=self.num_frames(start, stop),
            num_decisions=len(decided),
            num_text=len(text),
            nll=nll,
            num_correct=num_correct,
            p_silent=p_silent,
        )
        return reply, speaks

    def speaks_later(self, position: int, first_frame: int, count: int) -> list[bool]:
        """Whether it speaks at each of `count` frames appended right after `position`, silent so far."""
        template = self.template
        frame = template.separator_ids + [template.frame_id] * template.frames.num_tokens
        prefix = position + 1
        input_ids = torch.cat([self.input_ids[:prefix], torch.tensor(frame * count)])
        frames = torch.cat([self.frames[: self.num_frames(0, prefix)], self.frames[first_frame : first_frame + count]])
        ends = torch.arange(1, count + 1) * len(frame) + prefix - 1
        return self._decide(self.forward(input_ids, frames, ends))[1]

    def _at(self, positions: list[int]) -> Tensor:
        return self._logits[[self._row[i] for i in positions]]

    def _text(self, positions: list[int]) -> tuple[float, int]:
        """Mean negative log-likelihood of the targets, and how many come before the first miss."""
        logits = self._at(positions).float()
        targets = torch.tensor([self.dialogue.labels[i] for i in positions], device=logits.device)
        right = logits.argmax(-1) == targets
        nll = torch.nn.functional.cross_entropy(logits, targets).item()
        return nll, int(right.long().cumprod(0).sum())

    def _decide(self, logits: Tensor) -> tuple[list[float], list[bool]]:
        silence = self.template.silence_id
        p_silent = logits.float().softmax(-1)[:, silence]
        speaks = p_silent < self.threshold
        if self.by_argmax:
            speaks |= logits.argmax(-1) != silence
        return p_silent.tolist(), speaks.tolist()


def _paper_replies(reader: _Reader) -> list[Reply]:
    """As the public reference counts, with what is wrong in it."""
    ids = reader.dialogue.input_ids
    stops = [i + 1 for i, token in enumerate(ids) if token == reader.template.eos_id]
    starts = [0, *stops][: len(stops)]
    replies = []
    frames_passed = 0
    for index, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        decided = reader.learned(start, stop, at_frame=True)
        text = reader.learned(start, stop, at_frame=False)
        if not decided and not text:
            continue  # and its frames are not counted as passed
        reply, speaks = reader.read(start, stop, decided, text)
        next_frames = reader.num_frames(starts[index + 1], stops[index + 1]) if index + 1 < len(stops) else None
        frame_diff: int | None = None
        outcome: Outcome | None = None
        if any(speaks):
            frame_diff = len(decided) - 1 - speaks.index(True)
            outcome = "early" if frame_diff else "on_time"
        elif decided and next_frames is None:
            frame_diff, outcome = 0, "silent_in_last_turn_counted_as_0"
        elif decided and next_frames is not None:
            window = min(next_frames, reply.num_frames - 1)
            frame_diff, outcome = 0, "silent_nothing_to_append_counted_as_0"
            if window:
                later = reader.speaks_later(decided[-1], frames_passed + reply.num_frames, window)
                frame_diff, outcome = (-later.index(True) - 1, "late") if any(later) else (-window, "never")
        fluency = _paper_fluency(reply, frame_diff)
        replies.append(replace(reply, frame_diff=frame_diff, fluency=fluency, outcome=outcome))
        frames_passed += reply.num_frames
    return replies


def _paper_fluency(reply: Reply, frame_diff: int | None) -> float | None:
    if frame_diff is None or reply.num_correct is None:
        return None
    right = reply.num_decisions + (reply.num_correct if frame_diff == 0 else -max(frame_diff, 1))
    return right / (reply.num_decisions + reply.num_text)


def _strict_replies(reader: _Reader) -> list[Reply]:
    """One reply for each answer, and one for frames after the last answer; without a target, none."""
    bounds = _answer_bounds(reader.dialogue)
    replies = []
    for index, (start, stop) in enumerate(bounds):
        decided, due = _foreseeable(reader, start, stop)
        # A dialogue that was clipped inside an answer ends in a position whose target is not in it any more.
        inside = [*reader.dialogue.in_answer[1:], False]
        text = [i for i in reader.learned(start, stop, at_frame=False) if inside[i]]
        if not decided and not text:
            continue
        reply, speaks = reader.read(start, stop, decided, text)
        spoke_at = speaks.index(True) if any(speaks) else None
        frame_diff: int | None = None
        outcome: Outcome | None = None
        if due is None:
            right = len(decided) if spoke_at is None else spoke_at
            outcome = None if spoke_at is None else "unasked"
        elif spoke_at is not None:
            frame_diff = reader.num_frames(decided[spoke_at], due)
            right = spoke_at + (frame_diff == 0)
            outcome = "early" if frame_diff else "on_time"
        else:
            num_graded = reader.num_frames(decided[0], due + 1)
            following = reader.num_frames(*bounds[index + 1]) if index + 1 < len(bounds) else 0
            window = min(following, num_graded - 1)
            later = reader.speaks_later(due, reader.num_frames(0, due + 1), window) if window else []
            frame_diff, outcome = (-later.index(True) - 1, "late") if any(later) else (-num_graded, "never")
            right = len(decided) - 1
        if right == len(decided):
            right += reply.num_correct or 0
        fluency = right / (len(decided) + len(text))
        replies.append(replace(reply, frame_diff=frame_diff, fluency=fluency, outcome=outcome))
    return replies


def _answer_bounds(dialogue: Rendered) -> list[tuple[int, int]]:
    """Positions [start, stop) that lead up to and hold one answer each, then what follows the last."""
    length = len(dialogue.input_ids)
    ends = [i + 1 for i in range(length) if dialogue.in_answer[i] and not any(dialogue.in_answer[i + 1 : i + 2])]
    stops = ends if ends and ends[-1] == length else [*ends, length]
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _foreseeable(reader: _Reader, start: int, stop: int) -> tuple[list[int], int | None]:
    """Learned frames whose right decision follows from what was seen, and the one where an answer is due, if any.

    A stream that ends because the user speaks, or the recording stops, says nothing about its last frame.
    """
    dialogue = reader.dialogue
    decided: list[int] = []
    for position in reader.learned(start, stop, at_frame=True):
        if dialogue.labels[position] == reader.template.silence_id:
            decided.append(position)
            continue
        follower = dialogue.turn_of[position] + 1
        if follower < len(dialogue.turns) and isinstance(dialogue.turns[follower], Assistant):
            return [*decided, position], position
    return decided, None

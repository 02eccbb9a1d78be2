"""Dialogue to token ids: one set of pieces for training, evaluation and the live context.

A dialogue is system, user, assistant and stream turns. In text, with `<v>` for a frame token:

    {bos}{system}\\n
    \\n[<v>..<v>,<v>..<v>]          a stream: N tokens a frame, a separator between frames (if there is one)
    \\nUser: {question}
    \\nAssistant: {answer}{eos}

`DialogueWriter` writes these pieces one after another, as a live session does; `Template.render`
drives the same writer over a whole dialogue and records, for every position, the id it should
predict. Nothing is searched for in rendered text, so there is no template on one side and table of
offsets on the other.

Text is turned into ids one segment at a time. A segment is all text between two control tokens
(bos, eos, separator, frame tokens), ended early by a generation point, which stands after
"Assistant:". Tokenizers look ahead within a segment ("\\n\\n" is one token or two, depending on what
follows), hence text stays pending in the writer until its segment is complete. Text never becomes a
control token, whatever it spells. VideoLLM-online, section 3.2 and figure 3.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from actors.config import FrameConfig
from actors.tokenizer import TextTokenizer
from actors.turns import Assistant, DialogueError, Stream, System, Turn, User, parse

IGNORED = -100
FRAME_TEXT = "<v>"
GENERATION_POINT = "Assistant:"


@dataclass(frozen=True)
class Rendered:
    """A dialogue as a model reads it. All lists but `turns` are as long as the sequence (T).

    `labels` are targets, already shifted: `labels[i]` is what position i should predict, IGNORED
    where nothing is learned. `at_frame` marks the last token of every frame, where the model decides
    to stay silent or to speak, `in_answer` what stands after "Assistant:", eos included. `turn_of` is
    the index in `turns` (those given, without streams of no frame) a position was written for.
    """

    input_ids: list[int]
    labels: list[int]
    at_frame: list[bool]
    in_answer: list[bool]
    turn_of: list[int]
    turns: list[Turn]
    num_frames: int
    text: str


@dataclass(frozen=True)
class Piece:
    """Ids with, for each, whether it is learned and the turn it belongs to; and the same as text."""

    ids: list[int]
    learned: list[bool]
    turns: list[int]
    text: str


@dataclass(frozen=True)
class _Text:
    text: str
    learned: bool
    turn: int


class DialogueWriter:
    """Writes a dialogue piece by piece; every method returns the ids to append to the context now.

    Live use is `system`, then any of `frame`, `user`, `speak`; after the latter two the caller appends
    the answer's tokens and calls `close`. What training adds (`ask`, `answer`, `end_stream`, `rest`,
    `learn`) writes the same pieces. `last` is the piece returned last, `turn` the turn being written.
    """

    def __init__(self, template: Template) -> None:
        self.template = template
        self.turn = 0
        self.last = Piece([], [], [], "")
        self._pending: tuple[_Text, ...] = ()
        self._in_stream = False
        self._answering = False
        self._learn_newline = False
        self._empty = True

    def copy(self) -> DialogueWriter:
        """A writer that goes on from here by itself."""
        return copy.copy(self)

    def system(self, text: str) -> list[int]:
        """Start the dialogue: bos now, where the tokenizer has one; the text stays pending."""
        if not self._empty:
            raise DialogueError("a system prompt was written into a dialogue that had begun: it can only be the first")
        ids = self._control(self.template.bos_ids, self.template.bos_text)
        self._add(text + "\n")
        return ids

    def frame(self) -> list[int]:
        """One frame: what comes before it, then N placeholders."""
        self._check_closed("a frame")
        template = self.template
        if self._in_stream:
            before = self._piece(template.separator_ids, template.frames.separator)
        else:
            self._newline()
            self._add("[")
            before = self._take()
        self._in_stream = True
        frame = [template.frame_id] * template.frames.num_tokens
        return self._write(before, self._piece(frame, FRAME_TEXT * len(frame)))

    def user(self, text: str) -> list[int]:
        """A question up to the generation point; ends a stream that is open."""
        self.ask(text)
        return self.speak()

    def speak(self, learn: bool = False) -> list[int]:
        """The generation point, reached without a question if none was asked; ends a stream that is open."""
        self._check_closed("an answer")
        self.end_stream()
        self._newline()
        self._add(GENERATION_POINT, learn)
        self._answering = True
        return self._write(self._take())

    def close(self, learn: bool = False) -> list[int]:
        """End the answer, whose tokens the caller appended, with eos."""
        if not self._answering:
            raise DialogueError("no answer is open: write user() or speak() before close()")
        self._answering = False
        return self._control([self.template.eos_id], self.template.eos_text, learn)

    def ask(self, text: str) -> None:
        """A question without a generation point: all of it stays pending."""
        self._check_closed("a question")
        self.end_stream()
        self._newline()
        self._add("User: " + text)

    def answer(self, text: str, learn: bool = False) -> list[int]:
        """A whole answer after the generation point, as its own segment; `close` must follow."""
        if not self._answering:
            raise DialogueError("no answer is open: write user() or speak() before answer()")
        self._add(" " + text, learn)
        return self._write(self._take())

    def end_stream(self, learn: bool = False) -> None:
        """Close the bracket of an open stream; with `learn`, it and the newline after it are targets."""
        if self._in_stream:
            self._add("]", learn)
            self._in_stream = False
            self._learn_newline = learn

    def rest(self) -> list[int]:
        """What is still pending, where a dialogue ends without an answer."""
        self.end_stream()
        return self._write(self._take())

    def _check_closed(self, what: str) -> None:
        if self._answering:
            raise DialogueError(f"{what} follows an open answer: end it with close() first")

    def _add(self, text: str, learn: bool = False) -> None:
        self._empty = False
        self._pending += (_Text(text, learn, self.turn),)

    def _newline(self) -> None:
        self._add("\n", self._learn_newline)
        self._learn_newline = False

    def _take(self) -> Piece:
        """The pending segment as ids; an id is learned if any of its characters is."""
        spans, self._pending = self._pending, ()
        learned = [span.learned for span in spans for _ in span.text]
        turns = [span.turn for span in spans for _ in span.text]
        text = "".join(span.text for span in spans)
        tokens = self.template.plain.encode(text)
        return Piece(
            ids=[token.id for token in tokens],
            learned=[any(learned[token.start : token.stop]) for token in tokens],
            turns=[turns[token.start] for token in tokens],
            text=text,
        )

    def _piece(self, ids: list[int], text: str, learn: bool = False) -> Piece:
        return Piece(list(ids), [learn] * len(ids), [self.turn] * len(ids), text)

    def _control(self, ids: list[int], text: str, learn: bool = False) -> list[int]:
        self._empty = False
        return self._write(self._take(), self._piece(ids, text, learn))

    def _write(self, *pieces: Piece) -> list[int]:
        self.last = Piece(
            ids=[i for piece in pieces for i in piece.ids],
            learned=[flag for piece in pieces for flag in piece.learned],
            turns=[turn for piece in pieces for turn in piece.turns],
            text="".join(piece.text for piece in pieces),
        )
        return list(self.last.ids)


class Template:
    """How one tokenizer and one kind of frame turn dialogues into ids.

    `frame_id` is the placeholder of a frame token: the first id outside the LLM's embedding table
    (`vocab_size`, which may be larger than the tokenizer). `silence_id` is what a model predicts at a
    frame to stay silent: the separator, or eos where frames have none.
    Raises DialogueError if the tokenizer has no eos, or the separator is not one token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, frames: FrameConfig, vocab_size: int | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise DialogueError("the tokenizer has no eos token, which ends every answer: set tokenizer.eos_token")
        self.tokenizer = tokenizer
        self.frames = frames
        self.plain = TextTokenizer(tokenizer)
        self.frame_id: int = len(tokenizer) if vocab_size is None else vocab_size
        self.eos_id: int = tokenizer.eos_token_id
        self.eos_text: str = str(tokenizer.eos_token)
        self.bos_ids: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.bos_text: str = str(tokenizer.bos_token) if self.bos_ids else ""
        self.separator_ids: list[int] = [token.id for token in self.plain.encode(frames.separator)]
        if frames.separator and len(self.separator_ids) != 1:
            raise DialogueError(
                f"frames.separator {frames.separator!r} is {len(self.separator_ids)} tokens {self.separator_ids} of "
                "this tokenizer, expected one: choose a separator that is one token"
            )
        self.silence_id: int = self.separator_ids[0] if self.separator_ids else self.eos_id
        if self.plain.largest_id >= self.frame_id:
            raise DialogueError(
                f"the tokenizer writes ids up to {self.plain.largest_id}, the LLM has {self.frame_id} embeddings: "
                "this tokenizer belongs to another LLM"
            )

    def writer(self) -> DialogueWriter:
        """A writer at the start of a dialogue."""
        return DialogueWriter(self)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` as it was written, a leading space included; control tokens and frames are left out."""
        return self.plain.decode([i for i in ids if i < self.frame_id])

    def text(self, conversation: Sequence[Turn | Mapping[str, object]]) -> str:
        """The dialogue for reading, control tokens spelled out."""
        return self.render(conversation).text

    def render(self, conversation: Sequence[Turn | Mapping[str, object]], prompt: bool = False) -> Rendered:
        """The whole dialogue with its targets; with `prompt`, it ends at the generation point.

        Raises DialogueError for what is no dialogue.
        """
        recorder = _Recorder(self.writer())
        turns = [turn for turn in parse(conversation) if not (isinstance(turn, Stream) and turn.num_frames == 0)]
        for index, turn in enumerate(turns):
            recorder.write(
                index,
                turn,
                frames_follow=any(isinstance(follower, Stream) for follower in turns[index + 1 : index + 2]),
            )
        return recorder.finish(turns, prompt)


class _Recorder:
    """Drives a writer over turns and keeps what it writes, with the targets."""

    def __init__(self, writer: DialogueWriter) -> None:
        self.writer = writer
        self.input_ids: list[int] = []
        self.labels: list[int] = []
        self.at_frame: list[bool] = []
        self.in_answer: list[bool] = []
        self.turn_of: list[int] = []
        self.texts: list[str] = []

    def write(self, index: int, turn: Turn, frames_follow: bool) -> None:
        writer = self.writer
        writer.turn = index
        if isinstance(turn, System):
            self._keep(writer.system(turn.content))
        elif isinstance(turn, User):
            writer.ask(turn.content)
        elif isinstance(turn, Assistant):
            self._keep(writer.speak(turn.learn))
            start = len(self.input_ids)
            self._keep(writer.answer(turn.content, turn.learn))
            self._keep(writer.close(turn.learn))
            self.in_answer[start:] = [True] * (len(self.input_ids) - start)
        else:
            self._write_stream(turn, frames_follow)

    def finish(self, turns: list[Turn], prompt: bool) -> Rendered:
        self._keep(self.writer.speak() if prompt else self.writer.rest())
        return Rendered(
            input_ids=self.input_ids,
            labels=self.labels,
            at_frame=self.at_frame,
            in_answer=self.in_answer,
            turn_of=self.turn_of,
            turns=turns,
            num_frames=sum(self.at_frame),
            text="".join(self.texts),
        )

    def _write_stream(self, turn: Stream, frames_follow: bool) -> None:
        """A frame that another frame follows, be it of the next stream, learns silence; else to end the stream."""
        for index in range(turn.num_frames):
            self._keep(self.writer.frame())
            self.at_frame[-1] = True
            if index < turn.num_learned and (frames_follow or index + 1 < turn.num_frames):
                self.labels[-1] = self.writer.template.silence_id
        self.writer.end_stream(learn=turn.num_learned == turn.num_frames and not frames_follow)

    def _keep(self, ids: list[int]) -> None:
        written = self.writer.last
        targets = [i if learned else IGNORED for i, learned in zip(ids, written.learned, strict=True)]
        if self.labels and targets and targets[0] != IGNORED:
            self.labels[-1] = targets[0]
        self.labels += [*targets[1:], IGNORED] if targets else []
        self.input_ids += ids
        self.at_frame += [False] * len(ids)
        self.in_answer += [False] * len(ids)
        self.turn_of += written.turns
        self.texts.append(written.text)


@dataclass(frozen=True)
class Batch:
    """Rendered dialogues of one length, padded on the left: all (B, T); labels IGNORED at padding."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    at_frame: torch.Tensor


def collate(dialogues: Sequence[Rendered], pad_id: int) -> Batch:
    """Several dialogues as one batch; their frames follow each other in the same order."""
    length = max(len(dialogue.input_ids) for dialogue in dialogues)

    def padded(rows: Sequence[Sequence[int | bool]], value: int | bool) -> torch.Tensor:
        return torch.tensor([[value] * (length - len(row)) + list(row) for row in rows])

    return Batch(
        input_ids=padded([d.input_ids for d in dialogues], pad_id),
        attention_mask=padded([[1] * len(d.input_ids) for d in dialogues], 0),
        labels=padded([d.labels for d in dialogues], IGNORED),
        at_frame=padded([d.at_frame for d in dialogues], False),
    )

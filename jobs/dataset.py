"""Dialogues joined with the frame tokens of their videos, as samples and packs for training."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from actors.dialogue import IGNORED, Rendered, Template
from actors.objective import Objective, taught
from actors.packed import Packed
from jobs.dialogues import Dialogue
from jobs.encoding_summary import failures
from jobs.frame_store import FrameStore
from jobs.plan import Measured, Pick

logger = logging.getLogger(__name__)

MOST_NAMES = 20  # of videos, said aloud


class DatasetError(ValueError):
    """Dialogues and frame tokens do not fit together; says which, with both values."""


@dataclass(frozen=True)
class Sample:
    """A rendered dialogue and the tokens (F, N, D) of its frames."""

    dialogue_id: str
    rendered: Rendered
    frames: torch.Tensor

    @property
    def num_labels(self) -> int:
        """Positions at which something is learned."""
        return sum(label != IGNORED for label in self.rendered.labels)


@dataclass(frozen=True)
class PackedSamples:
    """Samples in one row, the tokens (F, N, D) of all their frames, and the weights (T,) of their labels."""

    dialogue_ids: tuple[str, ...]
    packed: Packed
    frames: torch.Tensor
    weights: torch.Tensor
    text_labels: int
    stream_labels: int


class TrainingSet:
    """Dialogues over the videos of a store, each rendered when it is asked for.

    Raises DatasetError where fps, tokens a frame or frame ranges disagree, a dialogue has nothing to
    learn, or no dialogue is left. Left out, and told in lines of `left_out`, are dialogues whose video is not in
    the store, and those that show frames which jobs.encode_frames found damaged.
    """

    def __init__(
        self,
        dialogues: Sequence[Dialogue],
        store: FrameStore,
        template: Template,
        objective: Objective = "streaming",
        max_tokens: int | None = None,
    ) -> None:
        self.store = store
        self.template = template
        self.objective: Objective = objective
        self.max_tokens = max_tokens
        if template.frames.num_tokens != store.info.num_tokens:
            raise DatasetError(
                f"the store {store.path} has {store.info.num_tokens} tokens a frame, "
                f"model.frames says {template.frames.num_tokens}: run jobs.encode_frames again into another folder"
            )
        there = [dialogue for dialogue in dialogues if dialogue.num_frames == 0 or dialogue.video_id in store]
        absent = [dialogue for dialogue in dialogues if dialogue.num_frames and dialogue.video_id not in store]
        why = failures(store.path) if absent else {}
        failed = [dialogue for dialogue in absent if dialogue.video_id in why]
        unknown = [dialogue for dialogue in absent if dialogue.video_id not in why]
        self.dialogues, cut = list[Dialogue](), list[Dialogue]()
        for dialogue in there:
            (self.dialogues if self._fits(dialogue) else cut).append(dialogue)
        reasons = {
            "not in the frame-token store": unknown,
            "jobs.encode_frames failed on them": failed,
            "they show frames that are damaged": cut,
        }
        self.left_out = [f"{_counted(some)}, {reason}: {_named(some)}" for reason, some in reasons.items() if some]
        if not self.dialogues and (failed or cut):
            first = (failed or cut)[0].video_id
            raise DatasetError(
                f"no dialogue is left: {'; '.join(self.left_out)} ({why.get(first) or store.damage(first)}): "
                "put whole files in their place and run jobs.encode_frames again (into another store.folder if damaged)"
            )
        if not self.dialogues:
            wanted = f"none of the {len({one.video_id for one in unknown})} videos in them"
            raise DatasetError(
                f"dialogues and frame tokens have no video in common: {wanted if unknown else 'there are no dialogues'}"
                f" is in {store.path}, which has {len(store.video_ids())}: run jobs.encode_frames, "
                "or look at data.folder's coverage.json"
            )
        for line in self.left_out:
            logger.warning("left out: %s", line)

    def __len__(self) -> int:
        return len(self.dialogues)

    def __getitem__(self, index: int) -> Sample:
        dialogue = self.dialogues[index]
        rendered = self._rendered(dialogue)
        return Sample(dialogue.dialogue_id, rendered, self._frames(dialogue, rendered.num_frames))

    def teaches(self, index: int) -> bool:
        """Whether there is something to learn in a dialogue, after clipping."""
        whole = self.template.render(taught(self.dialogues[index].conversation, self.objective))
        return any(label != IGNORED for label in self._clipped(whole).labels)

    def measure(self, index: int) -> Measured:
        """What a dialogue has in it, without reading its frames. Raises DatasetError where nothing is learned."""
        dialogue = self.dialogues[index]
        whole = self.template.render(taught(dialogue.conversation, self.objective))
        rendered = self._clipped(whole)
        labels = [(label, frame) for label, frame in zip(rendered.labels, rendered.at_frame, strict=True)]
        if all(label == IGNORED for label, _ in labels):
            clipped = "clipped to training.max_tokens, " if len(rendered.labels) < len(whole.labels) else ""
            wanted = "turn with learn: true"
            if self.objective == "interleaved":
                wanted = "response with learn: true, the objective interleaved needs one"
            raise DatasetError(f"dialogue {dialogue.dialogue_id!r} has nothing to learn: {clipped}it has no {wanted}")
        silence = self.template.silence_id
        return Measured(
            tokens=len(rendered.input_ids),
            frames=rendered.num_frames,
            text=sum(label != IGNORED and not frame for label, frame in labels),
            silent=sum(label == silence and frame for label, frame in labels),
            speaking=sum(label not in (IGNORED, silence) and frame for label, frame in labels),
            clipped=len(whole.input_ids) - len(rendered.input_ids),
        )

    def packed(
        self,
        picks: Sequence[Pick],
        stream_weights: tuple[float, float] = (1, 1),
        keep_silence: float = 1,
        seed: int = 0,
    ) -> PackedSamples:
        """These dialogues in one row; labels at silent and speaking frames have the two `stream_weights`.

        Of the silent frames only the share `keep_silence` is learned, drawn for every dialogue and epoch anew.
        """
        samples = [self[pick.index] for pick in picks]
        if keep_silence < 1:
            samples = [
                replace(sample, rendered=self._thinned(sample, keep_silence, f"{seed} {pick.epoch}"))
                for sample, pick in zip(samples, picks, strict=True)
            ]
        packed = Packed.of([sample.rendered for sample in samples])
        at_frame = packed.input_ids == self.template.frame_id
        silent, speaking = stream_weights
        learned = packed.labels != IGNORED
        if not learned.any():
            raise DatasetError(f"nothing is learned in {', '.join(s.dialogue_id for s in samples)}")
        of_frames = torch.where(packed.labels == self.template.silence_id, silent, speaking)
        return PackedSamples(
            dialogue_ids=tuple(sample.dialogue_id for sample in samples),
            packed=packed,
            frames=torch.cat([sample.frames for sample in samples]),
            weights=torch.where(at_frame, of_frames, 1.0),
            text_labels=int((learned & ~at_frame).sum()),
            stream_labels=int((learned & at_frame).sum()),
        )

    def video_ids(self) -> list[str]:
        """The videos that training sees, sorted."""
        return sorted({dialogue.video_id for dialogue in self.dialogues if dialogue.num_frames})

    def _rendered(self, dialogue: Dialogue) -> Rendered:
        return self._clipped(self.template.render(taught(dialogue.conversation, self.objective)))

    def _clipped(self, rendered: Rendered) -> Rendered:
        limit = self.max_tokens
        return rendered if limit is None else clip(rendered, limit, self.template.frame_id)

    def _thinned(self, sample: Sample, keep: float, seed: str) -> Rendered:
        """The share `keep` of its silent frames; one of them where nothing would be learned otherwise."""
        draws = random.Random(f"{seed} {sample.dialogue_id}")
        silence, rendered = self.template.silence_id, sample.rendered
        labels = list(rendered.labels)
        silent = [i for i, label in enumerate(labels) if rendered.at_frame[i] and label == silence]
        for position in silent:
            if draws.random() >= keep:
                labels[position] = IGNORED
        if silent and all(label == IGNORED for label in labels):
            labels[draws.choice(silent)] = silence
        return replace(rendered, labels=labels)

    def _frames(self, dialogue: Dialogue, count: int) -> torch.Tensor:
        """Tokens of its first `count` frames."""
        if count == 0:
            return torch.empty(0, self.store.info.num_tokens, self.store.info.width, dtype=torch.float16)
        first = dialogue.frames[0]
        return self.store.frames(dialogue.video_id, first, first + count)

    def _fits(self, dialogue: Dialogue) -> bool:
        """Whether the store has its frames; False where it knows why not. Raises DatasetError."""
        where = f"dialogue {dialogue.dialogue_id!r}"
        if dialogue.fps != self.store.info.fps:
            raise DatasetError(
                f"{where} counts frames at {dialogue.fps:g} fps, the store {self.store.path} has "
                f"{self.store.info.fps:g} fps: set data.fps or store.fps and run its job again"
            )
        if dialogue.num_frames == 0:
            return True
        count = self.store.num_frames(dialogue.video_id)
        if dialogue.frames[1] > count and not self.store.damage(dialogue.video_id):
            raise DatasetError(
                f"{where} shows frames {dialogue.frames[0]}..{dialogue.frames[1] - 1} of video {dialogue.video_id!r}, "
                f"the store has {count}: run jobs.build_dialogues and jobs.encode_frames with the same video"
            )
        return dialogue.frames[1] <= count


def _counted(dialogues: Sequence[Dialogue]) -> str:
    videos = len({dialogue.video_id for dialogue in dialogues})
    return f"{len(dialogues)} dialogue{'s'[: len(dialogues) != 1]} of {videos} video{'s'[: videos != 1]}"


def _named(dialogues: Sequence[Dialogue]) -> str:
    names = sorted({dialogue.video_id for dialogue in dialogues})
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def clip(rendered: Rendered, limit: int, frame_id: int) -> Rendered:
    """The beginning of a dialogue, at most `limit` positions of it, without a frame of which only a part would be left.

    What stays is learned as before, including what its last position should say.
    """
    if len(rendered.input_ids) <= limit:
        return rendered
    stop = limit
    while stop and rendered.input_ids[stop - 1] == frame_id and not rendered.at_frame[stop - 1]:
        stop -= 1
    return replace(
        rendered,
        input_ids=rendered.input_ids[:stop],
        labels=rendered.labels[:stop],
        at_frame=rendered.at_frame[:stop],
        in_answer=rendered.in_answer[:stop],
        turn_of=rendered.turn_of[:stop],
        num_frames=sum(rendered.at_frame[:stop]),
    )

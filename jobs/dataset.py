"""Dialogues joined with the frame tokens of their videos, as samples and batches for training."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from actors.dialogue import IGNORED, Batch, Rendered, Template, collate
from actors.objective import Objective, taught
from jobs.dialogues import Dialogue
from jobs.frame_store import FrameStore

logger = logging.getLogger(__name__)


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


class TrainingSet:
    """Dialogues over the videos of a store, each rendered when it is asked for.

    Raises DatasetError where fps, tokens a frame or frame ranges disagree, a dialogue has nothing to
    learn, or no dialogue has its video in the store. Dialogues whose video is not there are left out.
    """

    def __init__(
        self,
        dialogues: Sequence[Dialogue],
        store: FrameStore,
        template: Template,
        objective: Objective = "streaming",
    ) -> None:
        self.store = store
        self.template = template
        self.objective: Objective = objective
        if template.frames.num_tokens != store.info.num_tokens:
            raise DatasetError(
                f"the store {store.path} has {store.info.num_tokens} tokens a frame, "
                f"model.frames says {template.frames.num_tokens}: run jobs.encode_frames again into another folder"
            )
        self.dialogues = [d for d in dialogues if d.num_frames == 0 or d.video_id in store]
        absent = sorted({dialogue.video_id for dialogue in dialogues} - {d.video_id for d in self.dialogues})
        if not self.dialogues:
            wanted = f"none of the {len(absent)} videos in them" if absent else "there are no dialogues"
            raise DatasetError(
                f"dialogues and frame tokens have no video in common: {wanted} is in {store.path}, "
                f"which has {len(store.video_ids())}: run jobs.encode_frames, or look at data.folder's coverage.json"
            )
        if absent:
            logger.warning("left out, not in the frame-token store: %s", ", ".join(absent))
        for dialogue in self.dialogues:
            self._check(dialogue)

    def __len__(self) -> int:
        return len(self.dialogues)

    def __getitem__(self, index: int) -> Sample:
        dialogue = self.dialogues[index]
        sample = Sample(
            dialogue_id=dialogue.dialogue_id,
            rendered=self.template.render(taught(dialogue.conversation, self.objective)),
            frames=self._frames(dialogue),
        )
        if sample.num_labels == 0:
            raise DatasetError(f"dialogue {dialogue.dialogue_id!r} has nothing to learn: give a turn learn: true")
        return sample

    def video_ids(self) -> list[str]:
        """The videos that training sees, sorted."""
        return sorted({dialogue.video_id for dialogue in self.dialogues if dialogue.num_frames})

    def _frames(self, dialogue: Dialogue) -> torch.Tensor:
        if dialogue.num_frames == 0:
            return torch.empty(0, self.store.info.num_tokens, self.store.info.width, dtype=torch.float16)
        return self.store.frames(dialogue.video_id, *dialogue.frames)

    def _check(self, dialogue: Dialogue) -> None:
        where = f"dialogue {dialogue.dialogue_id!r}"
        if dialogue.fps != self.store.info.fps:
            raise DatasetError(
                f"{where} counts frames at {dialogue.fps:g} fps, the store {self.store.path} has "
                f"{self.store.info.fps:g} fps: set data.fps or store.fps and run its job again"
            )
        if dialogue.num_frames == 0:
            return
        count = self.store.num_frames(dialogue.video_id)
        if dialogue.frames[1] > count:
            raise DatasetError(
                f"{where} shows frames {dialogue.frames[0]}..{dialogue.frames[1] - 1} of video {dialogue.video_id!r}, "
                f"the store has {count}: run jobs.build_dialogues and jobs.encode_frames with the same video"
            )


def batch_of(samples: Sequence[Sample], pad_id: int) -> tuple[Batch, torch.Tensor]:
    """Samples as one padded batch, and their frame tokens one after another (F, N, D)."""
    return collate([sample.rendered for sample in samples], pad_id), torch.cat([sample.frames for sample in samples])


def step_order(count: int, batch: int, step: int, seed: int) -> list[int]:
    """The indices of optimizer step `step` (from 0): a pure function, so that a run can go on anywhere.

    Every epoch is another permutation of all samples; a batch may reach into the next epoch.
    """
    indices = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, count)
        indices.append(_permutation(count, seed, epoch)[place])
    return indices


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return tuple(order)

"""What became of annotations: which videos and texts are in dialogues, and why the others are not."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from pydantic import Field

from actors.config import Section
from jobs.dialogues import SPLITS, Dialogue

logger = logging.getLogger(__name__)

MOST_REASONS = 20  # said aloud; coverage.json has all


class Quarantined(Section):
    """A text that a language model wrote and that is of no use: kept for people to look at."""

    video_id: str
    dataset: str
    part: str
    reason: str
    text: str
    prompt: str = ""


class Result(Section):
    """What became of one annotation row; travels as JSON, since turns of several kinds fit into no Arrow column."""

    video_id: str
    source: str
    sha256: str = ""
    dataset: str = ""
    part: str = ""
    split: str
    texts: int
    texts_used: int = 0
    texts_dropped: dict[str, int] = Field(default_factory=dict)
    dialogues: tuple[Dialogue, ...] = ()
    quarantined: tuple[Quarantined, ...] = ()
    left_out: str | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What no two rows have in common."""
        return self.video_id, self.dataset, self.part, self.split


@dataclass(frozen=True)
class Outcome:
    """A result of which everything long has been written to files."""

    result: Result
    dialogues: int
    frames: int
    quarantined: Counter[str]

    @classmethod
    def of(cls, result: Result) -> Outcome:
        return cls(
            result=result.model_copy(update={"dialogues": (), "quarantined": ()}),
            dialogues=len(result.dialogues),
            frames=sum(dialogue.num_frames for dialogue in result.dialogues),
            quarantined=Counter(bad.reason for bad in result.quarantined),
        )


@dataclass
class Coverage:
    """What became of the annotated videos and their texts."""

    videos: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    texts: int = 0
    texts_used: int = 0
    texts_dropped: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    frames: int = 0
    dialogues: Counter[str] = field(default_factory=Counter)
    datasets: Counter[str] = field(default_factory=Counter)
    made_from: dict[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, outcomes: Iterable[Outcome]) -> Coverage:
        """The sum; a video of which anything is used is not left out."""
        outcomes = list(outcomes)
        coverage = cls(videos=len({outcome.result.video_id for outcome in outcomes}))
        used = {outcome.result.video_id for outcome in outcomes if outcome.result.left_out is None}
        for outcome in outcomes:
            result = outcome.result
            coverage.texts += result.texts
            coverage.texts_used += result.texts_used
            coverage.texts_dropped.update(result.texts_dropped)
            coverage.quarantined.update(outcome.quarantined)
            coverage.dialogues[result.split] += outcome.dialogues
            coverage.frames += outcome.frames
            if result.left_out is not None and result.video_id not in used:
                coverage.left_out[result.video_id] = result.left_out
            if result.dataset:
                coverage.datasets[result.dataset] += outcome.dialogues
        return coverage

    def to_json(self) -> str:
        return json.dumps(
            {
                "videos": {
                    "annotated": self.videos,
                    "used": self.videos - len(self.left_out),
                    "left_out": self.left_out,
                },
                "texts": {"annotated": self.texts, "used": self.texts_used, "dropped": dict(self.texts_dropped)},
                "quarantined": dict(self.quarantined),
                "dialogues": {split: self.dialogues[split] for split in SPLITS},
                "dialogues_of_datasets": dict(self.datasets),
                "frames": self.frames,
                "made_from": self.made_from,
            },
            indent=2,
            ensure_ascii=False,
            sort_keys=True,
        )

    def reasons(self) -> str:
        """Why videos were left out: the first few."""
        return "; ".join(islice(self.left_out.values(), MOST_REASONS))

    def report(self, folder: str) -> None:
        """Say what came out, as log lines."""
        for reason in islice(self.left_out.values(), MOST_REASONS):
            logger.warning("left out: %s", reason)
        if len(self.left_out) > MOST_REASONS:
            more = len(self.left_out) - MOST_REASONS
            logger.warning("left out: %s more, listed in %s/coverage.json", more, folder)
        for name, count in sorted(self.datasets.items()):
            logger.info("dataset=%s dialogues=%s", name, count)
        for reason, count in self.texts_dropped.items():
            logger.info("texts dropped: %s: %s", reason, count)
        for reason, count in self.quarantined.items():
            logger.warning("quarantined in %s/quarantine.jsonl: %s: %s", folder, reason, count)
        logger.info(
            "folder=%s videos=%s/%s texts=%s/%s frames=%s dialogues=%s",
            folder,
            self.videos - len(self.left_out),
            self.videos,
            self.texts_used,
            self.texts,
            self.frames,
            " ".join(f"{split}={self.dialogues[split]}" for split in SPLITS),
        )
        if not self.dialogues["train"]:
            logger.warning("all videos fell into validation: set data.validation_fraction=0 to train on them")

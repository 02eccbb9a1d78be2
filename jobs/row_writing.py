"""Annotation rows with texts that were written for them: chats about steps and captions, rewritten narrations.

A stage of jobs.build_dialogues, between reading and building. What a writer wrote and nobody can use
stays with its row as a note, and ends in `quarantine.jsonl`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import Field

from actors.config import Section
from actors.video import VideoError
from jobs.annotations import AnnotationsConfig, Moment, VideoAnnotation
from jobs.chat_writing import chat_request, read_chat
from jobs.coverage import Quarantined
from jobs.extents import extent_of
from jobs.rewriting import rewriting_requests, rewritten
from jobs.writer import Request, Text, UnusableText, Writer

REFINED = {"ego4d_narration": "ego4d_refined_narration"}


class WrittenRow(Section):
    """A row, and what became of the texts that were written for it."""

    annotation: VideoAnnotation
    quarantined: tuple[Quarantined, ...] = ()
    dropped: dict[str, int] = Field(default_factory=dict)


@dataclass(frozen=True)
class _Chat:
    row: VideoAnnotation
    request: Request

    @property
    def requests(self) -> list[Request]:
        return [self.request]

    def read(self, texts: Sequence[Text]) -> WrittenRow:
        """The row with the chat in place of what it is about; with nothing if that is of no use."""
        captions = self.row.moments if self.row.kind == "caption_chat" else None
        try:
            messages = read_chat(_words(texts[0]), captions)
        except UnusableText as error:
            bad = _quarantined(self.row, self.request, texts[0], error)
            return WrittenRow(annotation=self.row.model_copy(update={"moments": ()}), quarantined=(bad,))
        return WrittenRow(annotation=self.row.model_copy(update={"moments": tuple(messages)}))


@dataclass(frozen=True)
class _Narration:
    row: VideoAnnotation
    parts: Sequence[tuple[Sequence[Moment], Request]]

    @property
    def requests(self) -> list[Request]:
        return [request for _, request in self.parts]

    def read(self, texts: Sequence[Text]) -> WrittenRow:
        """The row with those of its texts that could be rewritten."""
        moments: list[Moment] = []
        quarantined, dropped = [], Counter[str]()
        for (part, request), text in zip(self.parts, texts, strict=True):
            try:
                moments += rewritten(part, _words(text))
            except UnusableText as error:
                quarantined.append(_quarantined(self.row, request, text, error))
                dropped["not rewritten"] += len(part)
        kind = REFINED.get(self.row.kind, self.row.kind)
        row = self.row.model_copy(update={"moments": tuple(moments), "kind": kind})
        return WrittenRow(annotation=row, quarantined=tuple(quarantined), dropped=dropped)


class RowWriting:
    """Rows in, the same and more rows out; what has to be written is written together."""

    def __init__(self, writer: Writer, annotations: AnnotationsConfig, fps: float, seed: int) -> None:
        self.writer = writer
        self.annotations = annotations
        self.fps = fps
        self.seed = seed

    def __call__(self, rows: Sequence[VideoAnnotation]) -> list[list[WrittenRow]]:
        """For each row what it becomes."""
        plans = [list(self._plan(row)) for row in rows]
        requests = [r for plan in plans for item in plan if not isinstance(item, WrittenRow) for r in item.requests]
        texts = iter(self.writer.write(requests))
        return [
            [item if isinstance(item, WrittenRow) else item.read([next(texts) for _ in item.requests]) for item in plan]
            for plan in plans
        ]

    def _plan(self, row: VideoAnnotation) -> Iterator[WrittenRow | _Chat | _Narration]:
        dataset = self.annotations.datasets.get(row.dataset)
        if dataset is not None and dataset.rewrite:
            yield _Narration(row, rewriting_requests(row.moments))
        elif row.kind == "goalstep" and dataset is not None:
            chats = self._chats(row, "live_chat", dataset.conversations)
            yield from chats
            if not chats:
                yield WrittenRow(annotation=row)
        else:
            yield WrittenRow(annotation=row)
        if row.kind == "narration" and (dataset is None or dataset.format == "captions"):
            yield from self._chats(row, "caption_chat", self.annotations.conversations)

    def _chats(self, row: VideoAnnotation, kind: str, count: int) -> list[_Chat]:
        """As many chats as are wanted; none about a video that is not there, which its other row reports."""
        try:
            video = extent_of(row, self.fps)
        except VideoError:
            return []
        chats = []
        for number in range(count):
            rng = random.Random(f"{self.seed} {row.dataset} {row.video_id} {row.part} {kind} {number}")
            request = chat_request(row.video_id, row.moments, video, rng, captions=kind == "caption_chat")
            part = "-".join(filter(None, [row.part, f"chat{number}"]))
            if request is not None:
                chats.append(_Chat(row.model_copy(update={"kind": kind, "part": part}), request))
        return chats


def needs_writing(annotations: AnnotationsConfig, dataset: str) -> bool:
    """Whether anything is written for rows of that dataset; rows of `annotations.paths` have the name ""."""
    if dataset not in annotations.datasets:
        return annotations.conversations > 0
    of = annotations.datasets[dataset]
    return of.rewrite or of.format == "goalstep" or (of.format == "captions" and annotations.conversations > 0)


def _words(text: Text) -> str:
    if text.problem:
        raise UnusableText(text.problem)
    return text.words


def _quarantined(row: VideoAnnotation, request: Request, text: Text, reason: UnusableText) -> Quarantined:
    return Quarantined(
        video_id=row.video_id,
        dataset=row.dataset,
        part=row.part,
        reason=str(reason),
        text=text.words,
        prompt=request.prompt,
    )

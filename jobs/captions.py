"""Captions with times, in the JSON of ActivityNet Captions and what is exported to it.

    {"v_QOlSCBRmfWY": {"duration": 82.73, "timestamps": [[0.83, 19.86]], "sentences": ["A woman dances."]}}

YouCook2's own form is read as well:

    {"database": {"GLd3aX16zBg": {"duration": 241.6, "subset": "training", "recipe_type": "113",
                                  "annotations": [{"segment": [90, 102], "sentence": "spread margarine"}]}}}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Self

from pydantic import Field, TypeAdapter, model_validator

from jobs.annotations import Moment, VideoAnnotation
from jobs.dataset_files import Entry, Split, read_json

SPLITS: dict[str, Split] = {
    "training": "train",
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "testing": "validation",
    "test": "validation",
}
HOW_TO_GET = "download the dataset's captions or export yours in the form of ActivityNet Captions"


class _Captions(Entry):
    duration: float | None = Field(default=None, gt=0)
    timestamps: list[tuple[float, float]]
    sentences: list[str]

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        if len(self.timestamps) != len(self.sentences):
            raise ValueError(f"{len(self.timestamps)} timestamps for {len(self.sentences)} sentences")
        return self


class _Segment(Entry):
    segment: tuple[float, float]
    sentence: str


class _Recipe(Entry):
    duration: float | None = Field(default=None, gt=0)
    subset: str | None = None
    annotations: list[_Segment] = Field(default_factory=list)


class _Database(Entry):
    database: dict[str, _Recipe]


def read_captions(path: Path) -> Iterator[VideoAnnotation]:
    """A row a video, its captions in order of time. Raises AnnotationError."""
    content = read_json(path, TypeAdapter(dict[str, object]), HOW_TO_GET)
    if set(content) == {"database"} or {"database", "version"} <= set(content):
        for video_id, recipe in read_json(path, TypeAdapter(_Database), HOW_TO_GET).database.items():
            captions = [(*segment.segment, segment.sentence) for segment in recipe.annotations]
            yield _row(path, video_id, recipe.duration, captions, SPLITS.get(recipe.subset or ""))
        return
    for video_id, video in read_json(path, TypeAdapter(dict[str, _Captions]), HOW_TO_GET).items():
        captions = [(*times, text) for times, text in zip(video.timestamps, video.sentences, strict=True)]
        yield _row(path, video_id, video.duration, captions, None)


def _row(
    path: Path,
    video_id: str,
    duration: float | None,
    captions: list[tuple[float, float, str]],
    split: Split | None,
) -> VideoAnnotation:
    # Some annotators marked a segment from its end to its start.
    moments = [Moment(time=max(0.0, min(a, b)), stop=max(a, b, 0.0), text=text) for a, b, text in captions]
    return VideoAnnotation(
        video_id=video_id,
        video="",
        duration=duration,
        moments=tuple(sorted(moments, key=lambda moment: moment.time)),
        source=str(path),
        split=split,
    )

"""Ego4D narrations: what annotators wrote about hours of everyday video, cleaned and split.

Ego4D has no train and validation lists for narrations. A video belongs to validation if a benchmark
validates on it, is left out if one only tests on it, and is for training otherwise: no video that is
trained on is graded on later. VideoLLM-online, section 4.1.

Streams of narrations come as one file a split, {video_uid: {annotation_uid: [{"time": seconds,
"text": ...}, ...]}}: `narration_streams` makes them from the published narrations, the reference
keeps them as `narration_stream_SPLIT.json`, and `refined_narration_stream_SPLIT.json` is the same
rewritten by a language model ("You pick up a knife.").
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import AliasChoices, Field, TypeAdapter

from jobs.annotations import Moment, VideoAnnotation
from jobs.dataset_files import EGO4D, PUBLISHED, Entry, Split, read_json

NARRATIONS = "all_narrations_redacted.json"
BENCHMARKS = ("av", "fho_lta", "fho_oscc-pnr", "fho_sta", "goalstep", "moments", "nlq", "vq")
FILE_SPLIT: Mapping[Split, str] = {"train": "train", "validation": "val"}

# Who acts, or that the annotator was not sure; of any other tag the word stays.
TAGS = re.compile("#unsure|#c|#o|@c|#", re.IGNORECASE)


Streams = dict[str, dict[str, list[Moment]]]
_STREAMS: TypeAdapter[Streams] = TypeAdapter(Streams)


class _Narration(Entry):
    time: float = Field(validation_alias=AliasChoices("time", "timestamp_sec"), ge=0, allow_inf_nan=False)
    text: str
    annotation_uid: str = Field(validation_alias=AliasChoices("_annotation_uid", "annotation_uid"))


class _Video(Entry):
    narrations: tuple[_Narration, ...] = ()


class _Narrations(Entry):
    videos: dict[str, _Video]


class _Used(Entry):
    video_uid: str


class _Benchmark(Entry):
    """One of a benchmark's files; which key holds its list depends on the benchmark."""

    videos: tuple[_Used, ...] = ()
    clips: tuple[_Used, ...] = ()
    annotations: tuple[_Used, ...] = ()


def clean(text: str) -> str:
    """A narration as a sentence, without tags: "#C C picks up a knife" is "C picks up a knife."."""
    words = " ".join(TAGS.sub(" ", text).split()).strip(" .,").split(" ", 1)
    return " ".join([words[0].capitalize(), *words[1:]]) + "."


def is_told(cleaned: str) -> bool:
    """Whether anything happens in a cleaned narration: it has two words, at least."""
    return " " in cleaned


def video_uids(folder: Path) -> dict[Split, list[str]]:
    """The narrated videos of each split, sorted. Raises AnnotationError for a missing benchmark's file."""
    narrated = set(_narrations(folder).videos)
    validation = _used(folder, "val")
    return {
        "train": sorted(narrated - validation - _used(folder, "test_unannotated")),
        "validation": sorted(narrated & validation),
    }


def narration_streams(folder: Path) -> dict[Split, Streams]:
    """Cleaned narrations of each split in order of time; a video all of whose texts say nothing has no stream."""
    videos = _narrations(folder).videos
    return {split: {uid: _streams(videos[uid]) for uid in uids} for split, uids in video_uids(folder).items()}


def read_narrations(folder: Path) -> Iterator[VideoAnnotation]:
    """A row for every annotator's pass over a video, from the published narrations."""
    for split, streams in narration_streams(folder).items():
        yield from _rows(streams, split, "ego4d_narration", folder / NARRATIONS)


def read_narration_streams(folder: Path) -> Iterator[VideoAnnotation]:
    """The same rows from the reference's own intermediate files."""
    for split, name in FILE_SPLIT.items():
        path = folder / f"narration_stream_{name}.json"
        streams = read_json(path, _STREAMS, "the public reference writes it; or use format ego4d_narration")
        yield from _rows(streams, split, "ego4d_narration", path)


def read_refined_narrations(folder: Path) -> Iterator[VideoAnnotation]:
    """Rows of the narrations that a language model has rewritten."""
    for split, name in FILE_SPLIT.items():
        path = folder / f"refined_narration_stream_{name}.json"
        yield from _rows(read_json(path, _STREAMS, PUBLISHED), split, "ego4d_refined_narration", path)


def known_splits(folder: Path) -> dict[str, Split]:
    """The split of each video that narrations in this folder tell, for what else is said of the same videos.

    Empty where the folder has none of the files that `read_refined_narrations`, `read_narration_streams` or
    `read_narrations` read.
    """
    for form in ("refined_narration_stream", "narration_stream"):
        paths = {split: folder / f"{form}_{name}.json" for split, name in FILE_SPLIT.items()}
        if all(path.is_file() for path in paths.values()):
            return {uid: split for split, path in paths.items() for uid in read_json(path, _STREAMS, PUBLISHED)}
    if not (folder / NARRATIONS).is_file():
        return {}
    return {uid: split for split, uids in video_uids(folder).items() for uid in uids}


def _narrations(folder: Path) -> _Narrations:
    return read_json(folder / NARRATIONS, TypeAdapter(_Narrations), EGO4D)


def _used(folder: Path, split: str) -> set[str]:
    files = [folder / f"{benchmark}_{split}.json" for benchmark in BENCHMARKS]
    used = [read_json(file, TypeAdapter(_Benchmark), EGO4D) for file in files]
    return {entry.video_uid for file in used for entry in (*file.videos, *file.clips, *file.annotations)}


def _streams(video: _Video) -> dict[str, list[Moment]]:
    streams: dict[str, list[Moment]] = {}
    for narration in sorted(video.narrations, key=lambda narration: narration.time):
        text = clean(narration.text)
        if is_told(text):
            streams.setdefault(narration.annotation_uid, []).append(Moment(time=narration.time, text=text))
    return streams


def _rows(streams: Streams, split: Split, kind: str, source: Path) -> Iterator[VideoAnnotation]:
    for uid, passes in streams.items():
        for name, moments in passes.items():
            if moments:
                yield VideoAnnotation(
                    video_id=uid,
                    video="",
                    moments=tuple(sorted(moments, key=lambda moment: moment.time)),
                    source=str(source),
                    kind=kind,
                    part=name,
                    split=split,
                )

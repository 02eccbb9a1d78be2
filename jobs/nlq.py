"""Ego4D natural-language queries: find where a question is answered in a clip.

The user states a query before the clip starts; the assistant says where the part it asks for starts
and where it ends. Queries that differ in case only are one query with several parts. The released
test file holds no times, so there are no dialogues of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, TypeAdapter

from actors.turns import Assistant, Stream, Turn, User
from jobs.annotations import Moment, VideoAnnotation
from jobs.clock import Extent
from jobs.dataset_files import EGO4D, Entry, read_json
from jobs.ego4d import FILE_SPLIT
from jobs.scenes import Scene

QUESTIONS = (
    'Tell me when the part of the video about "{query}" begins and when it is over.',
    'Find the answer to "{query}" in this video.',
    'Watch for "{query}" and say when it starts and ends.',
    'When does "{query}" happen? Point out its start and its end.',
    'Let me know as soon as "{query}" can be answered.',
    'Mark the moments that belong to "{query}".',
    'I am looking for "{query}". Tell me where it starts and stops.',
    'Keep an eye out for "{query}".',
    'Search the video for "{query}".',
    'Show me where "{query}" is to be seen.',
)


class _Query(Entry):
    query: str | None = None
    slot_x: str | None = None
    video_start_sec: float = Field(ge=0)
    video_end_sec: float


class _Annotation(Entry):
    language_queries: tuple[_Query, ...] = ()


class _Clip(Entry):
    clip_uid: str
    video_start_sec: float
    video_end_sec: float
    annotations: list[_Annotation]


class _Video(Entry):
    video_uid: str
    clips: list[_Clip]


class _File(Entry):
    videos: list[_Video]


def read_nlq(folder: Path) -> Iterator[VideoAnnotation]:
    """A row a query of a clip, its parts in order of start."""
    for split, name in FILE_SPLIT.items():
        path = folder / f"nlq_{name}.json"
        for video in read_json(path, TypeAdapter(_File), EGO4D).videos:
            for clip in video.clips:
                for number, (query, parts) in enumerate(_parts(clip).items()):
                    yield VideoAnnotation(
                        video_id=video.video_uid,
                        video="",
                        moments=tuple(sorted(parts, key=lambda part: part.time)),
                        tasks=(query,),
                        source=str(path),
                        kind="nlq",
                        part=f"{clip.clip_uid}-{number}",
                        span=(clip.video_start_sec, clip.video_end_sec),
                        split=split,
                    )


def scenes(row: VideoAnnotation, video: Extent, rng: random.Random) -> Iterator[Scene]:
    """The query as one scene; none if its clip exceeds the video or its first part lasts no frame.

    A part that begins before the one before it has ended is left out.
    """
    start, stop = row.span or (0.0, video.duration)
    if stop > video.duration:
        return
    (query,) = row.tasks
    question = rng.choice(QUESTIONS).format(query=query)
    turns: list[Turn] = [User(content=question)]
    first = video.at(start)
    frame = first - 1
    for part in _apart(row.moments):
        begins = max(video.at(part.time), frame + 1)
        ends = video.at(min(part.stop or part.time, stop))
        if ends <= begins:
            break
        for reached, word in ((begins, "starts"), (ends, "ends")):
            text = f'The video related to the query "{query}" {word}.'
            turns += [Stream(num_frames=reached - frame, learn=True), Assistant(content=text, learn=True)]
            frame = reached
    if frame >= first:
        yield Scene(first, tuple(turns))


def _parts(clip: _Clip) -> dict[str, list[Moment]]:
    parts: dict[str, list[Moment]] = {}
    for annotation in clip.annotations:
        for query in annotation.language_queries:
            if text := (query.query or query.slot_x or "").lower():
                stop = max(query.video_start_sec, query.video_end_sec)
                parts.setdefault(text, []).append(Moment(time=query.video_start_sec, stop=stop, text=text))
    return parts


def _apart(parts: tuple[Moment, ...]) -> Iterator[Moment]:
    end = float("-inf")
    for part in parts:
        if part.time >= end:
            end = part.stop or part.time
            yield part

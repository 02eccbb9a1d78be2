"""COIN: instructional videos whose steps are named and timed, as five tasks with one answer each.

`coin_step` asks for the step that is shown, `coin_next` for the one after it, `coin_task` for the
whole activity, `coin_procedure` for up to five steps that follow, `coin_taskprocedure` for the same
with the activity told. The question comes first, then the frames, then the answer. VideoLLM-online,
section 5.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pydantic import Field, TypeAdapter

from jobs.annotations import AnnotationError, Moment, VideoAnnotation
from jobs.clock import Extent
from jobs.dataset_files import COIN, Entry, Split, read_json
from jobs.scenes import Scene, answered, numbered, sentence

KINDS = ("coin_step", "coin_next", "coin_task", "coin_procedure", "coin_taskprocedure")
MOST_STEPS = 5  # asked for at once
CONCISELY = "Format your answer concisely. No extra text output."
AS_LIST = "Format your answer concisely, listing each action on a new line with a number prefix. No extra text output."

SPLITS: dict[str, Split] = {"training": "train", "testing": "validation"}
WORDS = re.compile(r"[A-Z][a-z]+|[A-Z0-9]+(?![a-z])|[a-z]+")
# Two labels of the dataset do not read as an action.
REPAIRED = {
    "process (crop, fold) paper": "crop and fold paper",
    "try to press gun head, spray residual old grease": "try to press gun head to spray residual old grease",
}


class _Step(Entry):
    segment: tuple[float, float]
    label: str


class _Video(Entry):
    subset: str
    task: str = Field(alias="class")
    start: float
    end: float
    duration: float | None = None
    annotation: list[_Step]


class _Coin(Entry):
    database: dict[str, _Video]


def task_name(task: str) -> str:
    """The name of an activity in words: "ReplaceSIMCard" is "replace SIM card"."""
    words = WORDS.findall(task)
    return " ".join(word if word.isupper() and len(word) > 1 else word.lower() for word in words)


def step_name(label: str) -> str:
    """The name of a step as an action."""
    return REPAIRED.get(label, label)


def read_coin(kind: str, folder: Path) -> Iterator[VideoAnnotation]:
    """A row a video; `kind` is one of KINDS."""
    path = folder / "coin.json"
    for video_id, video in read_json(path, TypeAdapter(_Coin), COIN).database.items():
        if video.subset not in SPLITS:
            raise AnnotationError(f"{path}: {video_id}: subset is {video.subset!r}, expected one of {sorted(SPLITS)}")
        yield VideoAnnotation(
            video_id=video_id,
            video="",
            duration=video.duration,
            moments=tuple(
                Moment(time=step.segment[0], stop=step.segment[1], text=step_name(step.label))
                for step in video.annotation
            ),
            tasks=(task_name(video.task),),
            source=str(path),
            kind=kind,
            span=(video.start, video.end),
            split=SPLITS[video.subset],
        )


def scenes(row: VideoAnnotation, video: Extent) -> Iterator[Scene]:
    """The scenes of a row, as its kind says; labels are in lower case."""
    steps = [moment.text.lower() for moment in row.moments]
    spans = [(video.at(moment.time), video.at(moment.stop or moment.time)) for moment in row.moments]
    task = row.tasks[0].lower()
    if row.kind == "coin_task":
        start, stop = row.span or (0.0, video.duration)
        question = f"What is the overall activity in the video? {CONCISELY}"
        yield answered(video.at(start), video.at(stop), question, [task], sentence(task))
        return
    for index, (first, last) in enumerate(spans):
        scene = partial(answered, first, last)
        following = steps[index + 1 : index + 1 + MOST_STEPS]
        if row.kind == "coin_step":
            yield scene(f"What is the action in the video? {CONCISELY}", [steps[index]], sentence(steps[index]))
        elif row.kind == "coin_next" and following:
            yield scene(_next(1), following[:1], sentence(following[0]))
        elif row.kind == "coin_procedure" and following:
            yield scene(_next(len(following)), following, _listed(following))
        elif row.kind == "coin_taskprocedure" and following:
            yield scene(_next(len(following), f"To {task}, w"), following, _listed(following))


def _next(count: int, beginning: str = "W") -> str:
    if count == 1:
        return f"{beginning}hat is the next action for the video? {CONCISELY}"
    return f"{beginning}hat is the next {count} actions for the video? {AS_LIST}"


def _listed(steps: list[str]) -> str:
    return sentence(steps[0]) if len(steps) == 1 else numbered(steps)

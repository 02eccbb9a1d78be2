"""Ego4D-GoalStep: the steps of an activity, as requests to a language model to write a chat about it.

A request tells the steps with their times and leaves blanks: the user asks at drawn times, and the
assistant answers each question and speaks up where steps start and end. What comes back is read by
jobs/livechat.py. VideoLLM-online, section 3.3 and figure 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from jobs.annotations import Moment, VideoAnnotation
from jobs.clock import Extent
from jobs.dataset_files import EGO4D, Entry, Split, read_json

FILES: Mapping[Split, str] = {"train": "goalstep_train.json", "validation": "goalstep_val.json"}
BLANK = "..."
PROMPT = (
    "A very intelligent multimodal assistant helps the user to do the following activities:\n\n{steps}\n\n"
    "Now, please complete the conversation between user and assistant. Note that the assistant will actively "
    "provides clear, concise, real-time language assistance. The assistant does not know the absolute time. "
    "Sometimes the user may ask irrelevant questions, the assistant is very helpful and will also answer that."
)


class _Step(Entry):
    start_time: float
    end_time: float
    step_description: str
    segments: tuple[_Step, ...] = ()


class _Video(Entry):
    video_uid: str
    segments: tuple[_Step, ...]


class _File(Entry):
    videos: tuple[_Video, ...]


@dataclass(frozen=True)
class Activity:
    """Steps of a video as a prompt, and the times (seconds) at which the assistant has something to say."""

    video_id: str
    prompt: str
    times: tuple[float, ...]

    def request(self, questions: Sequence[str], places: Sequence[float]) -> str:
        """The prompt with blanks to fill: question n stands at the n-th of `places` (0 to 1 of the activity), sorted.

        Nothing is said before the first question.
        """
        first, last = self.times[0], self.times[-1]
        asked = [
            (first + place * (last - first), question)
            for place, question in zip(sorted(places), questions, strict=True)
        ]
        lines = [(time, f"{time:.1f}s User: {question}\n{time:.1f}s Assistant: {BLANK}") for time, question in asked]
        lines += [(time, f"{time:.1f}s Assistant: {BLANK}") for time in self.times if time >= asked[0][0]]
        return "\n".join([self.prompt, "", *(line for _, line in sorted(lines, key=lambda line: line[0]))])


def read_activities(folder: Path, videos: Mapping[str, Extent]) -> Iterator[Activity]:
    """The activities of those videos that are there; steps that have steps of their own are activities, too."""
    for name in FILES.values():
        for video in read_json(folder / name, TypeAdapter(_File), EGO4D).videos:
            if extent := videos.get(video.video_uid):
                for steps in _levels(video.segments):
                    yield activity_of(video.video_uid, [_moment(step) for step in steps], extent)


def read_goalstep(folder: Path) -> Iterator[VideoAnnotation]:
    """A row an activity, its steps as moments, for chats to be written about them (jobs/chat_writing.py)."""
    for split, name in FILES.items():
        path = folder / name
        for video in read_json(path, TypeAdapter(_File), EGO4D).videos:
            for number, steps in enumerate(_levels(video.segments)):
                moments = [_moment(step) for step in steps]
                yield VideoAnnotation(
                    video_id=video.video_uid,
                    video="",
                    moments=tuple(sorted(moments, key=lambda moment: moment.time)),
                    source=str(path),
                    kind="goalstep",
                    part=str(number),
                    split=split,
                )


def activity_of(video_id: str, steps: Sequence[Moment], video: Extent) -> Activity:
    """Steps as what is told and asked of a language model; times beyond the video are those of its last frame."""
    told = "\n".join(f"{s.time:.2f}s-{s.time if s.stop is None else s.stop:.2f}s: {s.text}" for s in steps)
    times = [time for step in steps for time in (step.time, step.stop) if time is not None]
    frames = {video.at(time) for time in times}
    return Activity(video_id, PROMPT.format(steps=told), tuple(frame / video.fps for frame in sorted(frames)))


def _levels(steps: Sequence[_Step]) -> Iterator[Sequence[_Step]]:
    if steps:
        yield steps
        for step in steps:
            yield from _levels(step.segments)


def _moment(step: _Step) -> Moment:
    return Moment(time=step.start_time, stop=step.end_time, text=step.step_description.strip())

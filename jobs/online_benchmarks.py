"""StreamingBench and OVO-Bench: questions at moments of a stream, read from the files as they are published.

The files are the benchmarks' own (`questions_*.json`, `ovo_bench_new.json`), the videos are encoded into the
frame-token store by their file names. Questions are events: the user asks when the moment comes, in a stream
that is shown up to there; several about one moment of a video after another share one stream, in which
earlier answers stay. `polled` asks each in a stream of its own, as the published protocol does. What the
model is to say unasked (StreamingBench's proactive output) is graded by when it says it, either way.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, TypeAdapter, ValidationError

from actors.turns import Stream, System, Turn, User
from jobs.annotations import video_id
from jobs.clock import exact
from jobs.dialogues import Dialogue
from jobs.grader import Heard
from jobs.replay import Utterance

BACKWARD, REALTIME = ("EPM", "ASI", "HLD"), ("STU", "OJR", "ATR", "ACR", "OCR", "FPD")
FORWARD = ("REC", "SSR", "CRR")
CATEGORIES = {
    **dict.fromkeys(BACKWARD, "backward tracing"),
    **dict.fromkeys(REALTIME, "real-time perception"),
    **dict.fromkeys(FORWARD, "forward responding"),
}
NEAR_S, PATIENCE_S = 2.0, 4.0  # how near the moment a proactive answer must come; how long after it is waited
LETTERED = re.compile(r"[A-Z][.)] ")

CHOICE = "Answer with the letter of the right option only."
YES_OR_NO = "Answer with Yes or No only."


class OnlineBenchmarkError(ValueError):
    """A file is none of the benchmark's; says where and what was expected."""


@dataclass(frozen=True)
class Asked:
    """One question at `time` seconds of a video, and its right answer.

    `due_s` is when a proactive answer should come; the others are answers to the question itself.
    """

    benchmark: Literal["streamingbench", "ovobench"]
    task: str
    video: str
    time: float
    text: str
    answer: str
    due_s: float | None = None


@dataclass(frozen=True)
class Probed:
    """A stream with the questions that are asked in it, in order of time."""

    dialogue: Dialogue
    asked: list[Asked]


class _Question(BaseModel):
    task_type: str
    question: str
    time_stamp: str
    answer: str = ""
    options: list[str] = []
    ground_truth_time_stamp: str | None = None
    ground_truth_output: str = ""


class _Part(BaseModel):
    video_path: str
    questions: list[_Question]


class _Test(BaseModel):
    realtime: float
    count: int | None = None
    type: int | None = None
    step: str = ""


class _Item(BaseModel):
    task: str
    video: str
    question: str | None = None
    options: list[str] | None = None
    gt: int | None = None
    realtime: float | None = None
    activity: str = ""
    test_info: list[_Test] = []


def read_streamingbench(path: Path) -> list[Asked]:
    """The questions of a `questions_*.json`. Raises OnlineBenchmarkError."""
    parts = _read(path, TypeAdapter(list[_Part | list[_Part]]))
    return [
        _streamingbench(question, part.video_path, path)
        for group in parts
        for part in (group if isinstance(group, list) else [group])
        for question in part.questions
    ]


def read_ovobench(path: Path) -> list[Asked]:
    """The questions of an `ovo_bench_new.json`. Raises OnlineBenchmarkError."""
    return [asked for item in _read(path, TypeAdapter(list[_Item])) for asked in _ovobench(item, path)]


def read_all(streamingbench: Sequence[str], ovobench: str | None) -> list[Asked]:
    """The questions of all those files."""
    asked = [one for path in streamingbench for one in read_streamingbench(Path(path))]
    return asked + (read_ovobench(Path(ovobench)) if ovobench else [])


def streams_of(
    asked: Sequence[Asked], num_frames: Mapping[str, int], fps: float, system_prompt: str, polled: bool
) -> list[Probed]:
    """Streams that end at their last question; those whose video has no frames are left out."""
    groups: dict[tuple[object, ...], list[Asked]] = defaultdict(list)
    for number, one in enumerate(asked):
        alone = polled or one.due_s is not None
        groups[(one.video, one.benchmark, number) if alone else (one.video, one.benchmark)].append(one)
    return [
        _stream(sorted(ones, key=lambda one: one.time), number, num_frames[video_id(ones[0].video)], fps, system_prompt)
        for number, ones in enumerate(groups.values())
        if num_frames.get(video_id(ones[0].video))
    ]


def score(probed: Sequence[Probed], heard: Sequence[Heard]) -> dict[str, dict[str, float]]:
    """Accuracy in percent by benchmark: of every task, of OVO-Bench's categories, and `all`, the mean over tasks."""
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for stream, one in zip(probed, heard, strict=True):
        for asked, is_right in zip(stream.asked, _right(stream, one), strict=True):
            right[asked.benchmark][asked.task].append(is_right)
    return {benchmark: _averages(tasks) for benchmark, tasks in right.items()}


def _right(stream: Probed, heard: Heard) -> Iterator[bool]:
    """Whether each question of a stream was answered right; one without an answer was not."""
    answers = [utterance for utterance in heard.said if utterance.question is not None]
    times = _times(stream)
    for asked, time in zip(stream.asked, times, strict=True):
        if asked.due_s is not None:
            later = [said for said in heard.said if said.question is None and said.time > time]
            first = min(later, key=lambda said: said.time, default=None)
            yield first is not None and _in_time(first, asked)
            continue
        found = next((said for said in answers if said.question == asked.text and said.time == time), None)
        if found is not None:
            answers.remove(found)
        yield found is not None and _answers(found.text, asked)


def _in_time(said: Utterance, asked: Asked) -> bool:
    assert asked.due_s is not None
    return abs(said.time - asked.due_s) <= NEAR_S and asked.answer in said.text


def _answers(text: str, asked: Asked) -> bool:
    """As the benchmarks' own programs compare."""
    if asked.task == "REC":
        return "".join(re.findall(r"\d+", text)) == asked.answer
    if asked.benchmark == "streamingbench":
        return text[:1] == asked.answer
    return asked.answer in text or (asked.task in FORWARD and text == asked.answer[0])


def _averages(tasks: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    by_task = {task: 100 * sum(right) / len(right) for task, right in sorted(tasks.items())}
    values = dict(by_task)
    for category in dict.fromkeys(CATEGORIES[task] for task in by_task if task in CATEGORIES):
        values[category] = _mean([value for task, value in by_task.items() if CATEGORIES.get(task) == category])
    return values | {"all": _mean(list(by_task.values()))}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _stream(asked: list[Asked], number: int, num_frames: int, fps: float, system_prompt: str) -> Probed:
    turns: list[Turn] = [System(content=system_prompt)]
    shown = 0
    for one in asked:
        frames = max(shown, min(int(exact(one.time) * exact(fps)) + 1, num_frames))
        turns += [Stream(num_frames=frames - shown), User(content=one.text)]
        shown = frames
        if one.due_s is not None:
            last = min(int(exact(one.due_s + PATIENCE_S) * exact(fps)) + 1, num_frames)
            turns.append(Stream(num_frames=max(0, last - shown)))
            shown = max(shown, last)
    name = video_id(asked[0].video)
    dialogue = Dialogue(
        dialogue_id=f"{asked[0].benchmark}-{name}-{number}",
        task=asked[0].benchmark,
        video_id=name,
        video=asked[0].video,
        fps=fps,
        frames=(0, shown),
        conversation=tuple(turn for turn in turns if not isinstance(turn, Stream) or turn.num_frames),
    )
    return Probed(dialogue, asked)


def _times(stream: Probed) -> list[float]:
    """When each question is asked, in the stream's own time: at the last frame before it."""
    shown, times = 0, []
    for turn in stream.dialogue.conversation:
        if isinstance(turn, Stream):
            shown += turn.num_frames
        elif isinstance(turn, User):
            times.append(max(shown - 1, 0) / stream.dialogue.fps)
    return times


def _streamingbench(question: _Question, video: str, path: Path) -> Asked:
    time = _seconds(question.time_stamp, path)
    if question.ground_truth_time_stamp is not None:
        due_s = _seconds(question.ground_truth_time_stamp, path)
        answer = question.ground_truth_output
        return Asked("streamingbench", question.task_type, video, time, question.question, answer, due_s)
    text = _choice(question.question, question.options)
    return Asked("streamingbench", question.task_type, video, time, text, question.answer)


def _ovobench(item: _Item, path: Path) -> Iterator[Asked]:
    if item.task in FORWARD:
        for test in item.test_info:
            if item.task == "REC":
                text = f"How many times did they {item.activity}? Answer with a number only."
                answer = str(test.count)
            elif item.task == "SSR":
                text = f"Is somebody doing this now: {test.step} {YES_OR_NO}"
                answer = "Yes" if test.type else "No"
            else:
                text = f"Has enough been shown to answer this: {item.question} {YES_OR_NO}"
                answer = "Yes" if test.type else "No"
            yield Asked("ovobench", item.task, item.video, test.realtime, text, answer)
    elif item.task in CATEGORIES and None not in (item.question, item.options, item.gt, item.realtime):
        text = _choice(str(item.question), item.options or [])
        yield Asked("ovobench", item.task, item.video, float(item.realtime or 0), text, chr(65 + (item.gt or 0)))
    else:
        expected = ", ".join(CATEGORIES)
        raise OnlineBenchmarkError(
            f"{path}: an item of task {item.task!r}: expected one of {expected}, "
            "with question, options, gt and realtime"
        )


def _choice(question: str, options: Sequence[str]) -> str:
    lines = [o if LETTERED.match(o) else f"{chr(65 + place)}. {o}" for place, o in enumerate(options)]
    return "\n".join([question, *lines, CHOICE])


def _seconds(stamp: str, path: Path) -> float:
    try:
        return float(sum(int(part) * 60**place for place, part in enumerate(reversed(stamp.split(":")))))
    except ValueError:
        raise OnlineBenchmarkError(f"{path}: time {stamp!r}, expected HH:MM:SS") from None


def _read(path: Path, kind: TypeAdapter[list]) -> list:
    try:
        return kind.validate_json(path.read_bytes())
    except OSError as error:
        raise OnlineBenchmarkError(f"{path} cannot be read: {error}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "file"
        raise OnlineBenchmarkError(f"{path}: {where}: {problem['msg']}: expected the benchmark's own file") from None

"""Chats: timed messages of a user and an assistant, as streaming dialogues.

A chat is found in the reference's `goalstep_livechat_trainval_filtered_21k.json`, the published
Ego4D-GoalStep dialogues, or in files of one generated conversation each. The user's first question follows some
frames of waiting; an answer with the time of its question follows at once; whatever else the
assistant says follows the first frame at or after its time. VideoLLM-online, section 3.3.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter

from actors.turns import Assistant, Stream, Turn, User
from jobs.annotations import AnnotationError, Moment, VideoAnnotation
from jobs.clock import Extent
from jobs.dataset_files import PUBLISHED, Entry, Split, read_json
from jobs.ego4d import known_splits
from jobs.scenes import Scene

FILE = "goalstep_livechat_trainval_filtered_21k.json"
MOST_WAITING = 20  # frames before the first question


class Message(Entry):
    """One message as it is published."""

    role: Literal["user", "assistant"]
    content: str
    time: float = Field(ge=0, allow_inf_nan=False)


class Chat(Entry):
    """One published conversation about a video."""

    video_uid: str
    conversation: list[Message]


def read_chats(folder: Path) -> Iterator[VideoAnnotation]:
    """A row a conversation, its messages in the order of the file."""
    path = folder / FILE
    splits = known_splits(folder)
    for number, chat in enumerate(read_json(path, TypeAdapter(list[Chat]), PUBLISHED)):
        yield _row(chat, path, "chat", str(number), splits)


def read_generated_chats(folder: Path) -> Iterator[VideoAnnotation]:
    """A row for every file of one conversation; which of them are of use is decided by jobs/livechat.py."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise AnnotationError(f"{folder} holds no .json file, expected one for each generated conversation")
    splits = known_splits(folder) or known_splits(folder.parent)
    for path in paths:
        chat = read_json(path, TypeAdapter(Chat), "generate it again")
        yield _row(chat, path, "generated_chat", path.stem, splits)


def _row(chat: Chat, path: Path, kind: str, part: str, splits: Mapping[str, Split]) -> VideoAnnotation:
    """A video that narrations beside it are of is in their split: never trained on here and graded on there."""
    return VideoAnnotation(
        video_id=chat.video_uid,
        video="",
        moments=tuple(Moment(time=m.time, text=m.content, role=m.role) for m in chat.conversation),
        source=str(path),
        kind=kind,
        part=part,
        split=splits.get(chat.video_uid),
    )


def scenes(row: VideoAnnotation, video: Extent, rng: random.Random) -> Iterator[Scene]:
    """The chat as one scene; none if it does not begin with a question within the video.

    It ends where time goes back, where the user asks again in the same moment, or where the video
    ends. What the assistant says at a frame that has been answered is left out.
    """
    if not row.moments or not _begins(row.moments[0], video):
        return
    question, *others = row.moments
    frame = video.before(question.time)
    waited = rng.randint(0, min(MOST_WAITING, frame))
    turns: list[Turn] = [User(content=question.text)]
    if waited:
        # The last frame before a question has nothing to decide: the question is the user's doing.
        turns.insert(0, Stream(num_frames=waited, learn=waited - 1))
    first, last = frame + 1 - waited, question
    for message in others:
        if message.time < last.time or message.time > video.duration:
            break
        if message.role == "user":
            if message.time == last.time:
                break
            turns += _until(frame, video.before(message.time))
            turns.append(User(content=message.text))
            frame = max(frame, video.before(message.time))
        elif message.time == last.time:
            # The answer to a question, or what takes the place of what was said at the same time.
            turns = [*(turns[:-1] if last.role == "assistant" else turns), _answer(message)]
        elif (reached := video.at(message.time)) > frame:
            turns += [*_until(frame, reached), _answer(message)]
            frame = reached
        else:
            continue
        last = message
    yield Scene(first, tuple(turns))


def _begins(message: Moment, video: Extent) -> bool:
    return message.role == "user" and message.text != "" and 0 < message.time <= video.duration


def _until(frame: int, reached: int) -> list[Turn]:
    return [Stream(num_frames=reached - frame, learn=True)] if reached > frame else []


def _answer(message: Moment) -> Assistant:
    return Assistant(content=message.text, learn=True)

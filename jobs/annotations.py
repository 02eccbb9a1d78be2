"""What people wrote about videos, read from several formats into one row per video.

A reader takes one file and yields `VideoAnnotation`s; `READERS` maps a file's suffix to its reader,
and a further public format is one more function in it. Rows go to `jobs.build_dialogues`.

Formats:

`.jsonl`: one video a line, unknown keys refused:

    {"video": "kitchen.mp4", "moments": [{"time": 2.5, "text": "You cut the onion.", "stop": 4}], "tasks": ["cook"]}

  `video` is a path relative to the file, or a URL; `video_id` defaults to its name without suffix; `stop`,
  `tasks`, `duration`, `split` and `part` (tells rows of one video apart) are optional. Times are seconds. A row
  whose moments have a `role`, "user" or "assistant", and the user's among them, is a chat.

`.srt`, `.vtt`: subtitles of the video beside them that has the same name (`kitchen.srt` of
`kitchen.mp4`); every cue is one moment, said when it starts.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from actors.config import ConfigError, Section
from actors.remote import is_remote

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".mpg", ".mpeg", ".m4v")

CLOCK = re.compile(r"(?:(\d+):)?([0-5]?\d):([0-5]\d)[.,](\d{1,3})$")
ARROW = re.compile(r"\s*(\S+)\s+-->\s+(\S+)(?:\s.*)?$")
TAG = re.compile(r"</?[A-Za-z][^<>]*>|<\d[\d:.]*>")


REWRITABLE = ("ego4d_narration", "ego4d_narration_stream")


class AnnotationError(ValueError):
    """An annotation file cannot be read; the message names file, line, what was found and expected."""


class Moment(Section):
    """A text that belongs to a time of a video, in seconds; a segment has a `stop`, too.

    In a chat, `role` says whose words it is.
    """

    time: float = Field(ge=0, allow_inf_nan=False)
    text: str
    stop: float | None = Field(default=None, allow_inf_nan=False)
    role: Literal["user", "assistant"] = "assistant"

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.stop is not None and self.stop < self.time:
            raise ValueError(f"stop is {self.stop}, before time {self.time}")
        return self


class VideoAnnotation(Section):
    """The common row: one video, its moments in order of time, the tasks it shows.

    `video` is a path; `duration` (seconds) stays unknown unless the format tells it; `source` is the
    file that was read. A public dataset may give one video several rows, told apart by `part`, may be
    about a `span` of the video (seconds), and may say which `split` the video belongs to. `kind` says
    what dialogues a row becomes (see jobs/tasks.py), `dataset` what the settings call the dataset.
    """

    video_id: str = Field(min_length=1)
    video: str
    duration: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    moments: tuple[Moment, ...]
    tasks: tuple[str, ...] = ()
    source: str
    kind: str = "narration"
    part: str = ""
    span: tuple[float, float] | None = None
    split: Literal["train", "validation"] | None = None
    dataset: str = ""


class _Line(Section):
    """What a line of JSONL may say; the rest of a row is not for its writer to choose."""

    video: str
    video_id: str = Field(min_length=1)
    duration: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    moments: tuple[Moment, ...]
    tasks: tuple[str, ...] = ()
    part: str = ""
    split: Literal["train", "validation"] | None = None


class DatasetConfig(Section):
    """One public dataset: where its files and videos are, and how much of it is wanted."""

    format: Literal[
        "ego4d_narration",
        "ego4d_narration_stream",
        "ego4d_refined_narration",
        "chat",
        "generated_chat",
        "goalstep",
        "nlq",
        "lta",
        "lta_test",
        "coin_step",
        "coin_next",
        "coin_task",
        "coin_procedure",
        "coin_taskprocedure",
        "captions",
        "robustness",
    ]
    path: str = Field(default="", description="the folder of its annotations; of captions, the file")
    videos: str = Field(default="", description="the folder of its videos, named by id; or of their features (.pt)")
    weight: float = Field(default=1, gt=0, allow_inf_nan=False, description="how often each part of it is used")
    conversations: int = Field(default=10, ge=1, description="chats written about each activity of goalstep")
    rewrite: bool = Field(default=False, description="narrations are rewritten from C's view to yours")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        missing = [name for name in ("path", "videos") if not getattr(self, name)]
        if missing and self.format != "robustness":
            raise ValueError(f"format {self.format} needs {' and '.join(missing)}")
        if self.rewrite and self.format not in REWRITABLE:
            raise ValueError(f"format {self.format} has nothing to rewrite: {' and '.join(REWRITABLE)} have")
        return self


class AnnotationsConfig(Section):
    """Where annotations come from."""

    paths: tuple[str, ...] = Field(
        default=("tests/samples",),
        description="annotation files, and folders whose annotation files are all read (.jsonl, .srt, .vtt)",
    )
    datasets: dict[str, DatasetConfig] = Field(
        default_factory=dict,
        description="public datasets by a name of your choice: {format, path, videos, weight, conversations, "
        "rewrite}; formats are listed in jobs/public.py",
    )
    conversations: int = Field(
        default=1,
        ge=0,
        description="chats written about each video of `paths` and of format captions, beside its narration",
    )


def video_id(path: str | Path) -> str:
    """The name a video has in annotations, stores and checkpoints: its file name without suffix."""
    return Path(without_query(str(path))).stem


def without_query(url: str) -> str:
    """An http(s) URL without what a server signs it with; any other address as it is."""
    return url.partition("?")[0] if url.startswith(("http://", "https://")) else url


def named(folder: Path, name: str, suffixes: Sequence[str]) -> Path | None:
    """The file `name` in `folder` with one of `suffixes`, the first of them that is there, in capitals or not."""
    for suffix in suffixes:
        for written in (suffix, suffix.upper(), f".{suffix[1:].capitalize()}"):
            if (path := folder / f"{name}{written}").is_file():
                return path
    return None


def find_annotations(paths: Sequence[str]) -> list[Path]:
    """The annotation files among `paths` and in the folders among them, in order of name.

    Raises ConfigError for a path that does not exist, has no reader, or holds nothing to read.
    """
    files: set[Path] = set()
    for path in map(Path, paths):
        if path.is_dir():
            found = {file for file in path.rglob("*") if file.suffix.lower() in READERS and file.is_file()}
            if not found:
                raise ConfigError(f"annotations.paths: {path} holds no {', '.join(READERS)} file")
            files |= found
        elif not path.is_file():
            raise ConfigError(
                f"annotations.paths: {path} does not exist: put the annotations there or name their folder"
            )
        elif path.suffix.lower() not in READERS:
            raise ConfigError(f"annotations.paths: {path} has no reader; known are {', '.join(READERS)}")
        else:
            files.add(path)
    return sorted(files)


def read_annotations(path: str | Path) -> Iterator[VideoAnnotation]:
    """The videos that one annotation file describes. Raises AnnotationError."""
    path = Path(path)
    return READERS[path.suffix.lower()](path)


def read_jsonl(path: Path) -> Iterator[VideoAnnotation]:
    """Rows of the common form, one a line; see the module's docstring for the keys."""
    # Not splitlines: JSON may hold characters that end a line for it.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise AnnotationError(f"{path}:{number}: not JSON ({error}); expected one object a line") from None
        if not isinstance(fields, dict) or not isinstance(fields.get("video"), str):
            raise AnnotationError(
                f"{path}:{number}: found {_short(line)}, expected an object with 'video' and 'moments'"
            )
        video = fields["video"] if is_remote(fields["video"]) else str(path.parent / fields["video"])
        try:
            row = _Line.model_validate({"video_id": video_id(video), **fields, "video": video})
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "row"
            raise AnnotationError(
                f"{path}:{number}: {where}: found {_short(problem['input'])}: {problem['msg']}"
            ) from None
        kind = "chat" if any(moment.role == "user" for moment in row.moments) else "narration"
        yield VideoAnnotation.model_validate(
            dict(row) | {"moments": _in_order(row.moments), "source": str(path), "kind": kind}
        )


def read_srt(path: Path) -> Iterator[VideoAnnotation]:
    """SubRip subtitles: blocks of a number, a line `00:00:01,500 --> 00:00:04,000`, and text."""
    moments = []
    for start, block in _blocks(_text(path)):
        timing = 1 if len(block) > 1 and block[0].strip().isdigit() else 0
        moments.append(_cue(path, start + timing, block[timing], block[timing + 1 :]))
    yield _beside(path, moments)


def read_webvtt(path: Path) -> Iterator[VideoAnnotation]:
    """WebVTT subtitles or descriptions; notes, styles, regions and cue settings are ignored."""
    blocks = list(_blocks(_text(path)))
    if not blocks or not re.match(r"WEBVTT(\s|$)", blocks[0][1][0]):
        found = blocks[0][1][0] if blocks else ""
        raise AnnotationError(f"{path}:1: found {_short(found)}, expected 'WEBVTT'")
    moments = []
    for start, block in blocks[1:]:
        if re.match(r"(NOTE|STYLE|REGION)(\s|$)", block[0]):
            continue
        timing = 1 if "-->" not in block[0] and len(block) > 1 else 0
        moments.append(_cue(path, start + timing, block[timing], block[timing + 1 :]))
    yield _beside(path, moments)


Reader = Callable[[Path], Iterator[VideoAnnotation]]
READERS: dict[str, Reader] = {".jsonl": read_jsonl, ".srt": read_srt, ".vtt": read_webvtt}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise AnnotationError(f"{path}:{line}: found bytes that are no UTF-8, expected UTF-8 text") from None


def _blocks(text: str) -> Iterator[tuple[int, list[str]]]:
    """Runs of non-blank lines with the number of their first line."""
    block: list[str] = []
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if line.strip():
            block.append(line)
        elif block:
            yield number - len(block), block
            block = []


def _cue(path: Path, number: int, timing: str, lines: list[str]) -> Moment:
    expected = "expected a line such as '00:00:01,500 --> 00:00:04,000'"
    arrow = ARROW.match(timing)
    clocks = [CLOCK.match(clock) for clock in arrow.groups()] if arrow else []
    if not clocks or not all(clocks):
        raise AnnotationError(f"{path}:{number}: found {_short(timing)}, {expected}")
    time, stop = (_seconds(clock) for clock in clocks if clock)
    if stop < time:
        raise AnnotationError(f"{path}:{number}: found a cue that ends at {stop} s, before its start at {time} s")
    text = html.unescape(TAG.sub("", " ".join(line.strip() for line in lines)))
    return Moment(time=time, stop=stop, text=" ".join(text.split()))


def _seconds(clock: re.Match[str]) -> float:
    hours, minutes, seconds, fraction = clock.groups()
    # Through decimal text, so that the float is the one nearest to what is written.
    return float(f"{int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds)}.{fraction}")


def _beside(path: Path, moments: Sequence[Moment]) -> VideoAnnotation:
    """The row of the video that `path` stands beside; where there is none, `video` names no file."""
    video = named(path.parent, path.stem, VIDEO_SUFFIXES) or path.with_suffix(VIDEO_SUFFIXES[0])
    return VideoAnnotation(video_id=video_id(video), video=str(video), moments=_in_order(moments), source=str(path))


def _in_order(moments: Sequence[Moment]) -> tuple[Moment, ...]:
    return tuple(sorted(moments, key=lambda moment: moment.time))


def _short(found: object) -> str:
    text = found if isinstance(found, str) else json.dumps(found, default=str)
    return repr(text if len(text) <= 80 else text[:77] + "...")

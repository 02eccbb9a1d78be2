"""Sessions on disk: what each was given, in the order in which it counted, and what its client was told.

With `serve.record` every gateway appends to FOLDER/SESSION.jsonl, a line for every admitted frame,
question, setting and event of the log; `serve/replay.py` plays it again. The pictures of clients are in it:
who turns this on answers for them.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from actors.messages import TolerantSettings
from serve.server_events import AnyServerEvent, ServerEvent


class RecordingError(ValueError):
    """A file is no recording; says which line and why."""


class Line(BaseModel):
    """Base of what a recording consists of."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Opened(Line):
    """The session began, with these settings, and these optional events for its client."""

    kind: Literal["opened"] = "opened"
    settings: TolerantSettings
    include: list[str]


class Shown(Line):
    """A frame was admitted."""

    kind: Literal["frame"] = "frame"
    video_time: float
    image: str = Field(repr=False)


class Asked(Line):
    """A question was asked after the frames before it."""

    kind: Literal["question"] = "question"
    id: str
    text: str
    video_time: float | None


class Changed(Line):
    """Settings changed after the frames before it."""

    kind: Literal["settings"] = "settings"
    settings: TolerantSettings


class Interrupted(Line):
    """The response was to be cut: by how much it was is in the events alone."""

    kind: Literal["interrupt"] = "interrupt"


class Finished(Line):
    """There were no more frames."""

    kind: Literal["end"] = "end"


class Told(Line):
    """An event of the log, as the client was told."""

    kind: Literal["event"] = "event"
    event: AnyServerEvent


AnyLine = Opened | Shown | Asked | Changed | Interrupted | Finished | Told
_line: TypeAdapter[AnyLine] = TypeAdapter(Annotated[AnyLine, Field(discriminator="kind")])


class Recorder:
    """Appends to the recording of one session."""

    def __init__(self, folder: Path, session_id: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{session_id}.jsonl"

    def add(self, line: AnyLine) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line.model_dump_json() + "\n")

    def frame(self, video_time: float, image: bytes) -> None:
        self.add(Shown(video_time=video_time, image=base64.b64encode(image).decode()))

    def event(self, event: ServerEvent) -> None:
        self.add(Told.model_validate({"event": event.model_dump()}))


def read(path: Path) -> list[AnyLine]:
    """All lines of a recording, in order. Raises RecordingError."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
        try:
            lines.append(_line.validate_json(text))
        except ValidationError as error:
            raise RecordingError(f"{path}, line {number}: {error.errors()[0]['msg']}, found {text[:60]!r}") from None
    if not any(isinstance(line, Opened) for line in lines):
        raise RecordingError(f"{path} does not say how its session was opened: is it a recording?")
    return lines

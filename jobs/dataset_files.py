"""Files of public datasets: read as typed rows, and named with where they belong when they are missing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from jobs.annotations import VIDEO_SUFFIXES, AnnotationError, named

Split = Literal["train", "validation"]

FEATURES_SUFFIX = ".pt"
EGO4D = "sign Ego4D's licence (ego4d-data.org), then `ego4d --output_directory=FOLDER --datasets annotations`"
COIN = "coin-dataset.github.io has COIN.json: save it under this name"
PUBLISHED = "it is published with VideoLLM-online (Hugging Face dataset chenjoya/videollm-online-chat-ego4d-134k)"

T = TypeVar("T")


class Entry(BaseModel):
    """A part of a published file: the keys we use. What else a file holds is none of our business."""

    model_config = ConfigDict(frozen=True, extra="ignore")


def read_json(path: Path, kind: TypeAdapter[T], how_to_get: str) -> T:
    """The JSON file `path` as `kind`. Raises AnnotationError that names the file and what is wrong with it."""
    if not path.is_file():
        raise AnnotationError(f"{path} is missing: {how_to_get}, and put it into {path.parent}")
    try:
        return kind.validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "file"
        raise AnnotationError(
            f"{path}: {where}: found {str(problem['input'])[:80]!r}, expected: {problem['msg']}"
        ) from None


def find_video(folder: Path, video_id: str) -> Path | None:
    """The video of that id in `folder`, or its features as the public reference saves them."""
    return named(folder, video_id, (*VIDEO_SUFFIXES, FEATURES_SUFFIX))

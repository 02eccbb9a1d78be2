"""Build streaming dialogues from what people wrote about videos.

Reads annotation files (.jsonl, .srt, .vtt: see jobs/annotations.py), looks at the videos they
describe, and writes the folder `data.folder`:

  train.jsonl, validation.jsonl   one dialogue a line (see jobs/dialogues.py), split by video
  coverage.json                   which videos and texts were used, and why others were not

A video that is missing or cannot be read is reported and left out. The result depends on the files
and settings only, not on the number of workers. The next step is jobs.encode_frames.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ray.data
from pydantic import Field
from tqdm import tqdm

from actors.config import Config, ConfigError, ModelConfig, Section
from actors.video import VideoError, VideoInfo, probe
from jobs.annotations import (
    AnnotationError,
    AnnotationsConfig,
    VideoAnnotation,
    find_annotations,
    read_annotations,
)
from jobs.cluster import connect
from jobs.dialogues import SPLITS, DataConfig, Dialogue, narrate, split_of, to_line
from jobs.program import run

logger = logging.getLogger(__name__)


class Result(Section):
    """What became of one annotated video; travels as JSON, since turns of several kinds fit into no Arrow column."""

    video_id: str
    source: str
    texts: int
    texts_used: int = 0
    texts_dropped: dict[str, int] = Field(default_factory=dict)
    dialogues: tuple[Dialogue, ...] = ()
    left_out: str | None = None


@dataclass
class Coverage:
    """What became of the annotated videos and their texts."""

    videos: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    texts: int = 0
    texts_used: int = 0
    texts_dropped: Counter[str] = field(default_factory=Counter)
    frames: int = 0
    dialogues: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> str:
        return json.dumps(
            {
                "videos": {
                    "annotated": self.videos,
                    "used": self.videos - len(self.left_out),
                    "left_out": self.left_out,
                },
                "texts": {"annotated": self.texts, "used": self.texts_used, "dropped": dict(self.texts_dropped)},
                "dialogues": {split: self.dialogues[split] for split in SPLITS},
                "frames": self.frames,
            },
            indent=2,
            ensure_ascii=False,
            sort_keys=True,
        )


def build(config: Config) -> Coverage:
    """Write the dialogues of `config` and return what they cover. Raises AnnotationError, ConfigError."""
    data = config.section("data", DataConfig)
    system_prompt = config.model.system_prompt
    files = [str(file.absolute()) for file in find_annotations(config.section("annotations", AnnotationsConfig).paths)]
    connect()
    ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    rows = (
        ray.data.from_items([{"file": file} for file in files], override_num_blocks=min(len(files), 64))
        .flat_map(_read)
        .map(functools.partial(_build, data=data, system_prompt=system_prompt))
    )
    done = list(tqdm(rows.iter_rows(), unit="video", disable=None))
    if problems := sorted(row["problem"] for row in done if row["problem"]):
        raise AnnotationError("\n".join(problems))
    results = [Result.model_validate_json(row["result"]) for row in done]
    # Blocks arrive in any order.
    results.sort(key=lambda result: (result.video_id, result.source))
    _refuse_repeated(results)
    coverage = _write(results, Path(data.folder), data)
    _report(coverage, data)
    return coverage


def _read(row: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Rows with an annotation as JSON. A bad file becomes a row too: raised here, Ray would log it at length."""
    try:
        for annotation in read_annotations(row["file"]):
            yield {"annotation": annotation.model_dump_json(), "problem": ""}
    except AnnotationError as error:
        yield {"annotation": "", "problem": str(error)}


def _build(row: Mapping[str, str], data: DataConfig, system_prompt: str) -> dict[str, str]:
    if row["problem"]:
        return {"result": "", "problem": row["problem"]}
    annotation = VideoAnnotation.model_validate_json(row["annotation"])
    return {"result": build_video(annotation, data, system_prompt).model_dump_json(), "problem": ""}


def build_video(annotation: VideoAnnotation, data: DataConfig, system_prompt: str) -> Result:
    """The dialogues of one annotated video, or why it has none."""
    result = Result(video_id=annotation.video_id, source=annotation.source, texts=len(annotation.moments))
    try:
        info = probe(annotation.video)
    except VideoError as error:
        return result.model_copy(update={"left_out": str(error)})
    narration = narrate(annotation, frames_in(info, data.fps), info.duration, data, system_prompt)
    left_out = None if narration.dialogues else f"{annotation.source}: no text within the video's {info.duration:g} s"
    return result.model_copy(
        update={
            "dialogues": tuple(narration.dialogues),
            "texts_used": narration.used,
            "texts_dropped": dict(narration.dropped),
            "left_out": left_out,
        }
    )


def frames_in(info: VideoInfo, fps: float) -> int:
    """How many frames the grid 0, 1/fps, ... has up to the video's last picture, at least.

    At the very end a container's duration may be off by rounding: then a frame less, never one more.
    """
    last = info.duration - 1 / info.fps - 1e-3
    return max(1, math.floor(last * fps) + 1)


def _refuse_repeated(results: list[Result]) -> None:
    for first, second in itertools.pairwise(results):
        if first.video_id == second.video_id:
            raise AnnotationError(
                f"video {first.video_id!r} is annotated twice, in {first.source} and {second.source}: "
                "remove one, or give other video_ids in a .jsonl file"
            )


def _write(results: list[Result], folder: Path, data: DataConfig) -> Coverage:
    coverage = Coverage(videos=len(results))
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    for result in results:
        coverage.texts += result.texts
        coverage.texts_used += result.texts_used
        coverage.texts_dropped.update(result.texts_dropped)
        if result.left_out is not None:
            coverage.left_out[result.video_id] = result.left_out
        split = split_of(result.video_id, data.validation_fraction)
        for dialogue in result.dialogues:
            coverage.dialogues[split] += 1
            coverage.frames += dialogue.num_frames
            lines[split].append(to_line(dialogue))
    if not coverage.dialogues:
        reasons = "; ".join(coverage.left_out.values()) or "the annotation files are empty"
        raise ConfigError(f"no dialogue could be built from {len(results)} annotated videos: {reasons}")
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        _replace(folder / f"{split}.jsonl", lines[split])
    _replace(folder / "coverage.json", [coverage.to_json(), "\n"])
    return coverage


def _replace(path: Path, lines: Iterable[str]) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.writelines(lines)
    temporary.replace(path)


def _report(coverage: Coverage, data: DataConfig) -> None:
    for reason in coverage.left_out.values():
        logger.warning("left out: %s", reason)
    for reason, count in coverage.texts_dropped.items():
        logger.info("texts dropped: %s: %s", reason, count)
    logger.info(
        "folder=%s videos=%s/%s texts=%s/%s frames=%s dialogues=%s",
        data.folder,
        coverage.videos - len(coverage.left_out),
        coverage.videos,
        coverage.texts_used,
        coverage.texts,
        coverage.frames,
        " ".join(f"{split}={coverage.dialogues[split]}" for split in SPLITS),
    )
    if not coverage.dialogues["train"]:
        logger.warning("all videos fell into validation: set data.validation_fraction=0 to train on them")


if __name__ == "__main__":
    sys.exit(
        run(
            build,
            module="jobs.build_dialogues",
            about=__doc__,
            sections={"model": ModelConfig, "annotations": AnnotationsConfig, "data": DataConfig},
            user_errors=(AnnotationError,),
        )
    )

"""Build streaming dialogues from what people wrote about videos.

Reads annotation files (.jsonl, .srt, .vtt: see jobs/annotations.py) and public datasets (jobs/public.py),
looks at the videos they describe, and writes the folder `data.folder`:

  train.jsonl, validation.jsonl   one dialogue a line (see jobs/dialogues.py), split by video
  coverage.json                   which videos and texts were used, why others were not, and what it was made from

A video that is missing or cannot be read is reported and left out. The result depends on the files
and settings only, not on the number of workers. The next step is jobs.encode_frames.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

import ray.data
from pydantic import Field
from tqdm import tqdm

from actors.config import Config, ConfigError, ModelConfig, Section
from actors.video import VideoError
from jobs.annotations import (
    AnnotationError,
    AnnotationsConfig,
    DatasetConfig,
    VideoAnnotation,
    find_annotations,
    read_annotations,
)
from jobs.cluster import connect
from jobs.dialogues import SPLITS, DataConfig, Dialogue, split_of, to_line
from jobs.extents import extent_of
from jobs.program import run
from jobs.public import read_dataset
from jobs.robustness import write_videos
from jobs.tasks import copies, dialogues_of

logger = logging.getLogger(__name__)

ROWS_A_TASK = 64
MOST_REASONS = 20  # said aloud; coverage.json has all


class Result(Section):
    """What became of one annotation row; travels as JSON, since turns of several kinds fit into no Arrow column."""

    video_id: str
    source: str
    dataset: str = ""
    part: str = ""
    split: str
    texts: int
    texts_used: int = 0
    texts_dropped: dict[str, int] = Field(default_factory=dict)
    dialogues: tuple[Dialogue, ...] = ()
    left_out: str | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What no two rows have in common."""
        return self.video_id, self.dataset, self.part, self.split


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
    datasets: Counter[str] = field(default_factory=Counter)
    made_from: dict[str, object] = field(default_factory=dict)

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
                "dialogues_of_datasets": dict(self.datasets),
                "frames": self.frames,
                "made_from": self.made_from,
            },
            indent=2,
            ensure_ascii=False,
            sort_keys=True,
        )


def build(config: Config) -> Coverage:
    """Write the dialogues of `config` and return what they cover. Raises AnnotationError, ConfigError."""
    data = config.section("data", DataConfig)
    system_prompt = config.model.system_prompt
    annotations = config.section("annotations", AnnotationsConfig)
    files = [{"file": str(file.absolute()), "dataset": ""} for file in find_annotations(annotations.paths)]
    datasets = {name: _located(dataset, data) for name, dataset in annotations.datasets.items()}
    sources = files + [{"file": "", "dataset": name} for name in datasets]
    if not sources:
        raise ConfigError("annotations names neither paths nor datasets: there is nothing to make dialogues of")
    connect()
    ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    weights = {name: dataset.weight for name, dataset in datasets.items()}
    rows = (
        ray.data.from_items(sources, override_num_blocks=min(len(sources), 64))
        .flat_map(functools.partial(_read, datasets=datasets))
        # A dataset is read as one block, but built by all workers.
        .repartition(target_num_rows_per_block=ROWS_A_TASK)
        .map(functools.partial(_build, data=data, system_prompt=system_prompt, weights=weights))
    )
    done = list(tqdm(rows.iter_rows(), unit="video", disable=None))
    if problems := sorted(row["problem"] for row in done if row["problem"]):
        raise AnnotationError("\n".join(problems))
    results = [Result.model_validate_json(row["result"]) for row in done]
    # Blocks arrive in any order.
    results.sort(key=lambda result: (*result.key, result.source))
    _refuse_repeated(results)
    coverage = _write(results, Path(data.folder), data, _provenance(results, config))
    _report(coverage, data)
    return coverage


def _located(dataset: DatasetConfig, data: DataConfig) -> DatasetConfig:
    """The dataset with absolute paths, for processes in other folders; robustness is given its videos."""
    if dataset.format == "robustness":
        folder = Path(data.folder).absolute() / "robustness"
        write_videos(folder, data.fps)
        return dataset.model_copy(update={"path": str(folder)})
    return dataset.model_copy(
        update={"path": str(Path(dataset.path).absolute()), "videos": str(Path(dataset.videos).absolute())}
    )


def _read(row: Mapping[str, str], datasets: Mapping[str, DatasetConfig]) -> Iterator[dict[str, str]]:
    """Rows with an annotation as JSON. A bad file becomes a row too: raised here, Ray would log it at length."""
    name = row["dataset"]
    try:
        for annotation in read_dataset(name, datasets[name]) if name else read_annotations(row["file"]):
            yield {"annotation": annotation.model_dump_json(), "problem": ""}
    except AnnotationError as error:
        yield {"annotation": "", "problem": str(error)}


def _build(
    row: Mapping[str, str], data: DataConfig, system_prompt: str, weights: Mapping[str, float]
) -> dict[str, str]:
    if row["problem"]:
        return {"result": "", "problem": row["problem"]}
    annotation = VideoAnnotation.model_validate_json(row["annotation"])
    result = build_video(annotation, data, system_prompt, weights.get(annotation.dataset, 1))
    return {"result": result.model_dump_json(), "problem": ""}


def build_video(annotation: VideoAnnotation, data: DataConfig, system_prompt: str, weight: float = 1) -> Result:
    """The dialogues of one annotation row, made `weight` times on average, or why it has none."""
    result = Result(
        video_id=annotation.video_id,
        source=annotation.source,
        dataset=annotation.dataset,
        part=annotation.part,
        split=annotation.split or split_of(annotation.video_id, data.validation_fraction),
        texts=len(annotation.moments),
    )
    try:
        video = extent_of(annotation, data.fps)
    except VideoError as error:
        return result.model_copy(update={"left_out": str(error)})
    # Weights mix what is trained on; what is graded stays as it is.
    times = copies(annotation, weight, data.seed) if result.split == "train" else 1
    made = [dialogues_of(annotation, video, data, system_prompt, result.split, copy) for copy in range(times)]
    dialogues = tuple(dialogue for narration in made for dialogue in narration.dialogues)
    left_out = None
    if times and not dialogues:
        left_out = f"{annotation.source}: no {'text' if annotation.moments else 'dialogue'} within the video's "
        left_out += f"{video.duration:g} s"
    return result.model_copy(
        update={
            "dialogues": dialogues,
            "texts_used": made[0].used if made else 0,
            "texts_dropped": dict(made[0].dropped) if made else {},
            "left_out": left_out,
        }
    )


def _refuse_repeated(results: list[Result]) -> None:
    for first, second in itertools.pairwise(results):
        if first.key == second.key:
            part = f" (part {first.part!r} of dataset {first.dataset!r})" if first.dataset else ""
            raise AnnotationError(
                f"video {first.video_id!r}{part} is annotated twice, in {first.source} and {second.source}: "
                "remove one, or give other video_ids in a .jsonl file"
            )


def _provenance(results: list[Result], config: Config) -> dict[str, object]:
    """What must be the same to make the same dialogues again, but the videos."""
    hashes = {}
    for source in sorted({result.source for result in results}):
        if Path(source).is_file():
            with open(source, "rb") as file:
                hashes[source] = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "version": _version(),
        "annotations": config.section("annotations", AnnotationsConfig).model_dump(mode="json"),
        "data": config.section("data", DataConfig).model_dump(mode="json"),
        "system_prompt": config.model.system_prompt,
        "sha256": hashes,
    }


def _version() -> str:
    try:
        return version("videollm-online")
    except PackageNotFoundError:  # run from a folder, as `ray job submit --working-dir` does
        return "not installed"


def _write(results: list[Result], folder: Path, data: DataConfig, made_from: dict[str, object]) -> Coverage:
    coverage = Coverage(videos=len({result.video_id for result in results}), made_from=made_from)
    used = {result.video_id for result in results if result.left_out is None}
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    for result in results:
        coverage.texts += result.texts
        coverage.texts_used += result.texts_used
        coverage.texts_dropped.update(result.texts_dropped)
        if result.left_out is not None and result.video_id not in used:
            coverage.left_out[result.video_id] = result.left_out
        if result.dataset:
            coverage.datasets[result.dataset] += len(result.dialogues)
        for dialogue in result.dialogues:
            coverage.dialogues[result.split] += 1
            coverage.frames += dialogue.num_frames
            lines[result.split].append(to_line(dialogue))
    if not coverage.dialogues:
        reasons = "; ".join(islice(coverage.left_out.values(), MOST_REASONS)) or "the annotation files are empty"
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
    for reason in islice(coverage.left_out.values(), MOST_REASONS):
        logger.warning("left out: %s", reason)
    if len(coverage.left_out) > MOST_REASONS:
        more = len(coverage.left_out) - MOST_REASONS
        logger.warning("left out: %s more, listed in %s/coverage.json", more, data.folder)
    for name, count in sorted(coverage.datasets.items()):
        logger.info("dataset=%s dialogues=%s", name, count)
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

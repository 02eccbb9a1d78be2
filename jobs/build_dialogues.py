"""Build streaming dialogues from what people wrote about videos.

Reads annotation files (.jsonl, .srt, .vtt: see jobs/annotations.py) and public datasets (jobs/public.py),
looks at the videos they describe, and writes the folder `data.folder`:

  train/, validation/   dialogues in Parquet (see jobs/dialogue_files.py), split by video
  coverage.json         which videos and texts were used, why others were not, and what it was made from
  quarantine.jsonl      texts that a language model wrote and that are of no use, with the reason

A video that is missing or cannot be read is reported and left out. The result depends on the files
and settings only, not on the number of workers. The next step is jobs.encode_frames.
"""

from __future__ import annotations

import functools
import itertools
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import ray.data

from actors.cache import whole_folder, write_whole
from actors.causal_lm import EMBEDDED, causal_lm_folder
from actors.config import Config, ConfigError, ModelConfig
from actors.embedded import EmbeddedModelError
from actors.video import VideoError
from actors.weights import WeightsError
from jobs.annotations import (
    AnnotationError,
    AnnotationsConfig,
    DatasetConfig,
    VideoAnnotation,
    find_annotations,
    read_annotations,
)
from jobs.cluster import connect
from jobs.coverage import Coverage, Quarantined, Result
from jobs.dialogue_sink import QUARANTINE, DialogueSink, alone
from jobs.dialogues import SPLITS, DataConfig, split_of
from jobs.extents import extent_of
from jobs.livechat import to_words, unfit
from jobs.program import run
from jobs.provenance import code_version, file_sha256
from jobs.public import read_dataset
from jobs.robustness import write_videos
from jobs.row_writing import WrittenRow, needs_writing
from jobs.tasks import SCENES, copies, dialogues_of
from jobs.writer import WriterConfig
from jobs.writing_stage import write_rows

logger = logging.getLogger(__name__)

ROWS_A_TASK = 64


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
    for split in SPLITS:
        if (by_hand := Path(data.folder) / f"{split}.jsonl").exists():
            raise ConfigError(f"{by_hand} holds dialogues already: remove it, or choose another data.folder")
    connect()
    ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    weights = {name: dataset.weight for name, dataset in datasets.items()}
    rows = _rows(sources, annotations.model_copy(update={"datasets": datasets}), _writer(config), data).map(
        functools.partial(_build, data=data, system_prompt=system_prompt, weights=weights)
    )
    folder = Path(data.folder)
    provenance = _provenance(config)
    with ExitStack() as stack:
        stack.enter_context(alone(folder))
        folders = {split: stack.enter_context(whole_folder(folder.absolute() / split)) for split in SPLITS}
        quarantine = Path(stack.enter_context(TemporaryDirectory(prefix=".quarantine-", dir=folder)))
        sink = DialogueSink(folders, quarantine.absolute(), provenance)
        rows.write_datasink(sink)
        if sink.written.problems:
            raise AnnotationError("\n".join(sorted(sink.written.problems)))
        # Blocks arrive in any order.
        outcomes = sorted(sink.written.outcomes, key=lambda outcome: (*outcome.result.key, outcome.result.source))
        _refuse_repeated([outcome.result for outcome in outcomes])
        coverage = Coverage.of(outcomes)
        write_whole(folder / f"{QUARANTINE}.jsonl", (part.read_text() for part in sorted(quarantine.glob("*.jsonl"))))
        if not coverage.dialogues.total():
            reasons = coverage.reasons() or "the annotation files are empty"
            raise ConfigError(f"no dialogue could be built from {len(outcomes)} annotated videos: {reasons}")
        coverage.made_from = provenance | {"sha256": {o.result.source: o.result.sha256 for o in outcomes}}
        write_whole(folder / "coverage.json", [coverage.to_json(), "\n"])
    coverage.report(data.folder)
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


def _rows(
    sources: list[dict[str, str]], annotations: AnnotationsConfig, writer: WriterConfig, data: DataConfig
) -> ray.data.Dataset:
    """Rows {row: a `WrittenRow` as JSON, sha256 of its file, problem: what was wrong with the file}."""

    def read(sources: list[dict[str, str]]) -> ray.data.Dataset:
        return (
            ray.data.from_items(sources, override_num_blocks=min(len(sources), 64))
            .flat_map(functools.partial(_read, datasets=annotations.datasets))
            # A dataset is read as one block, but built by all workers.
            .repartition(target_num_rows_per_block=ROWS_A_TASK)
        )

    def is_written(source: dict[str, str]) -> bool:
        return needs_writing(annotations, source["dataset"])

    ready, waiting = [s for s in sources if not is_written(s)], [s for s in sources if is_written(s)]
    if not waiting:
        return read(ready)
    written = write_rows(read(waiting), writer, annotations, data)
    return written.union(read(ready)) if ready else written


def _read(row: Mapping[str, str], datasets: Mapping[str, DatasetConfig]) -> Iterator[dict[str, str]]:
    """Rows as JSON. A bad file becomes a row too: raised here, Ray would log it at length."""
    name = row["dataset"]
    try:
        for annotation in read_dataset(name, datasets[name]) if name else read_annotations(row["file"]):
            written = WrittenRow(annotation=annotation)
            yield {"row": written.model_dump_json(), "sha256": file_sha256(annotation.source), "problem": ""}
    except AnnotationError as error:
        yield {"row": "", "sha256": "", "problem": str(error)}


def _build(
    row: Mapping[str, str], data: DataConfig, system_prompt: str, weights: Mapping[str, float]
) -> dict[str, str]:
    if row["problem"]:
        return {"result": "", "problem": row["problem"]}
    written = WrittenRow.model_validate_json(row["row"])
    annotation = written.annotation
    result = build_video(annotation, data, system_prompt, weights.get(annotation.dataset, 1))
    notes = {
        "sha256": row["sha256"],
        "quarantined": written.quarantined + result.quarantined,
        "texts": result.texts + sum(written.dropped.values()),
        "texts_dropped": dict(Counter(result.texts_dropped) + Counter(written.dropped)),
    }
    if written.quarantined and not annotation.moments:
        notes["left_out"] = f"{annotation.source}: what was written about it is quarantined"
        notes["texts_dropped"] = written.dropped
    return {"result": result.model_copy(update=notes).model_dump_json(), "problem": ""}


def _unfit(annotation: VideoAnnotation) -> tuple[Quarantined, ...]:
    """A chat that was generated elsewhere and is of no use, with its words."""
    reason = unfit(annotation.moments) if annotation.kind == "generated_chat" else None
    if reason is None:
        return ()
    row = {"video_id": annotation.video_id, "dataset": annotation.dataset, "part": annotation.part}
    return (Quarantined(**row, reason=reason, text=to_words(annotation.moments)),)


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
        if annotation.kind in SCENES and made[0].dropped:
            left_out = f"{annotation.source}: {', '.join(made[0].dropped)} ({video.duration:g} s)"
    return result.model_copy(
        update={
            "dialogues": dialogues,
            "texts_used": made[0].used if made else 0,
            "texts_dropped": dict(made[0].dropped) if made else {},
            "quarantined": _unfit(annotation),
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


def _writer(config: Config) -> WriterConfig:
    """The settings with absolute paths, for processes in other folders. Finds out whether there is such a model."""
    writer = config.section("writer", WriterConfig)
    model = writer.model
    if writer.backend == "transformers":
        folder = causal_lm_folder(writer.model)
        model = model if model == EMBEDDED else str(folder.absolute())
    return writer.model_copy(update={"model": model, "folder": str(Path(writer.folder).absolute())})


def _provenance(config: Config) -> dict[str, object]:
    """What must be the same to make the same dialogues again, but the annotation files and videos."""
    return {
        "code": code_version(),
        "annotations": config.section("annotations", AnnotationsConfig).model_dump(mode="json"),
        "data": config.section("data", DataConfig).model_dump(mode="json"),
        "writer": config.section("writer", WriterConfig).model_dump(mode="json"),
        "system_prompt": config.model.system_prompt,
    }


if __name__ == "__main__":
    sys.exit(
        run(
            build,
            module="jobs.build_dialogues",
            about=__doc__,
            sections={
                "model": ModelConfig,
                "annotations": AnnotationsConfig,
                "writer": WriterConfig,
                "data": DataConfig,
            },
            user_errors=(AnnotationError, WeightsError, EmbeddedModelError),
        )
    )

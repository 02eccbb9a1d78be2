"""The stage of Ray Data in which texts are written: tasks for the rule, a pool of actors for a language model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import numpy as np
import ray.data

from jobs.annotations import AnnotationsConfig
from jobs.dialogues import DataConfig
from jobs.row_writing import RowWriting, WrittenRow
from jobs.writer import TemplateWriter, WriterConfig, open_writer

ROWS_BY_RULE = 64
ROWS_BY_MODEL = 8  # whose texts are written together


def write_rows(
    rows: ray.data.Dataset, writer: WriterConfig, annotations: AnnotationsConfig, data: DataConfig
) -> ray.data.Dataset:
    """Rows {row: a `WrittenRow` as JSON, sha256, problem} with what is written for them; those of a problem pass."""
    if writer.backend == "template":
        by_rule = partial(_write_by_rule, annotations=annotations, data=data)
        return rows.map_batches(by_rule, batch_size=ROWS_BY_RULE)
    gpus = writer.gpus if writer.gpus is not None else float(ray.cluster_resources().get("GPU", 0) > 0)
    return rows.map_batches(
        _WritingActor,
        fn_constructor_args=(writer, annotations, data),
        batch_size=ROWS_BY_MODEL,
        compute=ray.data.ActorPoolStrategy(size=writer.workers),
        num_cpus=writer.cpus,
        num_gpus=gpus or None,
    )


class _WritingActor:
    """A stage of the pipeline that keeps its language model."""

    def __init__(self, writer: WriterConfig, annotations: AnnotationsConfig, data: DataConfig) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        self.writing = RowWriting(open_writer(writer), annotations, data.fps, data.seed)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
        return _written(batch, self.writing)


def _write_by_rule(
    batch: Mapping[str, np.ndarray], annotations: AnnotationsConfig, data: DataConfig
) -> dict[str, list[str]]:
    return _written(batch, RowWriting(TemplateWriter(), annotations, data.fps, data.seed))


def _written(batch: Mapping[str, np.ndarray], writing: RowWriting) -> dict[str, list[str]]:
    read = [str(row) for row in batch["row"]]
    made = iter(writing([WrittenRow.model_validate_json(row).annotation for row in read if row]))
    columns: dict[str, list[str]] = {"row": [], "sha256": [], "problem": []}
    for row, sha256, problem in zip(read, batch["sha256"], batch["problem"], strict=True):
        rows = [written.model_dump_json() for written in next(made)] if row else [""]
        columns["row"] += rows
        columns["sha256"] += [str(sha256)] * len(rows)
        columns["problem"] += [str(problem)] * len(rows)
    return columns

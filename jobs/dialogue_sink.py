"""Where Ray Data writes dialogues: every task its own Parquet files, nothing through the driver but counts.

All is written into folders that only get their names when everything is complete (actors/cache.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ray.data import Datasink
from ray.data._internal.execution.interfaces import TaskContext
from ray.data.block import Block, BlockAccessor
from ray.data.datasource.datasink import WriteResult

from actors.cache import alone_in
from actors.config import ConfigError
from jobs.coverage import Outcome, Result
from jobs.dialogue_files import PARQUET, Origin, write_parquet
from jobs.dialogues import SPLITS

QUARANTINE = "quarantine"


@dataclass(frozen=True)
class Written:
    """What one task wrote, and what was wrong with annotation files."""

    outcomes: list[Outcome] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class DialogueSink(Datasink[Written]):
    """Takes rows {result: a `Result` as JSON, problem: what was wrong with a file}; `folders` is one for each split.

    `written` holds what all tasks report, once they are done.
    """

    def __init__(self, folders: Mapping[str, Path], quarantine: Path, provenance: Mapping[str, object]) -> None:
        self.folders = folders
        self.quarantine = quarantine
        self.provenance = provenance
        self.written = Written()

    def write(self, blocks: Iterable[Block], ctx: TaskContext) -> Written:
        rows = [row for block in blocks for row in BlockAccessor.for_block(block).to_arrow().to_pylist()]
        written = Written(problems=[row["problem"] for row in rows if row["problem"]])
        results = [Result.model_validate_json(row["result"]) for row in rows if row["result"]]
        name = f"part-{ctx.task_idx:05d}"
        for split in SPLITS:
            made = [
                (dialogue, Origin(result.dataset, result.part, result.source, result.sha256), position)
                for result in results
                if result.split == split
                for position, dialogue in enumerate(result.dialogues)
            ]
            if made:
                write_parquet(self.folders[split] / f"{name}{PARQUET}", made, self.provenance)
        if lines := [bad.model_dump_json() + "\n" for result in results for bad in result.quarantined]:
            (self.quarantine / f"{name}.jsonl").write_text("".join(lines))
        written.outcomes.extend(map(Outcome.of, results))
        return written

    def on_write_complete(self, write_result: WriteResult[Written]) -> None:
        for part in write_result.write_returns:
            self.written.outcomes.extend(part.outcomes)
            self.written.problems.extend(part.problems)
        for folder in self.folders.values():
            if not any(folder.iterdir()):  # an empty split has a schema, too
                write_parquet(folder / f"part-00000{PARQUET}", [], self.provenance)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """The right to write dialogues there, for one program at a time; clears what a killed one left half-written.

    Raises ConfigError while another program holds it.
    """
    with alone_in(folder, ConfigError(f"another program is writing dialogues to {folder}: wait until it ends")):
        for stale in (path for name in (".*.part-*", ".quarantine-*") for path in folder.glob(name)):
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
            else:
                stale.unlink()
        yield

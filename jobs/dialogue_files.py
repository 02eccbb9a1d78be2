"""Dialogues in files: Parquet as jobs.build_dialogues writes it, and JSONL as people write it by hand.

A split is a folder of Parquet files, `data.folder/train/part-00000.parquet` and so on, a row a dialogue.
Each row says what it was made from (`dataset`, `part`, `source`, `source_sha256`), each file which settings
and code made it (`provenance` in its schema's metadata). `data.folder/train.jsonl`, one `Dialogue` a line,
is read in its place where there is no such folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from actors.turns import Assistant, Stream
from jobs.dialogues import Dialogue

PARQUET = ".parquet"
PROVENANCE = b"provenance"

# `learn` counts frames in a stream turn, and is 0 or 1 in the assistant's.
TURN = pa.struct([("role", pa.string()), ("content", pa.string()), ("num_frames", pa.int32()), ("learn", pa.int32())])
SCHEMA = pa.schema(
    [
        ("dialogue_id", pa.string()),
        ("task", pa.string()),
        ("video_id", pa.string()),
        ("video", pa.string()),
        ("fps", pa.float64()),
        ("frames", pa.list_(pa.int32(), 2)),
        ("conversation", pa.list_(TURN)),
        ("labels", pa.list_(pa.string())),
        ("dataset", pa.string()),
        ("part", pa.string()),
        ("position", pa.int32()),
        ("source", pa.string()),
        ("source_sha256", pa.string()),
    ]
)
ORDER = ("video_id", "dataset", "part", "position")


class DialogueFileError(ValueError):
    """A dialogue file is missing or holds something else; names file, line, found and expected."""


@dataclass(frozen=True)
class Origin:
    """What a dialogue was made from: a row of an annotation file, which gave it at `position` among others."""

    dataset: str
    part: str
    source: str
    source_sha256: str


def read_dialogues(path: str | Path) -> list[Dialogue]:
    """All dialogues of a file, or of a split such as `data.folder/train`, whichever form it has.

    Those of Parquet come in an order that does not depend on how they are spread over files. Raises
    DialogueFileError that names the line or row.
    """
    path = find_dialogues(path)
    if path.is_dir() or path.suffix == PARQUET:
        return list(_from_parquet(path))
    return list(_from_lines(path))


def read_videos(path: str | Path) -> dict[str, str]:
    """The video files of the dialogues at `path`, by id, where they have one.

    Raises DialogueFileError, also for an id of two videos: the dialogues of one would be learned on the other's frames.
    """
    path = find_dialogues(path)
    rows: Iterable[tuple[str, str]]
    if path.is_dir() or path.suffix == PARQUET:
        rows = zip(*(column.to_pylist() for column in _table(path, ("video_id", "video")).columns), strict=True)
    else:
        rows = ((dialogue.video_id, dialogue.video) for dialogue in _from_lines(path))
    videos: dict[str, str] = {}
    for video_id, video in rows:
        if video and videos.setdefault(video_id, video) != video:
            raise DialogueFileError(
                f"{path}: two videos have the id {video_id!r}, {videos[video_id]} and {video}: rename one of them, "
                "or give it another video_id in a .jsonl file, and run jobs.build_dialogues again"
            )
    return videos


def has_dialogues(path: str | Path) -> bool:
    """Whether there is a split at `path`, or one that somebody wrote by hand."""
    path = Path(path)
    return path.exists() or path.with_name(f"{path.name}.jsonl").exists()


def find_dialogues(path: str | Path) -> Path:
    """`path`, or `path`.jsonl for a split that somebody wrote by hand. Raises DialogueFileError for none or both."""
    path = Path(path)
    by_hand = path.with_name(f"{path.name}.jsonl")
    if path.exists() and by_hand.exists() and path.is_dir():
        raise DialogueFileError(f"both {path} and {by_hand} hold dialogues: remove one")
    if not path.exists() and not by_hand.is_file():
        raise DialogueFileError(f"{path}: no such dialogue file: run jobs.build_dialogues, or set data.folder")
    return path if path.exists() else by_hand


def read_provenance(path: str | Path) -> dict[str, object]:
    """Settings and code that made a Parquet file of dialogues; empty where it does not say."""
    metadata = pq.read_schema(path).metadata or {}
    provenance = json.loads(metadata.get(PROVENANCE, b"{}"))
    return provenance if isinstance(provenance, dict) else {}


def to_line(dialogue: Dialogue) -> str:
    """The dialogue as a line of JSONL."""
    return json.dumps(dialogue.model_dump(mode="json"), ensure_ascii=False) + "\n"


def write_parquet(
    path: Path, dialogues: Iterable[tuple[Dialogue, Origin, int]], provenance: Mapping[str, object]
) -> None:
    """One Parquet file of dialogues, each with its origin and its position among those of the same origin."""
    rows = [_row(dialogue, origin, position) for dialogue, origin, position in dialogues]
    schema = SCHEMA.with_metadata({PROVENANCE: json.dumps(provenance, sort_keys=True)})
    pq.write_table(pa.Table.from_pylist(rows, schema), path, compression="zstd")


def _row(dialogue: Dialogue, origin: Origin, position: int) -> dict[str, object]:
    fields = dialogue.model_dump(mode="json")
    for turn, columns in zip(dialogue.conversation, fields["conversation"], strict=True):
        if isinstance(turn, Stream | Assistant):
            columns["learn"] = turn.num_learned if isinstance(turn, Stream) else int(turn.learn)
    return fields | {"position": position} | vars(origin)


def _from_parquet(path: Path) -> Iterator[Dialogue]:
    table = _table(path, SCHEMA.names).sort_by([(name, "ascending") for name in ORDER])
    for number, row in enumerate(table.to_pylist(), start=1):
        fields = {name: row[name] for name in Dialogue.model_fields}
        try:
            yield Dialogue.model_validate(fields | {"conversation": [_turn(turn) for turn in row["conversation"]]})
        except ValidationError as error:
            raise _explained(error, f"{path}: dialogue {row['dialogue_id']!r} (row {number})") from None


def _table(path: Path, columns: Sequence[str]) -> pa.Table:
    """These columns of a file, or of all files of a folder."""
    files = sorted(path.glob(f"*{PARQUET}")) if path.is_dir() else [path]
    if not files:
        raise DialogueFileError(f"{path} holds no {PARQUET} file: run jobs.build_dialogues again")
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    tables = []
    for file in files:
        try:
            tables.append(
                pq.read_table(file, columns=list(columns), partitioning=None).select(schema.names).cast(schema)
            )
        except (pa.ArrowException, KeyError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise DialogueFileError(
                f"{file}: not dialogues in Parquet ({reason}): run jobs.build_dialogues again"
            ) from None
    return pa.concat_tables(tables)


def _turn(columns: Mapping[str, object]) -> dict[str, object]:
    """A turn without the columns that its role does not have, and with `learn` as `Dialogue` has it."""
    turn = {name: value for name, value in columns.items() if value is not None}
    if "learn" in turn and turn["learn"] in (0, turn.get("num_frames", 1)):
        turn["learn"] = bool(turn["learn"])
    return turn


def _from_lines(path: Path) -> Iterator[Dialogue]:
    with path.open() as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield Dialogue.model_validate_json(line)
            except ValidationError as error:
                raise _explained(error, f"{path}:{number}") from None


def _explained(error: ValidationError, place: str) -> DialogueFileError:
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"])) or "line"
    return DialogueFileError(f"{place}: {where}: {problem['msg']}")

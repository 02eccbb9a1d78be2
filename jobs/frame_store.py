"""Frame tokens on disk.

A frame-token store is a folder: `store.json` says what made the tokens, `videos/` holds one Parquet
file a video with a row a frame. `jobs.encode_frames` writes it once; training reads slices of it at
random. A video's file appears only when all its frames are in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field, ValidationError

from actors.cache import try_lock, write_whole
from actors.config import Section

ROWS_PER_GROUP = 64  # what a random slice reads at least: 1.6 MB at 10 tokens of 1280
SUFFIX = ".parquet"
LONGEST_NAME = 255 - len(f".%2E{SUFFIX}")  # bytes of a file's name on the usual disks, without what is put around it
OPEN_FILES = 256  # kept open at once, of 1,024 that a process may have


class StoreError(ValueError):
    """A store is missing, damaged, or made in another way than the reader needs; names both."""


class StoreInfo(Section):
    """What made a store's tokens. All of it must agree before two sets of tokens may be mixed."""

    version: Literal[1] = 1
    fingerprint: str
    vision: str
    fps: float = Field(gt=0)
    num_tokens: int = Field(gt=0)
    width: int = Field(gt=0)

    def differences(self, other: StoreInfo) -> list[str]:
        """`field a, not b` for every field in which `other` differs; where the weights lie may differ."""
        names = [name for name in type(self).model_fields if name != "vision"]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name} {mine}, not {theirs}" for name, mine, theirs in pairs if mine != theirs]


class FrameStore:
    """Frame tokens by video id and frame range. Cheap to open, and to send to another process."""

    def __init__(self, path: Path, info: StoreInfo) -> None:
        self.path = path
        self.info = info

    @classmethod
    def open(cls, path: str | Path, expect_fingerprint: str | None = None) -> Self:
        """The store at `path`. Raises StoreError where there is none, or it came from another encoder."""
        path = Path(path)
        file = path / "store.json"
        if not file.is_file():
            raise StoreError(f"{path} is no frame-token store (it has no store.json): run jobs.encode_frames")
        try:
            info = StoreInfo.model_validate_json(file.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise StoreError(f"{file} does not describe a frame-token store of version 1: {error}") from None
        if expect_fingerprint is not None and info.fingerprint != expect_fingerprint:
            raise StoreError(
                f"frame tokens in {path} come from {info.fingerprint!r}, the model expects {expect_fingerprint!r}: "
                "run jobs.encode_frames again into another folder"
            )
        return cls(path, info)

    @classmethod
    def create(cls, path: str | Path, info: StoreInfo) -> Self:
        """A store at `path` for tokens made as `info` says: a new one, or the one there if it agrees.

        Raises StoreError with both values where the store at `path` was made in another way.
        """
        path = Path(path)
        if (path / "store.json").exists():
            store = cls.open(path)
            if differences := store.info.differences(info):
                raise StoreError(
                    f"the store {path} was made with {'; '.join(differences)}: choose another folder or remove it"
                )
            return store
        (path / "videos").mkdir(parents=True, exist_ok=True)
        write_whole(path / "store.json", [info.model_dump_json(indent=2), "\n"])
        return cls(path, info)

    def file(self, video_id: str) -> Path:
        """Where the video is, once it is complete; until then the name has a dot before it. Raises StoreError."""
        name = quote(video_id, safe=" +,=@")
        if len(name) > LONGEST_NAME:  # letters outside ASCII as they are, in a third of the bytes or less
            name = "".join(one if one.isprintable() and not one.isascii() else quote(one, " +,=@") for one in video_id)
        if (length := len(name.encode())) > LONGEST_NAME:
            raise StoreError(
                f"the video id {video_id!r} makes a file name of {length} bytes, at most {LONGEST_NAME} are possible: "
                "rename the video"
            )
        return self.path / "videos" / (("%2E" + name[1:] if name.startswith(".") else name) + SUFFIX)

    def video_ids(self) -> list[str]:
        """The ids of all videos that are completely in the store, sorted."""
        return sorted(unquote(file.name.removesuffix(SUFFIX)) for file in (self.path / "videos").glob(f"[!.]*{SUFFIX}"))

    def __contains__(self, video_id: str) -> bool:
        return self.file(video_id).is_file()

    def num_frames(self, video_id: str) -> int:
        """Raises StoreError where the video is not in the store."""
        return int(self._parquet(video_id).metadata.num_rows)

    def source(self, video_id: str) -> str:
        """The path the video was read from when it was encoded. Raises StoreError where it is not in the store."""
        metadata: dict[bytes, bytes] = pq.read_schema(self._there(video_id)).metadata or {}
        return metadata.get(b"source", b"").decode()

    def damage(self, video_id: str) -> str:
        """Why the video has fewer frames than it should, as it was encoded; empty where nothing is known of that."""
        metadata: dict[bytes, bytes] = self._parquet(video_id).metadata.metadata or {}
        return metadata.get(b"damage", b"").decode()

    def frames(self, video_id: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Tokens of frames start..stop-1 as (F, N, D) fp16. Raises StoreError for frames that are not there."""
        rows, start, stop = self._rows(video_id, start, stop, "tokens")
        words = np.frombuffer(rows.buffers()[1], np.uint8) if len(rows) else np.empty(0, np.uint8)
        frame_bytes = 2 * self.info.num_tokens * self.info.width
        words = words[rows.offset * frame_bytes : (rows.offset + len(rows)) * frame_bytes]
        tokens = torch.from_numpy(words.view(np.float16).copy())
        return tokens.view(stop - start, self.info.num_tokens, self.info.width)

    def times(self, video_id: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Video time in seconds of frames start..stop-1, as the file's own clock has them."""
        return np.asarray(self._rows(video_id, start, stop, "time")[0].to_numpy())

    def _rows(self, video_id: str, start: int, stop: int | None, column: str) -> tuple[pa.Array, int, int]:
        """Read only the row groups that the range touches."""
        parquet = self._parquet(video_id)
        count = parquet.metadata.num_rows
        stop = count if stop is None else stop
        if not 0 <= start <= stop <= count:
            raise StoreError(f"frames {start}..{stop} of video {video_id!r} were asked for, the store has {count}")
        first = start // ROWS_PER_GROUP
        groups = range(first, -(-stop // ROWS_PER_GROUP)) if stop > start else range(0)
        table = parquet.read_row_groups(list(groups), columns=[column])
        offset = start - first * ROWS_PER_GROUP if stop > start else 0
        return table.column(column).combine_chunks().slice(offset, stop - start), start, stop

    def _parquet(self, video_id: str) -> pq.ParquetFile:
        if video_id not in self._open_files:
            file = self._there(video_id)
            if len(self._open_files) >= OPEN_FILES:
                del self._open_files[next(iter(self._open_files))]
            self._open_files[video_id] = pq.ParquetFile(file, memory_map=True)
        return self._open_files[video_id]

    def _there(self, video_id: str) -> Path:
        """The video's file. Raises StoreError where it is not in the store."""
        file = self.file(video_id)
        if not file.is_file():
            raise StoreError(
                f"video {video_id!r} is not in the frame-token store {self.path}: run jobs.encode_frames with it"
            )
        return file

    @cached_property
    def _open_files(self) -> dict[str, pq.ParquetFile]:
        return {}

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "info": self.info}

    def writer(self, video_id: str, source: str = "") -> VideoWriter:
        """Writes one video; `source` is remembered with it. Hold `locked` meanwhile."""
        return VideoWriter(self, video_id, source)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The right to write, for one program at a time; clears what a killed one left half-written.

        Raises StoreError while another program holds it.
        """
        with (self.path / ".lock").open("w") as lock:
            if not try_lock(lock.fileno()):
                raise StoreError(f"another program is writing to the store {self.path}: wait until it ends")
            for unfinished in (self.path / "videos").glob(f".*{SUFFIX}"):
                unfinished.unlink()
            yield


class VideoWriter:
    """Writes one video's frames in order, under a hidden name until `commit` gives the file its own.

    A context manager: what was not committed by its end is gone.
    """

    def __init__(self, store: FrameStore, video_id: str, source: str) -> None:
        self.info = store.info
        self.video_id = video_id
        self.target = store.file(video_id)
        self.temporary = self.target.with_name(f".{self.target.name}")
        self.frame_type = pa.binary(2 * self.info.num_tokens * self.info.width)
        fields = [("video_id", pa.string()), ("frame", pa.int32()), ("time", pa.float64()), ("tokens", self.frame_type)]
        schema = pa.schema(fields, metadata={"source": source})
        self.parquet = pq.ParquetWriter(self.temporary, schema, compression="lz4", use_dictionary=["video_id"])
        self.waiting_times: list[float] = []
        self.waiting_tokens: list[bytes] = []
        self.frames = 0

    def append(self, times: Sequence[float], tokens: torch.Tensor) -> None:
        """The next frames: their times in seconds and (F, N, D) fp16 tokens. Raises StoreError otherwise."""
        expected = (len(times), self.info.num_tokens, self.info.width)
        if tuple(tokens.shape) != expected or tokens.dtype != torch.float16:
            raise StoreError(
                f"tokens of video {self.video_id!r} are {tokens.dtype} {list(tokens.shape)}, "
                f"the store takes float16 {list(expected)}"
            )
        self.waiting_times.extend(times)
        self.waiting_tokens.extend(frame.tobytes() for frame in tokens.numpy())
        while len(self.waiting_times) >= ROWS_PER_GROUP:
            self._write_group()

    def commit(self, damage: str = "") -> None:
        """Finish the file and give it its name; `damage` says why frames are missing at its end, and stays with it.

        Raises StoreError for a video without a frame.
        """
        if self.waiting_times:
            self._write_group()
        if self.frames == 0:
            raise StoreError(f"video {self.video_id!r} has no frame: nothing was stored")
        if damage:
            self.parquet.add_key_value_metadata({"damage": damage})
        self.parquet.close()
        self.temporary.replace(self.target)

    def _write_group(self) -> None:
        times, self.waiting_times = self.waiting_times[:ROWS_PER_GROUP], self.waiting_times[ROWS_PER_GROUP:]
        tokens, self.waiting_tokens = self.waiting_tokens[:ROWS_PER_GROUP], self.waiting_tokens[ROWS_PER_GROUP:]
        numbers = range(self.frames, self.frames + len(times))
        columns = [
            pa.array([self.video_id] * len(times), pa.string()),
            pa.array(numbers, pa.int32()),
            pa.array(times, pa.float64()),
            pa.array(tokens, self.frame_type),
        ]
        self.parquet.write_table(pa.table(columns, schema=self.parquet.schema), row_group_size=ROWS_PER_GROUP)
        self.frames += len(times)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def discard(self) -> None:
        """Forget what was not committed."""
        self.parquet.close()
        self.temporary.unlink(missing_ok=True)

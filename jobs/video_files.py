"""Which videos there are: in files, folders, patterns, lists and dialogues, on this machine or behind URLs."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from actors.config import ConfigError
from actors.remote import RemoteError, is_remote
from jobs.annotations import VIDEO_SUFFIXES, video_id, without_query
from jobs.dataset_files import FEATURES_SUFFIX
from jobs.dialogue_files import PARQUET, has_dialogues, read_videos
from jobs.dialogues import SPLITS
from jobs.remote_files import list_files

SUFFIXES = (*VIDEO_SUFFIXES, FEATURES_SUFFIX)


def find_videos(sources: Sequence[str], dialogues: str | Path) -> dict[str, str]:
    """Absolute paths and URLs by video id, in order of id; without `sources`, those of the folder of `dialogues`.

    Raises ConfigError for two videos of one id, or none at all; DialogueFileError.
    """
    named = [pair for source in sources for pair in _videos_of(source)]
    if not sources:
        splits = [Path(dialogues) / split for split in SPLITS]
        # Somebody who writes dialogues by hand need not have some to validate on.
        there = [split for split in splits if has_dialogues(split)]
        sources = [str(split) for split in there or splits]
        named = [pair for source in sources for pair in _of_dialogues(Path(source))]
    videos: dict[str, str] = {}
    for name, path in named:
        if videos.setdefault(name, path) != path:
            raise ConfigError(f"two videos have the id {name!r}: {videos[name]} and {path}; rename one of them")
    if not videos:
        raise ConfigError(f"there is no video in {', '.join(sources)}: set store.videos, or run jobs.build_dialogues")
    return dict(sorted(videos.items()))


def _videos_of(source: str) -> Iterator[tuple[str, str]]:
    if is_remote(source):
        yield from _behind_url(source)
        return
    path = Path(source)
    if path.suffix in (".jsonl", PARQUET) or (path.is_dir() and any(path.glob(f"*{PARQUET}"))):
        yield from _of_dialogues(path)
    elif path.is_dir():
        yield from _with_ids(path.rglob("*"))
    elif path.suffix == ".txt" and path.is_file():
        for line in filter(None, map(str.strip, path.read_text().splitlines())):
            yield from _behind_url(line) if is_remote(line) else _with_ids([path.parent / line], all_of_them=True)
    elif glob.has_magic(source) and not path.exists():
        yield from _with_ids(map(Path, glob.iglob(source, recursive=True)))
    else:
        yield from _with_ids([path], all_of_them=True)


def _with_ids(paths: Iterator[Path] | list[Path], all_of_them: bool = False) -> Iterator[tuple[str, str]]:
    """Those that are videos by their names; a file that was named itself is taken for one."""
    for path in sorted(paths):
        if all_of_them or path.suffix.lower() in SUFFIXES:
            yield video_id(path), str(path.absolute())


def _behind_url(url: str) -> Iterator[tuple[str, str]]:
    file = without_query(url)
    if Path(file).suffix.lower() in SUFFIXES and not glob.has_magic(file):
        yield video_id(url), url  # whether it is there is seen when it is read, as for a file
        return
    try:
        found = [file for file in list_files(url) if Path(file).suffix.lower() in SUFFIXES]
    except RemoteError as error:
        raise ConfigError(f"store.videos: {error}") from None
    yield from ((video_id(file), file) for file in found)


def _of_dialogues(path: Path) -> Iterator[tuple[str, str]]:
    for name, video in sorted(read_videos(path).items()):
        yield name, video if is_remote(video) else str(Path(video).absolute())

"""Encode videos into frame tokens, once, for training to read.

Videos are those of the dialogues in `data.folder` unless `store.videos` names others. Each is decoded
at `data.fps` and encoded by the class that encodes live frames when serving; the folder `store.folder`
gets one file a video (see jobs/frame_store.py). Videos that are already in it are not encoded again, so
a run that was stopped goes on where it was. `encoding.json` and `encoding.png` in that folder tell how
the last run went. The next step is jobs.train.

Features that the public reference has made of videos (.pt) are taken over as they are, if the name of
their folder says that `model.vision` made them. A video that cannot be read is reported and the others
go on; the exit code is then 1. Of one that is damaged further on, the frames before the damage's end are
kept, and the store says so.
"""

from __future__ import annotations

import filecmp
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from actors.config import Config, ModelConfig
from actors.encoder import EncoderConfig
from actors.remote import RemoteError, is_remote
from actors.video import VideoError
from actors.vision import VisionError, vision_fingerprint, vision_width
from actors.weights import WeightsError
from jobs.cluster import connect
from jobs.dataset_files import FEATURES_SUFFIX
from jobs.dialogue_files import DialogueFileError
from jobs.dialogues import DataConfig
from jobs.encoding_summary import Summary
from jobs.feature_import import take_over
from jobs.frame_chunks import Row, StoreConfig, encoded_chunks
from jobs.frame_store import FrameStore, StoreError, StoreInfo, VideoWriter
from jobs.program import run
from jobs.remote_files import local_copy
from jobs.video_files import find_videos

__all__ = ["EncodingError", "StoreConfig", "encode"]

logger = logging.getLogger(__name__)

SAY_EVERY_S = 30  # where there is no progress bar


class EncodingError(RuntimeError):
    """Some videos could not be encoded; the message names them with the reason."""


def encode(config: Config) -> Summary:
    """Bring the store of `config` up to date. Raises EncodingError after the last video if any failed.

    With `store.strict` the first that fails is the last. Raises ConfigError, StoreError, VisionError and
    their like before anything is encoded.
    """
    model, data = config.model, config.section("data", DataConfig)
    settings, encoder = config.section("store", StoreConfig), config.section("encoder", EncoderConfig)
    videos = find_videos(settings.videos, data.folder)
    info = StoreInfo(
        fingerprint=vision_fingerprint(model),
        vision=model.vision,
        fps=data.fps,
        num_tokens=model.frames.num_tokens,
        width=vision_width(model.vision),
    )
    store = FrameStore.create(settings.folder, info)
    with store.locked():
        todo = {name: path for name, path in videos.items() if name not in store}
        for name in sorted(videos.keys() - todo.keys()):
            refuse_another(store, name, videos[name])
        summary = Summary(present=len(videos) - len(todo))
        made = {name: path for name, path in todo.items() if Path(path).suffix == FEATURES_SUFFIX}
        try:
            _take_over(made, store, model, settings, summary)
            if todo := {name: path for name, path in todo.items() if name not in made}:
                connect()
                summary.started = time.monotonic()
                _store(encoded_chunks(todo, model, encoder, settings, data.fps), store, todo, settings.strict, summary)
        finally:
            summary.save(store.path)
    logger.info("store=%s %s", store.path, summary)
    if summary.failed:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in sorted(summary.failed.items()))
        raise EncodingError(f"{len(summary.failed)} of {len(videos)} videos could not be encoded ({summary}):{reasons}")
    return summary


def refuse_another(store: FrameStore, name: str, path: str) -> None:
    """Raises StoreError where the store has frames of another video under the id `name` than that at `path`.

    A video that was moved or copied is the same one. What is behind a URL, or gone from where it was, is taken for it.
    """
    before = store.source(name)
    if before in ("", path) or is_remote(before) or is_remote(path) or not Path(before).is_file():
        return
    if not Path(path).is_file() or Path(path).samefile(before):
        return
    if not filecmp.cmp(before, path, shallow=False):
        raise StoreError(
            f"the store {store.path} has frames of another video under the id {name!r}: they are of {before}, "
            f"not of {path}: rename one of the two, or set another store.folder (and data.folder)"
        )


def _take_over(
    features: dict[str, str], store: FrameStore, model: ModelConfig, settings: StoreConfig, summary: Summary
) -> None:
    for name, path in tqdm(features.items(), unit="video", disable=None, file=sys.stderr):
        try:
            with local_copy(path, settings.cache) as file:
                frames = take_over(file, store, model, name, path)
        except (VideoError, StoreError, RemoteError) as error:
            _failed(name, str(error), settings.strict, summary)
        else:
            summary.add_frames(frames)
            summary.add_video(name, frames)


def _store(chunks: Iterator[Row], store: FrameStore, videos: dict[str, str], strict: bool, summary: Summary) -> None:
    """Write chunks as they come, put a video's into order, and give a file its name when it is complete."""
    open_videos: dict[str, OpenVideo] = {}
    said = time.monotonic()
    with tqdm(total=len(videos), unit="video", disable=None, file=sys.stderr) as progress:
        try:
            for row in chunks:
                name = str(row["video_id"])
                if name not in open_videos:
                    open_videos[name] = OpenVideo(store.writer(name, source=videos[name]))
                summary.add_frames(int(row["count"]))
                if open_videos[name].add(row):
                    _finish(name, open_videos.pop(name), strict, summary)
                    progress.update()
                progress.set_postfix(frames=summary.frames, frames_per_s=f"{summary.frames_per_s:.1f}")
                if progress.disable and time.monotonic() - said > SAY_EVERY_S:
                    said = time.monotonic()
                    logger.info("progress: %s of %d videos to encode", summary, len(videos))
            for name in sorted(videos.keys() - summary.videos.keys() - summary.failed.keys()):
                _failed(name, f"{videos[name]}: some of its frames never came", strict, summary)
        finally:
            for video in open_videos.values():
                video.writer.discard()


def _finish(name: str, video: OpenVideo, strict: bool, summary: Summary) -> None:
    try:
        if video.error:
            raise StoreError(video.error)
        video.writer.commit(damage=video.damage)
    except StoreError as error:
        video.writer.discard()
        _failed(name, str(error), strict, summary)
    else:
        summary.add_video(name, video.writer.frames)
        if video.damage:
            summary.damaged[name] = video.damage
            logger.warning("video=%s %s", name, video.damage)
        logger.info("video=%s frames=%d", name, video.writer.frames)


def _failed(name: str, reason: str, strict: bool, summary: Summary) -> None:
    summary.failed[name] = reason
    if strict:
        raise EncodingError(f"video {name} cannot be encoded, which store.strict makes the end ({summary}): {reason}")
    logger.error("video=%s failed: %s", name, reason)


class OpenVideo:
    """A video whose chunks are arriving; chunks that came too early wait."""

    def __init__(self, writer: VideoWriter) -> None:
        self.writer = writer
        self.early: dict[int, Row] = {}
        self.next = 0
        self.error = ""
        self.damage = ""

    def add(self, row: Row) -> bool:
        """Take a chunk; True if it made the video complete."""
        self.early[int(row["first"])] = row
        while self.next in self.early:
            row = self.early.pop(self.next)
            count = int(row["count"])
            self.writer.append(row["times"][:count].tolist(), torch.from_numpy(row["tokens"][:count].copy()))
            self.next += count
            if row["last"]:
                self.error, self.damage = str(row["error"]), str(row["damage"])
                return True
        return False


if __name__ == "__main__":
    sys.exit(
        run(
            encode,
            module="jobs.encode_frames",
            about=__doc__,
            sections={"model": ModelConfig, "data": DataConfig, "store": StoreConfig, "encoder": EncoderConfig},
            user_errors=(EncodingError, StoreError, VisionError, WeightsError, DialogueFileError),
            flags={"--strict": "store.strict=true"},
        )
    )

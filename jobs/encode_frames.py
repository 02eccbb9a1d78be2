"""Encode videos into frame tokens, once, for training to read.

Videos are those of the dialogues in `data.folder` unless `store.videos` names others. Each is decoded
at `data.fps` and encoded by the class that encodes live frames when serving; the folder `store.folder`
gets one file a video (see jobs/dataset.py). Videos that are already in it are not encoded again, so a
run that was stopped goes on where it was. The next step is jobs.train.

Features that the public reference has made of videos (.pt) are taken over as they are, if the name of
their folder says that `model.vision` made them. A video that cannot be read is reported and the others
go on; the exit code is then 1.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import ray.data
import torch
from pydantic import Field
from tqdm import tqdm

from actors.config import Config, ModelConfig, Section
from actors.encoder import EncoderConfig, FrameEncoder
from actors.video import VideoError, read_frames
from actors.vision import VisionError, vision_fingerprint, vision_width
from actors.weights import WeightsError
from jobs.cluster import connect
from jobs.dataset_files import FEATURES_SUFFIX
from jobs.dialogue_files import DialogueFileError
from jobs.dialogues import DataConfig
from jobs.feature_import import take_over
from jobs.frame_store import FrameStore, StoreError, StoreInfo, VideoWriter
from jobs.program import run
from jobs.video_files import find_videos

logger = logging.getLogger(__name__)


class StoreConfig(Section):
    """The frame-token store: where it is, and how it is made from videos."""

    folder: str = Field(default="runs/tokens", description="the store")
    videos: tuple[str, ...] = Field(
        default=(),
        description="video files, folders and patterns of them, URLs of such (s3, gs, http), dialogues, and lists with "
        "a path or URL a line (.txt); default: the videos of the dialogues in data.folder",
    )
    batch_size: int = Field(default=16, ge=1, description="frames of one video encoded at once")
    encoders: int = Field(default=1, ge=1, description="processes that encode")
    encoder_cpus: float = Field(default=1, ge=0, description="CPUs reserved for each of them")
    encoder_gpus: float = Field(default=0, ge=0, description="GPUs for each of them; set encoder.device to cuda, too")
    decoder_cpus: float = Field(default=0.5, gt=0, description="CPUs reserved for each video that is being decoded")


class EncodingError(RuntimeError):
    """Some videos could not be encoded; the message names them with the reason."""


@dataclass
class Summary:
    """What a run did. `failed` maps video ids to what was wrong."""

    encoded: int = 0
    present: int = 0
    frames: int = 0
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rate = self.frames / self.seconds if self.seconds else 0.0
        return (
            f"videos={self.encoded} already_there={self.present} failed={len(self.failed)} "
            f"frames={self.frames} frames_per_s={rate:.1f}"
        )


def encode(config: Config) -> Summary:
    """Bring the store of `config` up to date. Raises EncodingError after the last video if any failed.

    Raises ConfigError, StoreError, VisionError and their like before anything is encoded.
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
        summary = Summary(present=len(videos) - len(todo))
        start = time.monotonic()
        made = {name: path for name, path in todo.items() if Path(path).suffix == FEATURES_SUFFIX}
        _take_over(made, store, model, summary)
        if todo := {name: path for name, path in todo.items() if name not in made}:
            connect()
            start = time.monotonic()
            _store(_chunks(todo, model, encoder, settings, data.fps), store, todo, summary)
        summary.seconds = time.monotonic() - start
    logger.info("store=%s %s", store.path, summary)
    if summary.failed:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in sorted(summary.failed.items()))
        raise EncodingError(f"{len(summary.failed)} of {len(videos)} videos could not be encoded ({summary}):{reasons}")
    return summary


# A row of the pipeline is a chunk: `batch_size` frames of one video, or fewer at its end. `count` says how
# many, `first` the index of the first; the last chunk has `last`, and `error` where the video ended badly.
Row = dict[str, np.ndarray]


def _chunks(
    videos: dict[str, str], model: ModelConfig, encoder: EncoderConfig, settings: StoreConfig, fps: float
) -> Iterator[Row]:
    """Encoded chunks of all videos, those of one video in nearly their order."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # one of our own counts videos and frames
    context.target_max_block_size = 1 << 20  # every chunk goes on to the encoder as soon as it is decoded
    rows = [{"video_id": name, "path": path} for name, path in videos.items()]
    chunks = (
        ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000))
        .map_batches(
            partial(_decode, fps=fps, resolution_px=model.frames.resolution_px, size=settings.batch_size),
            batch_size=1,
            num_cpus=settings.decoder_cpus,
        )
        .map_batches(
            ChunkEncoder,
            fn_constructor_args=(model, encoder),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=settings.encoders),
            num_cpus=settings.encoder_cpus,
            num_gpus=settings.encoder_gpus or None,
        )
    )
    for batch in chunks.iter_batches(batch_size=1, prefetch_batches=2):
        yield {name: column[0] for name, column in batch.items()}


def _decode(batch: Row, fps: float, resolution_px: int, size: int) -> Iterator[Row]:
    """The chunks of one video; the last one says so, and what was wrong."""
    name, path = str(batch["video_id"][0]), str(batch["path"][0])
    count, error = 0, ""
    waiting: Row | None = None  # a chunk is known to be the last one only when no other follows
    try:
        ticks = read_frames(path, fps, resolution_px)
        while frames := list(islice(ticks, size)):
            if waiting is not None:
                yield waiting
            waiting = _chunk(name, count, [frame.time for frame in frames], [frame.image for frame in frames], size)
            count += len(frames)
    except (VideoError, OSError) as problem:
        error = str(problem)
    if waiting is None:  # a row must have a shape, even one without a frame
        waiting = _chunk(name, 0, [], [np.zeros((resolution_px, resolution_px, 3), np.uint8)], size)
    yield waiting | {"last": np.array([True]), "error": np.array([error])}


def _chunk(name: str, first: int, times: list[float], images: Sequence[np.ndarray], size: int) -> Row:
    """One row, frames and times filled up to `size` so that all rows have one shape."""
    frames = np.zeros((1, size, *images[0].shape), np.uint8)
    frames[0, : len(images)] = images
    return {
        "video_id": np.array([name]),
        "first": np.array([first]),
        "count": np.array([len(times)]),
        "last": np.array([False]),
        "error": np.array([""]),
        "times": np.array([times + [0.0] * (size - len(times))]),
        "frames": frames,
    }


class ChunkEncoder:
    """The encoder that Serve hosts, as an actor of Ray Data."""

    def __init__(self, model: ModelConfig, settings: EncoderConfig) -> None:
        self.encoder = FrameEncoder(model, settings.device, settings.threads)

    def __call__(self, batch: Row) -> Row:
        """Put tokens (1, B, N, D) fp16 in place of frames; those beyond `count` are zeros."""
        frames = batch.pop("frames")[0]
        count = int(batch["count"][0])
        tokens = torch.zeros(len(frames), self.encoder.num_tokens, self.encoder.width, dtype=torch.float16)
        if count:
            tokens[:count] = self.encoder(frames[:count])
        return batch | {"tokens": tokens.numpy()[None]}


def _take_over(features: dict[str, str], store: FrameStore, model: ModelConfig, summary: Summary) -> None:
    for name, path in tqdm(features.items(), unit="video", disable=None, file=sys.stderr):
        try:
            summary.frames += take_over(Path(path), store, model, name)
        except (VideoError, StoreError) as error:
            summary.failed[name] = str(error)
            logger.error("video=%s failed: %s", name, error)
        else:
            summary.encoded += 1


def _store(chunks: Iterator[Row], store: FrameStore, videos: dict[str, str], summary: Summary) -> None:
    """Write chunks as they come, put a video's into order, and give a file its name when it is complete."""
    open_videos: dict[str, _OpenVideo] = {}
    with tqdm(total=len(videos), unit="video", disable=None, file=sys.stderr) as progress:
        try:
            for row in chunks:
                name = str(row["video_id"])
                if name not in open_videos:
                    open_videos[name] = _OpenVideo(store.writer(name, source=videos[name]))
                video = open_videos[name]
                summary.frames += int(row["count"])
                if video.add(row):
                    _finish(name, open_videos.pop(name), summary)
                    progress.update()
                progress.set_postfix(frames=summary.frames)
        finally:
            for video in open_videos.values():
                video.writer.discard()


def _finish(name: str, video: _OpenVideo, summary: Summary) -> None:
    try:
        if video.error:
            raise StoreError(video.error)
        video.writer.commit()
    except StoreError as error:
        video.writer.discard()
        summary.failed[name] = str(error)
        logger.error("video=%s failed: %s", name, error)
    else:
        summary.encoded += 1
        logger.info("video=%s frames=%d", name, video.writer.frames)


class _OpenVideo:
    """A video whose chunks are arriving; chunks that came too early wait."""

    def __init__(self, writer: VideoWriter) -> None:
        self.writer = writer
        self.early: dict[int, Row] = {}
        self.next = 0
        self.error = ""

    def add(self, row: Row) -> bool:
        """Take a chunk; True if it made the video complete."""
        self.early[int(row["first"])] = row
        while self.next in self.early:
            row = self.early.pop(self.next)
            count = int(row["count"])
            self.writer.append(row["times"][:count].tolist(), torch.from_numpy(row["tokens"][:count].copy()))
            self.next += count
            if row["last"]:
                self.error = str(row["error"])
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
        )
    )

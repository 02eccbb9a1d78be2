"""Videos decoded and encoded by Ray Data: tasks that decode, a pool of actors that encode.

What flows between them is a chunk: frames of one video, as many as are encoded at once, or fewer at its
end. Batches never mix videos and always have one size, so that results do not depend on what else is
encoded. Each chunk goes on as soon as it is decoded, which hides decoding behind encoding and bounds
memory for a video of any length.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import numpy as np
import ray.data
import torch
from pydantic import Field

from actors.config import Fit, ModelConfig, Section
from actors.encoder import EncoderConfig, FrameEncoder
from actors.video import VideoError, probe, read_frames
from jobs.extents import frames_in
from jobs.remote_files import local_copy

logger = logging.getLogger(__name__)

# One row; `count` frames are in it, `first` is the index of the first. The last chunk of a video has `last`, `error`
# where nothing of the video is of use, and `damage` where it ended before its time.
Row = dict[str, np.ndarray]

CHUNKS_AHEAD = 24  # of each encoder: decoded, encoded, or on their way
LEAST_AHEAD_BYTES = 128 << 20


class StoreConfig(Section):
    """The frame-token store: where it is, and how it is made from videos."""

    folder: str = Field(default="runs/tokens", description="the store")
    videos: tuple[str, ...] = Field(
        default=(),
        description="video files, folders and patterns of them, URLs of such (s3, gs, http), dialogues, and lists with "
        "a path or URL a line (.txt); default: the videos of the dialogues in data.folder",
    )
    strict: bool = Field(default=False, description="end at the first video that cannot be encoded")
    cache: str | None = Field(
        default=None,
        description="where the copy of a remote video lies while it is decoded; default: the system's temporary folder",
    )
    batch_size: int = Field(default=16, ge=1, description="frames of one video encoded at once")
    encoders: int | None = Field(
        default=None, ge=1, description="processes that encode; default: one for each GPU they may use, else each CPU"
    )
    encoder_cpus: float = Field(default=0.75, ge=0, description="CPUs reserved for each of them")
    encoder_gpus: float = Field(default=0, ge=0, description="GPUs for each of them; set encoder.device to cuda, too")
    decoder_cpus: float = Field(default=0.25, gt=0, description="CPUs reserved for each video that is being decoded")


def encoded_chunks(
    videos: Mapping[str, str], model: ModelConfig, encoder: EncoderConfig, settings: StoreConfig, fps: float
) -> Iterator[Row]:
    """Encoded chunks of all videos (paths or URLs by id), those of one video in nearly their order."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # one of our own counts videos and frames
    context.target_max_block_size = 1 << 20  # every chunk goes on to the encoder as soon as it is decoded
    rows = [{"video_id": name, "path": path} for name, path in videos.items()]
    decode = partial(
        decoded_chunks,
        fps=fps,
        resolution_px=model.frames.resolution_px,
        fit=model.frames.fit,
        size=settings.batch_size,
        cache=settings.cache,
    )
    chunks = (
        ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000))
        .map_batches(decode, batch_size=1, num_cpus=settings.decoder_cpus)
        .map_batches(
            ChunkEncoder,
            fn_constructor_args=(model, encoder),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=num_encoders(settings)),
            num_cpus=settings.encoder_cpus,
            num_gpus=settings.encoder_gpus or None,
        )
    )
    pixels = model.frames.resolution_px**2 * 3 * settings.batch_size
    # Without a limit Ray fills its object store with what the encoders have not come to yet.
    ahead = max(LEAST_AHEAD_BYTES, CHUNKS_AHEAD * num_encoders(settings) * pixels)
    options = chunks.context.execution_options
    options.resource_limits = options.resource_limits.copy(object_store_memory=ahead)
    for batch in chunks.iter_batches(batch_size=1, prefetch_batches=2):
        yield {name: column[0] for name, column in batch.items()}


def num_encoders(settings: StoreConfig) -> int:
    """As many as are asked for, or as can be kept busy."""
    if settings.encoders is not None:
        return settings.encoders
    resources = ray.cluster_resources()
    if settings.encoder_gpus:
        return max(1, int(resources.get("GPU", 0) / settings.encoder_gpus))
    return max(1, int(resources.get("CPU", 1)))


def decoded_chunks(
    batch: Row, fps: float, resolution_px: int, fit: Fit, size: int, cache: str | None = None
) -> Iterator[Row]:
    """The chunks of one video; the last one says so, and what was wrong."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # which decoder took over is worth knowing
    name, path = str(batch["video_id"][0]), str(batch["path"][0])
    count, error, damage = 0, "", ""
    waiting: Row | None = None  # a chunk is known to be the last one only when no other follows
    try:
        with local_copy(path, cache) as file:
            ticks = read_frames(file, fps, resolution_px, fit)
            while frames := list(islice(ticks, size)):
                if waiting is not None:
                    yield waiting
                waiting = _chunk(name, count, [frame.time for frame in frames], [frame.image for frame in frames], size)
                count += len(frames)
            if count < (promised := frames_in(probe(file), fps)):
                damage = f"{path}: damaged, {count} of its {promised} frames can be decoded"
    except (VideoError, OSError) as problem:
        error = str(problem)
    except Exception as problem:  # what a strange file makes a decoder raise costs this video, not all others
        logger.exception("video=%s", path)
        error = f"{path}: {type(problem).__name__}: {problem}"
    if waiting is None:  # a row must have a shape, even one without a frame
        waiting = _chunk(name, 0, [], [np.zeros((resolution_px, resolution_px, 3), np.uint8)], size)
    yield waiting | {"last": np.array([True]), "error": np.array([error]), "damage": np.array([damage])}


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
        "damage": np.array([""]),
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

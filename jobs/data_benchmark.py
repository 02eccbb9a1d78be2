"""How fast videos become frame tokens, against what decoding and encoding alone would allow.

The stages are measured alone on one core, in CPU seconds a frame; the bound is the cores that the machine
had to give during the run, divided by that. What others use of the machine is subtracted, and the pipeline
is looked at in the middle of its run, so that starting up and running dry do not count.
"""

from __future__ import annotations

import logging
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import numpy as np

from actors.config import Config
from actors.encoder import EncoderConfig, FrameEncoder
from actors.runtime import limit_threads
from actors.video import read_frames
from jobs.cluster import connect
from jobs.data_report import DataReport, Memory, Pipeline, Reads, Stages
from jobs.dialogues import DataConfig
from jobs.encode_frames import encode
from jobs.encoding_summary import Summary
from jobs.frame_chunks import StoreConfig
from jobs.frame_store import FrameStore
from jobs.process_usage import UsageSampler
from jobs.video_files import find_videos

logger = logging.getLogger(__name__)

STEADY = (0.25, 0.85)  # the part of the frames in the middle of which is looked at
SAMPLED_S = 0.25  # between two looks at the CPU time
SHORTEST_S = 1  # of that part


@dataclass(frozen=True)
class DataAmount:
    """How much is measured."""

    frames: int = 3000  # through the pipeline, at least
    stage_frames: int = 256
    minutes: tuple[float, ...] = (2, 8, 32)  # of the videos that memory is watched with
    reads: int = 300
    read_frames: tuple[int, ...] = (1, 64, 1200)


DATA_QUICK = DataAmount(frames=2560, stage_frames=32, minutes=(0.2, 0.5), reads=20, read_frames=(1, 16))


class DataBenchmark:
    """Runs jobs.encode_frames on copies of real videos, and measures around it."""

    def __init__(self, config: Config, videos: Sequence[str], amount: DataAmount) -> None:
        self.config = config
        self.amount = amount
        self.fps = config.section("data", DataConfig).fps
        self.settings = config.section("store", StoreConfig)
        self.videos = list(find_videos(videos, "").values())

    def run(self) -> DataReport:
        """Everything, in about the time that a few thousand frames take."""
        limit_threads(1)
        with tempfile.TemporaryDirectory(prefix="videollm-benchmark-") as temporary:
            folder = Path(temporary)
            before = self.stages()
            pipeline, store = self.pipeline(folder)
            after = self.stages()
            memory = self.memory(folder / "long")
            return DataReport.of(
                self.config,
                stages=Stages.mean(before, after),
                pipeline=pipeline,
                memory=memory,
                megabytes_an_hour=self._megabytes_an_hour(store),
                reads=self.reads(store),
            )

    def stages(self) -> Stages:
        """CPU seconds a frame of decoding and of encoding, each alone on one thread."""
        pixels, fit = self.config.model.frames.resolution_px, self.config.model.frames.fit
        settings = self.config.section("encoder", EncoderConfig)
        encoder = FrameEncoder(self.config.model, settings.device, threads=1)
        size = self.settings.batch_size
        encoder(np.zeros((size, pixels, pixels, 3), np.uint8))  # the first call is slow
        decode_s = encode_s = 0.0
        decoded = 0
        for video in self.videos:
            start = time.process_time()
            ticks = read_frames(video, self.fps, pixels, fit)
            frames = [frame.image for frame in islice(ticks, self.amount.stage_frames)]
            decode_s += time.process_time() - start
            decoded += len(frames)
            start = time.process_time()
            for first in range(0, len(frames), size):
                encoder(np.stack(frames[first : first + size]))
            encode_s += time.process_time() - start
        logger.info(
            "decode_ms=%.2f encode_ms=%.2f frames=%d", 1e3 * decode_s / decoded, 1e3 * encode_s / decoded, decoded
        )
        return Stages(decode_s / decoded, encode_s / decoded)

    def pipeline(self, folder: Path) -> tuple[Pipeline, FrameStore]:
        """Frames a second, and what they cost, in the middle of a run over copies of the videos; and their store."""
        connect()
        frames = self.amount.frames
        while True:
            copies, tokens = folder / f"{frames}_copies", folder / f"{frames}_tokens"
            summary, sampler = self._encoded(copies, tokens, frames)
            start, first = _reached(summary, STEADY[0])
            end, last = _reached(summary, STEADY[1])
            if end - start >= SHORTEST_S:
                break
            logger.info(
                "frames=%d went by in %.1f s, too soon to be measured: once more with 4 times as many",
                last - first,
                end - start,
            )
            frames *= 4
        usage = sampler.between(summary.started + start, summary.started + end)
        found = Pipeline(
            frames=last - first,
            wall_s=usage.wall_s,
            cpu_s=usage.ours_s,
            driver_s=usage.driver_s,
            cores=os.cpu_count() or 1,
            free_cores=usage.free_cores,
        )
        logger.info("%s", found)
        return found, FrameStore.open(tokens)

    def _encoded(self, copies: Path, tokens: Path, frames: int) -> tuple[Summary, UsageSampler]:
        """What encoding copies of the videos, of at least that many frames together, did and used."""
        counts = [sum(1 for _ in read_frames(video, self.fps, 16, "pad")) for video in self.videos]
        copies.mkdir()
        for number in range(max(1, -(-frames // sum(counts)))):
            for video in map(Path, self.videos):
                (copies / f"{video.stem}_{number}{video.suffix}").symlink_to(video)
        with UsageSampler(every_s=SAMPLED_S) as sampler:
            return encode(self._config(copies, tokens)), sampler

    def memory(self, folder: Path) -> list[Memory]:
        """The peak of all processes together, for longer and longer videos; nothing is ended in between."""
        found = []
        for minutes in self.amount.minutes:
            (folder / f"{minutes:g}").mkdir(parents=True)
            write_video(folder / f"{minutes:g}" / "long.mp4", minutes)
            with UsageSampler(every_s=2, memory=True) as sampler:
                summary = encode(self._config(folder / f"{minutes:g}", folder / f"{minutes:g}" / "tokens"))
            found.append(Memory(minutes, summary.frames, sampler.peak_mb))
            logger.info("minutes=%g frames=%d peak_mb=%.0f", minutes, summary.frames, sampler.peak_mb)
        return found

    def reads(self, store: FrameStore) -> list[Reads]:
        """Random ranges a second, of several lengths, by one process that has the files open."""
        found = []
        ids = store.video_ids()
        for length in self.amount.read_frames:
            draw = random.Random(0)
            start = time.process_time()
            shown = 0
            for _ in range(self.amount.reads):
                video = draw.choice(ids)
                count = min(length, store.num_frames(video))
                first = draw.randint(0, store.num_frames(video) - count)
                shown += len(store.frames(video, first, first + count))
            seconds = time.process_time() - start
            found.append(Reads(length, shown / self.amount.reads, self.amount.reads / seconds, shown / seconds))
        return found

    def _megabytes_an_hour(self, store: FrameStore) -> float:
        size = sum(store.file(name).stat().st_size for name in store.video_ids())
        frames = sum(store.num_frames(name) for name in store.video_ids())
        return size / frames * self.fps * 3600 / 1e6

    def _config(self, videos: Path, store: Path) -> Config:
        sections = dict(self.config.sections)
        sections["store"] = sections.get("store", {}) | {"videos": [str(videos)], "folder": str(store)}
        return Config(sections, self.config.source)


def write_video(path: Path, minutes: float, rate: int = 4, width: int = 160, height: int = 96) -> None:
    """A video whose picture changes slowly: quick to write, and to decode."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = width, height
        for image in islice(_pictures(width, height), round(60 * minutes * rate)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _pictures(width: int, height: int) -> Iterator[np.ndarray]:
    rows, columns = np.mgrid[0:height, 0:width]
    for number in range(1 << 30):
        yield np.stack([rows + number, columns + 2 * number, rows + columns], axis=2).astype(np.uint8)


def _reached(summary: Summary, share: float) -> tuple[float, int]:
    """When that share of the frames was stored: seconds since the start, frames by then."""
    return next(point for point in summary.progress if point[1] >= share * summary.frames)

"""Frames to frame tokens: the encoder, and the worker that feeds it from the bus.

`FrameEncoder` holds all vision preprocessing and is the class that Ray Data maps over and that Serve
hosts, so that training and serving cannot differ. `EncoderWorker` is the live consumer: it reads
admitted frames of all sessions, batches them, and publishes their tokens into the sessions' input.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass

import numpy as np
import torch
from prometheus_client.core import Metric
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from actors.bus import Bus, BusError, PendingFrame
from actors.config import Config, ModelConfig, Section
from actors.image import MAX_PIXELS, decode_image
from actors.messages import FrameSkipped, FrameTokens
from actors.meters import EncoderMeters, counter
from actors.replicas import Reporter
from actors.runtime import limit_threads, native_dtype
from actors.tasks import end_all
from actors.video import fit_square
from actors.vision import VisionError, load_tower, vision_fingerprint

log = logging.getLogger(__name__)

BLOCK_MS = 500  # how long a read waits for a first frame, and so how long an idle worker takes to stop
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
PUBLISH_TRIES = 5
BROKEN_AFTER = 8
LONGEST_HOLD_S = 30.0  # an encoder that hangs over a frame shall not keep it for ever
TIMELINE = 4096


class EncoderConfig(Section):
    """How an encoder replica works."""

    batch_size: int = Field(default=8, gt=0, description="frames encoded at once, of any sessions")
    max_wait_ms: int = Field(default=20, ge=0, description="how long a frame waits for others to fill its batch")
    threads: int = Field(default=1, gt=0, description="CPU threads of the encoder; one unless it has cores of its own")
    device: str = Field(default="cpu", description="torch device, such as cpu or cuda")
    max_image_pixels: int = Field(default=MAX_PIXELS, gt=0, description="largest picture that is decoded")


class FrameEncoder:
    """A vision tower, the preprocessing before it and the pooling after it.

    N is `num_tokens`, D is `width`; `fingerprint` names encoder, weights, resolution and tokens.
    It computes in fp32, or in bf16 where the settings ask for it and the hardware multiplies it.
    """

    def __init__(self, config: ModelConfig, device: str = "cpu", threads: int | None = None) -> None:
        if threads is not None:
            limit_threads(threads)
        self.frames = config.frames
        self.fingerprint = vision_fingerprint(config)
        self.device = torch.device(device)
        self.dtype = native_dtype(getattr(torch, config.dtype), self.device)
        tower = load_tower(config.vision)
        side = tower.grid_side(self.frames.resolution_px)
        if self.frames.pooled and max(self.frames.pooled) > side:
            raise VisionError(
                f"frames.pooled is {list(self.frames.pooled)}, but at {self.frames.resolution_px} pixels "
                f"{tower.family} has a grid of {side}x{side}: pool to at most that"
            )
        self.num_tokens = self.frames.num_tokens
        self.width = tower.width
        self.mean, self.std = (
            torch.tensor(constants, device=self.device).view(1, 3, 1, 1) for constants in (tower.mean, tower.std)
        )
        self.tower = tower.requires_grad_(False).to(self.device, self.dtype)

    def __call__(self, frames: np.ndarray) -> Tensor:
        """Square RGB frames uint8 (B, H, H, 3) to fp16 tokens (B, N, D) on the CPU. See `encode`."""
        limit = torch.finfo(torch.float16).max
        return self.encode(frames).clamp(-limit, limit).to(torch.float16).cpu()

    @torch.inference_mode()
    def encode(self, frames: np.ndarray) -> Tensor:
        """Square RGB frames uint8 (B, H, H, 3) to fp32 tokens (B, N, D) on the encoder's device.

        CLS first, then the grid pooled to `frames.pooled`, row by row. Frames of another size than
        the model's are scaled. Raises ValueError for anything but square uint8 RGB.
        """
        summary, grid = self.tower(self._normalised(frames))
        tokens = []
        if self.frames.cls:
            tokens.append(summary.float().unsqueeze(1))
        if self.frames.pooled:
            pooled = F.adaptive_avg_pool2d(grid.float().permute(0, 3, 1, 2), self.frames.pooled)
            tokens.append(pooled.flatten(2).transpose(1, 2))
        return torch.cat(tokens, dim=1)

    def _normalised(self, frames: np.ndarray) -> Tensor:
        """Pixels (B, 3, R, R) as the tower expects them."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or frames.shape[1] != frames.shape[2]:
            raise ValueError(
                f"frames are {frames.dtype} {list(frames.shape)}, expected square RGB pictures: uint8 [B, H, H, 3]"
            )
        pixels = torch.from_numpy(np.array(frames)).to(self.device).permute(0, 3, 1, 2).float()
        side = self.frames.resolution_px
        if pixels.shape[-1] != side:
            pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
        return ((pixels / 255 - self.mean) / self.std).to(self.dtype)


class EncoderError(RuntimeError):
    """The encoder fails whatever it is given: its replica must be replaced."""


@dataclass
class Counts:
    """What a worker has done since it started."""

    encoded: int = 0
    skipped: int = 0
    failed: int = 0
    batches: int = 0
    encode_s: float = 0.0


@dataclass(frozen=True)
class Picture:
    """A frame that was read, with its pixels (R, R, 3) or the reason why it has none."""

    pending: PendingFrame
    pixels: np.ndarray | None
    reason: str = ""


Answer = tuple[PendingFrame, FrameTokens | FrameSkipped]


class EncoderWorker:
    """Reads frames of all sessions, encodes them in batches, publishes their tokens; `run` until `stop`.

    While a batch is encoded, the next one is read and its pictures decoded, and the previous one is
    published. A frame is acknowledged together with its answer; until then the worker says again and again
    that it has it: if this worker dies, another gets it soon, if it is slow, nobody else does its work.
    """

    def __init__(self, bus: Bus, encoder: FrameEncoder, config: EncoderConfig, name: str) -> None:
        self.bus = bus
        self.encoder = encoder
        self.config = config
        self.name = name
        self.counts = Counts()
        self.meters = EncoderMeters(self._figures)
        # (first frame, last frame, frames, start, end): frames as session:seq, times in Unix seconds.
        self.timeline: deque[tuple[str, str, int, float, float]] = deque(maxlen=TIMELINE)
        self._stopping = asyncio.Event()
        self._failed_in_a_row = 0
        self._bus_errors_in_a_row = 0
        self._at_hand: dict[tuple[str, str], tuple[float, PendingFrame]] = {}  # taken when, and not answered yet
        self._frame_s = 0.0  # what a frame of the last batch took to encode

    async def run(self) -> None:
        """Serve the bus until `stop`, then answer what was read. Raises EncoderError if encoding is broken."""
        reporter = Reporter(self.bus, "encoder", self.name, self.encoder.fingerprint, self.stats, self.meters.registry)
        async with reporter.running():
            await self._run()

    async def _run(self) -> None:
        # A thread of its own: torch keeps the number of threads to use by computing thread.
        with ThreadPoolExecutor(1, "encoder", limit_threads, (self.config.threads,)) as thread:
            reading = asyncio.create_task(self._next_batch())
            publishing = asyncio.create_task(self._publish([]))
            holding = asyncio.create_task(self._hold_forever())
            try:
                while batch := await reading:
                    reading = asyncio.create_task(self._next_batch())
                    answers = await self._answers(batch, thread)
                    await publishing
                    publishing = asyncio.create_task(self._publish(answers))
                await publishing
            finally:
                await end_all((reading, publishing, holding))

    def _figures(self) -> list[Metric]:
        counts = self.counts
        return [
            counter("frames_encoded", "Frames whose tokens were published", counts.encoded),
            counter("frames_skipped", "Frames that gave no tokens: no picture, or no result", counts.skipped),
            counter("encode_failures", "Frames that a device failed on; they are tried again", counts.failed),
        ]

    def stop(self) -> None:
        """Let `run` answer the frames it has read and return."""
        self._stopping.set()

    def stats(self) -> dict[str, object]:
        """Counters since the start, mean batch size, frames per second of encoding, and the newest batches."""
        counts = self.counts
        return {
            **asdict(counts),
            "frames_per_batch": counts.encoded / counts.batches if counts.batches else 0.0,
            "frames_per_s": counts.encoded / counts.encode_s if counts.encode_s else 0.0,
            "timeline": list(self.timeline),
        }

    async def _next_batch(self) -> list[Picture]:
        """One to `batch_size` frames, their pictures decoded; none once the worker is to stop."""
        frames: list[PendingFrame] = []
        while not frames and not self._stopping.is_set():
            frames = await self._read(self._room(), BLOCK_MS)
        clock = asyncio.get_running_loop().time
        full_by = clock() + self.config.max_wait_ms / 1000
        while 0 < len(frames) < self._room() and (wait_ms := int(1000 * (full_by - clock()))) > 0:
            frames += await self._read(self._room() - len(frames), wait_ms)
        return await asyncio.to_thread(lambda: [self._picture(frame) for frame in frames])

    def _room(self) -> int:
        """Frames of a batch: no more than are answered well before the bus gives them to another worker."""
        # A frame waits for the batch before its own; half the time is left for a busy machine.
        in_time = self.bus.config.reclaim_idle_ms / 1000 / 2 / 2 / max(self._frame_s, 1e-6)
        return max(1, min(self.config.batch_size, int(in_time)))

    async def _read(self, count: int, wait_ms: int) -> list[PendingFrame]:
        """Up to `count` frames, live before recorded; none where the bus fails, after a pause."""
        try:
            frames = await self.bus.read_frames(self.name, count, wait_ms)
        except BusError as error:
            log.warning("consumer=%s cannot read frames: %s", self.name, error)
            await self._pause()
            return []
        self._bus_errors_in_a_row = 0
        now = time.monotonic()
        for pending in frames:
            self._at_hand.setdefault(_key(pending), (now, pending))  # what comes back to the same worker is no younger
        return frames

    async def _hold_forever(self) -> None:
        """Keep the bus from giving frames at hand to others."""
        while True:
            await asyncio.sleep(self.bus.config.reclaim_idle_ms / 4000)
            since = time.monotonic() - LONGEST_HOLD_S
            frames = [pending for taken, pending in self._at_hand.values() if taken > since]
            try:
                await self.bus.hold(self.name, frames)
            except BusError as error:
                log.warning("consumer=%s frames=%d not held: %s", self.name, len(frames), error)

    def _picture(self, pending: PendingFrame) -> Picture:
        try:
            pixels = decode_image(pending.frame.image, self.config.max_image_pixels)
        except ValueError as error:
            return Picture(pending, None, str(error))
        return Picture(pending, fit_square(pixels, self.encoder.frames.resolution_px, self.encoder.frames.fit))

    async def _answers(self, batch: list[Picture], thread: ThreadPoolExecutor) -> list[Answer]:
        """What to publish for a batch. A frame that fails by itself gets no answer and is delivered again."""
        answers = [_skipped(picture.pending, picture.reason) for picture in batch if picture.pixels is None]
        good = [picture for picture in batch if picture.pixels is not None]
        if not good:
            return answers
        loop = asyncio.get_running_loop()

        def encode(pictures: list[Picture]) -> Awaitable[list[Answer]]:
            return loop.run_in_executor(thread, self._encode, pictures)

        try:
            answers += await encode(good)
            self._failed_in_a_row = 0
        except Exception as error:  # whatever a device raises must not cost the batch's other frames
            log.warning("frames=%d a batch failed, each is tried alone: %s", len(good), error)
            for picture in good:
                answers += await self._alone(picture, encode)
        return answers

    async def _alone(
        self, picture: Picture, encode: Callable[[list[Picture]], Awaitable[list[Answer]]]
    ) -> list[Answer]:
        try:
            answers = await encode([picture])
            self._failed_in_a_row = 0
        except Exception as error:
            log.exception("%s cannot be encoded, delivery=%d", _label(picture.pending), picture.pending.deliveries)
            self.counts.failed += 1
            self._failed_in_a_row += 1
            self._at_hand.pop(_key(picture.pending), None)
            if self._failed_in_a_row >= BROKEN_AFTER:
                raise EncoderError(f"{BROKEN_AFTER} frames in a row could not be encoded: {error}") from error
            return []
        return answers

    def _encode(self, pictures: list[Picture]) -> list[Answer]:
        """On the encoder's thread: one forward pass for pictures that all have pixels."""
        start = time.time()
        tokens = self.encoder(np.stack([picture.pixels for picture in pictures if picture.pixels is not None]))
        end = time.time()
        first, last = _label(pictures[0].pending), _label(pictures[-1].pending)
        self.timeline.append((first, last, len(pictures), start, end))
        self.counts.batches += 1
        self.counts.encode_s += end - start
        self.meters.encoded([picture.pending.entry_id for picture in pictures], start, end)
        self._frame_s = (end - start) / len(pictures)
        return [_answer(picture.pending, frame) for picture, frame in zip(pictures, tokens, strict=True)]

    async def _publish(self, answers: list[Answer]) -> None:
        await asyncio.gather(*(self._publish_one(pending, message) for pending, message in answers))

    async def _publish_one(self, pending: PendingFrame, message: FrameTokens | FrameSkipped) -> None:
        """Publish, again after an error of the bus; what cannot be published is delivered again later."""
        try:
            await self._publish_until_answered(pending, message)
        finally:
            self._at_hand.pop(_key(pending), None)

    async def _publish_until_answered(self, pending: PendingFrame, message: FrameTokens | FrameSkipped) -> None:
        for tries_left in reversed(range(PUBLISH_TRIES)):
            try:
                await self.bus.publish(pending, message)
            except BusError as error:
                log.warning("%s not published, tries_left=%d: %s", _label(pending), tries_left, error)
                if tries_left:
                    await self._pause()
                continue
            if isinstance(message, FrameTokens):
                self.counts.encoded += 1
            else:
                self.counts.skipped += 1
                log.warning("%s skipped: %s", _label(pending), message.reason)
            return

    async def _pause(self) -> None:
        """Wait after an error of the bus: longer each time, and not in step with other replicas."""
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**self._bus_errors_in_a_row) * random.uniform(0.5, 1.0)
        self._bus_errors_in_a_row += 1
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._stopping.wait()


def build_encoder_worker(config: Config, bus: Bus, name: str) -> EncoderWorker:
    """The worker that a settings file describes; loads the model, which takes a while."""
    settings = config.section("encoder", EncoderConfig)
    encoder = FrameEncoder(config.model, settings.device, settings.threads)
    side = config.model.frames.resolution_px
    encoder(np.zeros((1, side, side, 3), np.uint8))  # the first call is slow: nobody should wait for it
    return EncoderWorker(bus, encoder, settings, name)


def _answer(pending: PendingFrame, tokens: Tensor) -> Answer:
    if not bool(torch.isfinite(tokens).all()):
        return _skipped(pending, "the encoder gave values that are not finite")
    return pending, FrameTokens.from_tensor(pending.frame.seq, pending.frame.time, tokens)


def _skipped(pending: PendingFrame, reason: str) -> Answer:
    return pending, FrameSkipped(seq=pending.frame.seq, time=pending.frame.time, reason=reason)


def _key(pending: PendingFrame) -> tuple[str, str]:
    return pending.stream, pending.entry_id


def _label(pending: PendingFrame) -> str:
    return f"{pending.frame.session_id}:{pending.frame.seq}"

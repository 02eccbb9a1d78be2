"""EncoderWorker: frames of many sessions through a real bus and a small real encoder."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from redis.asyncio import Redis

from actors import encoder as encoder_module
from actors.bus import Bus, BusError, PendingFrame
from actors.config import Fit, FrameConfig, ModelConfig
from actors.encoder import EncoderConfig, EncoderError, EncoderWorker, FrameEncoder
from actors.messages import FrameSkipped, FrameTokens, SessionSettings
from actors.video import encode_jpeg, fit_square

pytestmark = pytest.mark.anyio

DEADLINE_S = 20
Connect = Callable[..., Awaitable[Bus]]


def picture(shade: int) -> bytes:
    return encode_jpeg(np.full((32, 32, 3), shade, np.uint8), quality=95)


POISON = 255


class BreakableEncoder(FrameEncoder):
    """Fails for batches with a white picture, or for all while `broken`; waits for `gate`."""

    broken = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def __call__(self, frames: np.ndarray) -> torch.Tensor:
        self.batches.append(len(frames))
        self.entered.set()
        assert self.gate.wait(DEADLINE_S)
        if self.broken or (frames.mean(axis=(1, 2, 3)) > POISON - 5).any():
            raise RuntimeError("device fault")
        return super().__call__(frames)


@pytest.fixture(scope="module")
def tiny_config(tiny_models: Path) -> ModelConfig:
    frames = FrameConfig(resolution_px=32, pooled=(3, 3))
    return ModelConfig(llm="none", vision=str(tiny_models / "siglip"), frames=frames, dtype="float32")


@pytest.fixture
def encoder(tiny_config: ModelConfig) -> BreakableEncoder:
    return BreakableEncoder(tiny_config)


@asynccontextmanager
async def running(worker: EncoderWorker) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(worker.run())
    try:
        yield task
    finally:
        worker.stop()
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.wait([task])


async def open_and_admit(bus: Bus, session_id: str, images: list[bytes], bulk: bool = False) -> None:
    await bus.open_session(session_id, "fingerprint", SessionSettings())
    for seq, image in enumerate(images):
        assert await bus.admit_frame(session_id, seq / 2, image, bulk) == seq


async def answers(bus: Bus, session_id: str, count: int) -> dict[int, FrameTokens | FrameSkipped]:
    """The session's input once it holds `count` messages, by seq."""
    async with asyncio.timeout(DEADLINE_S):
        while len(found := await bus.read_all_inputs(session_id)) < count:
            await asyncio.sleep(0.01)
    return {message.seq: message for _, message in found}  # type: ignore[union-attr, misc]


async def test_every_frame_of_every_session_becomes_its_own_tokens(bus: Bus, encoder: BreakableEncoder) -> None:
    sessions = {f"s{number}": [picture(10 * number + seq) for seq in range(5)] for number in range(4)}
    for session_id, images in sessions.items():
        await open_and_admit(bus, session_id, images)
    worker = EncoderWorker(bus, encoder, EncoderConfig(batch_size=8), "a")
    async with running(worker):
        for number, session_id in enumerate(sessions):
            found = await answers(bus, session_id, 5)
            for seq, message in found.items():
                assert isinstance(message, FrameTokens)
                assert message.time == seq / 2
                expected = FrameEncoder.__call__(encoder, np.full((1, 32, 32, 3), 10 * number + seq, np.uint8))
                torch.testing.assert_close(message.tensor((10, 48)), expected[0], atol=2e-3, rtol=0)
    assert worker.stats()["encoded"] == 20


@pytest.mark.parametrize("fit", ["pad", "crop"])
async def test_a_wide_picture_is_seen_as_the_model_fits_it(bus: Bus, tiny_config: ModelConfig, fit: Fit) -> None:
    frames = tiny_config.frames.model_copy(update={"fit": fit})
    encoder = BreakableEncoder(tiny_config.model_copy(update={"frames": frames}))
    wide = np.full((32, 64, 3), 200, np.uint8)
    await open_and_admit(bus, "wide", [encode_jpeg(wide, quality=95)])
    async with running(EncoderWorker(bus, encoder, EncoderConfig(), "a")):
        message = (await answers(bus, "wide", 1))[0]
    assert isinstance(message, FrameTokens)
    expected, other = (encoder(fit_square(wide, 32, one)[None])[0].float() for one in (fit, *{"pad", "crop"} - {fit}))
    torch.testing.assert_close(message.tensor((10, 48)).float(), expected, atol=2e-2, rtol=0)
    assert float((expected - other).abs().max()) > 0.1


async def test_batches_mix_sessions_and_keep_to_their_size(bus: Bus, encoder: BreakableEncoder) -> None:
    for number in range(4):
        await open_and_admit(bus, f"s{number}", [picture(0)] * 3)
    async with running(EncoderWorker(bus, encoder, EncoderConfig(batch_size=4, max_wait_ms=500), "a")):
        for number in range(4):
            await answers(bus, f"s{number}", 3)
    assert max(encoder.batches) == 4
    assert sum(encoder.batches) == 12


async def test_bytes_that_are_no_image_skip_their_frame_alone(bus: Bus, encoder: BreakableEncoder) -> None:
    await open_and_admit(bus, "s", [picture(0), b"not a picture", picture(2)])
    worker = EncoderWorker(bus, encoder, EncoderConfig(), "a")
    async with running(worker):
        found = await answers(bus, "s", 3)
    assert [type(found[seq]) for seq in range(3)] == [FrameTokens, FrameSkipped, FrameTokens]
    assert isinstance(found[1], FrameSkipped)
    assert found[1].reason.startswith("not an image: found 13 bytes that begin with b'not a pi'")
    assert found[1].time == 0.5
    assert (worker.stats()["encoded"], worker.stats()["skipped"]) == (2, 1)


async def test_a_frame_that_fails_does_not_fail_its_batch_and_is_skipped_in_the_end(
    connect: Connect, encoder: BreakableEncoder
) -> None:
    bus = await connect(reclaim_idle_ms=1000, max_deliveries=2)
    await open_and_admit(bus, "s", [picture(0), picture(POISON), picture(2)])
    worker = EncoderWorker(bus, encoder, EncoderConfig(batch_size=4, max_wait_ms=500), "a")
    async with running(worker):
        found = await answers(bus, "s", 3)
    assert [type(found[seq]) for seq in range(3)] == [FrameTokens, FrameSkipped, FrameTokens]
    assert worker.stats()["failed"] == 2  # once for each delivery


async def test_an_encoder_that_fails_for_everything_ends_the_worker(
    connect: Connect, encoder: BreakableEncoder
) -> None:
    bus = await connect(reclaim_idle_ms=20, max_deliveries=100)
    encoder.broken = True
    await open_and_admit(bus, "s", [picture(seq) for seq in range(4)])
    worker = EncoderWorker(bus, encoder, EncoderConfig(), "a")
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(EncoderError, match="8 frames in a row could not be encoded: device fault"):
            await worker.run()
    assert await bus.read_all_inputs("s") == []  # left for a replica that works


async def test_frames_of_a_worker_that_died_are_encoded_by_another(connect: Connect, encoder: BreakableEncoder) -> None:
    bus = await connect(reclaim_idle_ms=50)
    await open_and_admit(bus, "s", [picture(seq) for seq in range(3)])
    async with asyncio.timeout(DEADLINE_S):
        taken: list[PendingFrame] = []
        while len(taken) < 3:
            taken += await bus.read_frames("dead", 3, 100)
    async with running(EncoderWorker(await connect(reclaim_idle_ms=50), encoder, EncoderConfig(), "alive")):
        found = await answers(bus, "s", 3)
    assert all(isinstance(message, FrameTokens) for message in found.values())


async def test_what_a_slow_worker_encodes_is_held_until_it_is_answered(
    connect: Connect, encoder: BreakableEncoder, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = await connect(reclaim_idle_ms=400)
    hold, held, enough = bus.hold, list[list[str]](), asyncio.Event()

    async def counted(consumer: str, frames: list[PendingFrame]) -> int:
        held.append([pending.entry_id for pending in frames])
        if sum(map(bool, held)) == 3 or (encoder.gate.is_set() and not frames):
            enough.set()
        return await hold(consumer, frames)

    monkeypatch.setattr(bus, "hold", counted)
    encoder.gate.clear()
    await open_and_admit(bus, "s", [picture(0)])
    async with running(EncoderWorker(bus, encoder, EncoderConfig(), "a")), asyncio.timeout(DEADLINE_S):
        await enough.wait()
        async with Redis.from_url(redis_url) as redis:
            stream = bus.keys.frames(bus.partition("s"))
            [entry] = await redis.xpending_range(stream, "encoders", "-", "+", 8)
        enough.clear()
        encoder.gate.set()
        await answers(bus, "s", 1)
        await enough.wait()  # what is answered is held no longer
    assert (entry["consumer"], entry["times_delivered"]) == (b"a", 1)


async def test_a_frame_over_which_an_encoder_hangs_is_not_held_for_ever(
    connect: Connect, encoder: BreakableEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_module, "LONGEST_HOLD_S", 0.0)
    bus, other = await connect(reclaim_idle_ms=200), await connect(reclaim_idle_ms=200)
    encoder.gate.clear()
    await open_and_admit(bus, "s", [picture(0)])
    async with running(EncoderWorker(bus, encoder, EncoderConfig(), "hangs")), asyncio.timeout(DEADLINE_S):
        assert await asyncio.to_thread(encoder.entered.wait, DEADLINE_S)
        while not (found := await other.read_frames("other", 1, 200)):
            pass
        assert found[0].frame.seq == 0
        assert found[0].deliveries in (2, 3)  # the worker that hangs reads ahead, and may have got it once more
        encoder.gate.set()


async def test_the_next_pictures_are_decoded_while_a_batch_is_encoded(
    bus: Bus, encoder: BreakableEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    second_decoded = threading.Event()
    decoded: list[bytes] = []

    def decode_and_note(data: bytes, max_pixels: int) -> np.ndarray:
        decoded.append(data)
        if len(decoded) == 2:
            second_decoded.set()
        return np.zeros((32, 32, 3), np.uint8)

    monkeypatch.setattr(encoder_module, "decode_image", decode_and_note)
    encoder.gate.clear()
    await open_and_admit(bus, "s", [picture(0), picture(1)])
    async with running(EncoderWorker(bus, encoder, EncoderConfig(batch_size=1), "a")):
        assert await asyncio.to_thread(encoder.entered.wait, DEADLINE_S)
        assert await asyncio.to_thread(second_decoded.wait, DEADLINE_S)
        assert encoder.batches == [1]  # the first is still being encoded
        encoder.gate.set()
        await answers(bus, "s", 2)


async def test_a_slow_encoder_takes_only_what_it_answers_in_time(connect: Connect, encoder: BreakableEncoder) -> None:
    """Frames held for longer than `reclaim_idle_ms` would be given to another worker, and skipped in the end."""
    bus = await connect(reclaim_idle_ms=2000)
    worker = EncoderWorker(bus, encoder, EncoderConfig(batch_size=8, max_wait_ms=200), "a")
    await open_and_admit(bus, "s", [picture(seq) for seq in range(4)])
    worker._frame_s = 0.25  # as if measured: two batches of two are held for a second
    async with running(worker):
        await answers(bus, "s", 4)
    assert encoder.batches[0] == 2


async def test_stop_answers_what_was_read_and_ends(bus: Bus, encoder: BreakableEncoder) -> None:
    encoder.gate.clear()
    await open_and_admit(bus, "s", [picture(seq) for seq in range(2)])
    worker = EncoderWorker(bus, encoder, EncoderConfig(max_wait_ms=500, batch_size=2), "a")
    async with running(worker) as task:
        assert await asyncio.to_thread(encoder.entered.wait, DEADLINE_S)
        worker.stop()
        encoder.gate.set()
        async with asyncio.timeout(DEADLINE_S):
            await task
        assert len(await bus.read_all_inputs("s")) == 2


async def test_errors_of_the_bus_are_waited_out(
    bus: Bus, encoder: BreakableEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_module, "FIRST_PAUSE_S", 0.001)
    left = {"read_frames": 2, "publish": 2}

    def failing(name: str) -> Callable[..., Awaitable[object]]:
        working = getattr(bus, name)

        async def call(*arguments: object) -> object:
            if left[name]:
                left[name] -= 1
                raise BusError("unreachable", "Redis is away")
            return await working(*arguments)

        return call

    for name in left:
        monkeypatch.setattr(bus, name, failing(name))
    await open_and_admit(bus, "s", [picture(seq) for seq in range(3)])
    async with running(EncoderWorker(bus, encoder, EncoderConfig(), "a")):
        found = await answers(bus, "s", 3)
    assert sorted(found) == [0, 1, 2]
    assert left == {"read_frames": 0, "publish": 0}


async def test_live_frames_are_encoded_before_recorded_ones(bus: Bus, encoder: BreakableEncoder) -> None:
    await open_and_admit(bus, "film", [picture(seq) for seq in range(6)], bulk=True)
    await open_and_admit(bus, "live", [picture(seq) for seq in range(6)])
    worker = EncoderWorker(bus, encoder, EncoderConfig(batch_size=2), "a")
    async with running(worker):
        await answers(bus, "film", 6)
        await answers(bus, "live", 6)
    order = [first.split(":")[0] for first, *_ in worker.timeline]
    assert order == ["live"] * order.count("live") + ["film"] * order.count("film")


async def test_stats_count_and_remember_batches(bus: Bus, encoder: BreakableEncoder) -> None:
    await open_and_admit(bus, "s", [picture(seq) for seq in range(4)])
    worker = EncoderWorker(bus, encoder, EncoderConfig(batch_size=4, max_wait_ms=500), "a")
    async with running(worker):
        await answers(bus, "s", 4)
    stats = worker.stats()
    assert (stats["encoded"], stats["skipped"], stats["failed"]) == (4, 0, 0)
    assert stats["frames_per_batch"] == 4 / len(encoder.batches)
    timeline = worker.timeline
    assert (timeline[0][0], timeline[-1][1]) == ("s:0", "s:3")
    assert all(start <= end for *_, start, end in timeline)

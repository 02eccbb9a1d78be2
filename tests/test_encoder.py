"""FrameEncoder: all vision preprocessing, tokens as the reference makes them."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import GOLDEN
from safetensors.torch import load

from actors.config import FrameConfig, ModelConfig
from actors.encoder import FrameEncoder
from actors.vision import VisionError

VISION = load(lzma.decompress((GOLDEN / "forward" / "vision.safetensors.xz").read_bytes()))
FRAMES_U8 = VISION["frames_u8"].permute(0, 2, 3, 1).contiguous().numpy()


def config(vision: Path | str, **frames: object) -> ModelConfig:
    settings = FrameConfig.model_validate({"resolution_px": 32} | frames)
    return ModelConfig(llm="none", vision=str(vision), frames=settings, dtype="float32")


@pytest.fixture(scope="module")
def embedded() -> FrameEncoder:
    return FrameEncoder(config("embedded", resolution_px=224, pooled=(3, 3)), threads=1)


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    """Eight frames with some structure, unlike noise."""
    ramp = np.linspace(0, 1, 224)
    picture = np.stack([np.outer(ramp, ramp), np.outer(ramp, 1 - ramp), np.outer(1 - ramp, ramp)], axis=-1)
    return np.stack([np.roll(255 * picture, 25 * shift, axis=shift % 2) for shift in range(8)]).astype(np.uint8)


@pytest.mark.parametrize(
    ("golden", "frames"),
    [
        ("tokens_cls", {"cls": True}),
        ("tokens_3x3", {"cls": False, "pooled": (3, 3)}),
        ("tokens_cls_3x3", {"cls": True, "pooled": (3, 3)}),
        ("tokens_cls_2x4", {"cls": True, "pooled": (2, 4)}),
    ],
)
def test_tokens_equal_the_reference_s(tiny_models: Path, golden: str, frames: dict[str, object]) -> None:
    encoder = FrameEncoder(config(tiny_models / "siglip", **frames))
    expected = VISION[golden]
    torch.testing.assert_close(encoder.encode(FRAMES_U8), expected, atol=1e-5, rtol=0)
    assert (encoder.num_tokens, encoder.width) == tuple(expected.shape[1:])


def test_a_call_gives_the_same_tokens_in_fp16(tiny_models: Path) -> None:
    tokens = FrameEncoder(config(tiny_models / "siglip", pooled=(3, 3)))(FRAMES_U8)
    assert tokens.dtype == torch.float16
    torch.testing.assert_close(tokens, VISION["tokens_cls_3x3"].half(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("source", ["siglip", "embedded"])
def test_tokens_do_not_depend_on_the_batch(
    source: str, tiny_models: Path, embedded: FrameEncoder, photos: np.ndarray
) -> None:
    encoder = embedded if source == "embedded" else FrameEncoder(config(tiny_models / "siglip", pooled=(3, 3)))
    frames = photos if source == "embedded" else FRAMES_U8
    together = encoder.encode(frames)
    for size in (1, 3):
        parts = [encoder.encode(frames[start : start + size]) for start in range(0, len(frames), size)]
        torch.testing.assert_close(torch.cat(parts), together, atol=1e-5, rtol=0)


def test_embedded_tokens_are_the_mean_and_a_pooled_grid(embedded: FrameEncoder, photos: np.ndarray) -> None:
    tokens = embedded.encode(photos)
    assert tokens.shape == (8, 10, 1280)
    assert (embedded.num_tokens, embedded.width) == (10, 1280)
    with torch.inference_mode():
        summary, grid = embedded.tower((torch.from_numpy(photos).permute(0, 3, 1, 2).float() - 127) / 128)
    torch.testing.assert_close(tokens[:, 0], summary, atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens[:, 1], grid[:, :3, :3].mean(dim=(1, 2)), atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens[:, 9], grid[:, 4:, 4:].mean(dim=(1, 2)), atol=1e-4, rtol=0)


def test_frames_of_another_size_are_scaled_inside(embedded: FrameEncoder, photos: np.ndarray) -> None:
    doubled = photos.repeat(2, axis=1).repeat(2, axis=2)
    summaries = embedded.encode(photos)[:, 0]
    similarity = torch.cosine_similarity(embedded.encode(doubled)[:, 0].unsqueeze(1), summaries, dim=-1)
    assert similarity.argmax(dim=1).tolist() == list(range(8))
    assert similarity.diagonal().min() > 0.97


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((1, 32, 48, 3), np.uint8),
        np.zeros((1, 3, 32, 32), np.uint8),
        np.zeros((1, 32, 32, 3), np.float32),
    ],
)
def test_anything_but_square_uint8_rgb_is_refused(tiny_models: Path, frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected square RGB pictures: uint8 \[B, H, H, 3\]"):
        FrameEncoder(config(tiny_models / "siglip")).encode(frames)


def test_a_grid_finer_than_the_model_s_is_refused(tiny_models: Path) -> None:
    with pytest.raises(VisionError, match=r"pooled is \[5, 5\], but at 32 pixels siglip has a grid of 4x4"):
        FrameEncoder(config(tiny_models / "siglip", pooled=(5, 5)))


def test_values_beyond_fp16_stay_finite(tiny_models: Path) -> None:
    encoder = FrameEncoder(config(tiny_models / "siglip"))
    with torch.no_grad():
        encoder.tower.model.head.mlp.fc2.bias.fill_(1e6)
    assert torch.isfinite(encoder(FRAMES_U8)).all()


def test_the_encoder_uses_as_many_threads_as_it_was_told(tiny_models: Path) -> None:
    before = torch.get_num_threads()
    try:
        FrameEncoder(config(tiny_models / "siglip"), threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_frames_that_must_not_be_written_to_are_taken(tiny_models: Path) -> None:
    frozen = FRAMES_U8.copy()
    frozen.flags.writeable = False
    assert FrameEncoder(config(tiny_models / "siglip"))(frozen).shape == (6, 1, 48)

"""Vision towers: normalised pixels to a summary vector and a grid of patch vectors.

A tower is named in `model.vision` by a folder or hub name (towers.py), or is the embedded network
(efficientnet.py). What it is can be told without loading it: a fingerprint and the width of its tokens.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from actors import efficientnet
from actors.config import ModelConfig
from actors.weights import digest, feature_fingerprint, weights_folder

EMBEDDED = "embedded"  # in place of a folder or hub name: the weights that come in a package

Constants = tuple[float, ...]


class VisionError(ValueError):
    """A vision model is missing, damaged or of a kind we cannot use; says what was found and expected."""


class Tower(nn.Module):
    """Base of all towers. `mean` and `std` (per channel, pixels in 0..1) are what `forward` expects."""

    family: str
    width: int
    mean: Constants
    std: Constants

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, R, R) to summary (B, D) and grid (B, h, w, D)."""
        raise NotImplementedError

    def grid_side(self, resolution_px: int) -> int:
        """Cells on a side of the grid. Raises VisionError for a resolution the model cannot take."""
        raise NotImplementedError


class EmbeddedTower(Tower):
    """EfficientNet-Lite0 from its wheel; the summary is the mean of the grid, as its classifier uses."""

    family = "efficientnet-lite0"
    width = efficientnet.WIDTH
    mean = efficientnet.MEAN
    std = efficientnet.STD

    def __init__(self) -> None:
        super().__init__()
        # Convolutions run twice as fast on a CPU with the channels innermost.
        self.model = efficientnet.load_embedded().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        grid = self.model(pixels.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        return grid.mean(dim=(1, 2)), grid

    def grid_side(self, resolution_px: int) -> int:
        return -(-resolution_px // efficientnet.STRIDE)


def load_tower(source: str) -> Tower:
    """The tower of `source`, a folder, a hub name or `embedded`, in fp32 on the CPU.

    Raises VisionError for a model we cannot use, WeightsError or FileNotFoundError for one that is not there.
    """
    if source == EMBEDDED:
        return EmbeddedTower().eval()
    from actors.towers import load_transformer

    return load_transformer(weights_folder(source)).eval()


def vision_fingerprint(config: ModelConfig) -> str:
    """What frame tokens made with `config` are called, found without loading the model.

    Covers the encoder's name and weights, resolution and tokens per frame; raises as `load_tower`.
    """
    if config.vision == EMBEDDED:
        data = efficientnet.find_weights().read_bytes()
        weights = hashlib.blake2b(data, digest_size=8).hexdigest()
    else:
        weights = digest(weights_folder(config.vision))
    return feature_fingerprint(config.vision, weights, config.frames)


def vision_width(source: str) -> int:
    """The width D of the frame tokens of `source`, found without loading the model; raises as `load_tower`."""
    if source == EMBEDDED:
        return EmbeddedTower.width
    from actors.towers import transformer_width

    return transformer_width(weights_folder(source))

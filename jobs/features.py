"""Frame tokens as the public reference saves them: one `VIDEO_ID.pt` a video, a tensor (F, N, D).

The reference keeps them in folders such as `full_scale_2fps_384_1+3x3_google--siglip-large-patch16-384`,
whose name tells rate, resolution, tokens a frame and encoder.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from actors.config import Section
from actors.video import VideoError
from jobs.clock import Extent

FOLDER = re.compile(r".*_(?P<fps>\d+)fps_(?P<px>\d+)_(?P<cls>1)?\+?(?:(?P<h>\d+)x(?P<w>\d+))?_(?P<encoder>.+)$")


class FeaturesError(VideoError):
    """A file of frame tokens is damaged or holds something else; says what was found and expected."""


class FeaturesFolder(Section):
    """What a folder's name says about the frame tokens in it."""

    fps: int = Field(gt=0)
    resolution_px: int = Field(gt=0)
    num_tokens: int = Field(gt=0)
    encoder: str

    @classmethod
    def parse(cls, folder: Path) -> FeaturesFolder | None:
        """None for a name of another form."""
        match = FOLDER.match(folder.name)
        if match is None:
            return None
        grid = int(match["h"]) * int(match["w"]) if match["h"] else 0
        return cls(
            fps=int(match["fps"]),
            resolution_px=int(match["px"]),
            num_tokens=(match["cls"] is not None) + grid,
            encoder=match["encoder"].replace("--", "/"),
        )


def read_features(path: Path) -> Tensor:
    """The tokens (F, N, D) of one video, memory-mapped. Raises FeaturesError."""
    try:
        tokens = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise FeaturesError(f"{path}: {error.strerror or error}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise FeaturesError(f"{path}: not a saved tensor ({str(error).splitlines()[0]})") from None
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point() or tokens.ndim != 3 or not len(tokens):
        found = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise FeaturesError(f"{path}: found {found}, expected frame tokens as floats [frames, tokens a frame, width]")
    return tokens


def features_extent(path: Path, fps: float) -> Extent:
    """What the video of these tokens has; it ends with its last frame."""
    count = len(read_features(path))
    return Extent(count, fps, (count - 1) / fps)

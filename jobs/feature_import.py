"""Frame tokens of the public reference, taken over into a frame-token store."""

from __future__ import annotations

from pathlib import Path

import torch

from actors.config import ModelConfig
from jobs.features import FeaturesError, FeaturesFolder, read_features
from jobs.frame_store import FrameStore

FRAMES_AT_ONCE = 1024


def take_over(path: Path, store: FrameStore, model: ModelConfig, video_id: str, source: str | None = None) -> int:
    """Write one video's tokens into a store and return how many frames there are; `source` is remembered with them.

    They have no fingerprint: that `model.vision` made them is taken from the folder's name, and that its
    weights are the same is taken on trust. Raises FeaturesError where the name says otherwise, or a
    value exceeds fp16; StoreError for tokens of another shape.
    """
    folder = FeaturesFolder.parse(path.parent)
    if folder is None:
        raise FeaturesError(
            f"{path.parent} does not tell what made its features: name it VIDEOS_2fps_384_1+3x3_ENCODER"
        )
    made = {
        "fps": (folder.fps, store.info.fps),
        "resolution_px": (folder.resolution_px, model.frames.resolution_px),
        "fit": ("pad", model.frames.fit),
        "tokens a frame": (folder.num_tokens, store.info.num_tokens),
        "encoder": (Path(folder.encoder).name, Path(model.vision).name.split("--")[-1]),
    }
    if differences := [f"{name} {theirs}, not {ours}" for name, (theirs, ours) in made.items() if theirs != ours]:
        raise FeaturesError(f"{path.parent} was made with {'; '.join(differences)}")
    tokens = read_features(path)
    with store.writer(video_id, source=source or str(path)) as writer:
        for first in range(0, len(tokens), FRAMES_AT_ONCE):
            part = tokens[first : first + FRAMES_AT_ONCE].to(torch.float16)
            if not part.isfinite().all():
                raise FeaturesError(f"{path}: a value is not finite, or too large for float16")
            writer.append([frame / folder.fps for frame in range(first, first + len(part))], part)
        writer.commit()
    return len(tokens)

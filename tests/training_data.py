"""Dialogues and random frame tokens for tests of training: no video, no encoder."""

from __future__ import annotations

from pathlib import Path

import torch

from actors.config import FrameConfig, ModelConfig
from jobs.annotations import Moment, VideoAnnotation
from jobs.dialogues import DataConfig, Dialogue, narrate
from jobs.frame_store import FrameStore, StoreInfo

WIDTH = 48


def narrated(video_id: str, num_frames: int = 12) -> Dialogue:
    """One dialogue over the frames 1..10 of a video at 2 fps; its length differs from video to video."""
    moments = [Moment(time=0.5, text=f"You open {video_id}."), Moment(time=3, text="You cut " * len(video_id))]
    annotation = VideoAnnotation(video_id=video_id, video=f"{video_id}.mp4", moments=(*moments, LAST), source="test")
    return narrate(annotation, num_frames, num_frames / 2, DataConfig()).dialogues[0]


LAST = Moment(time=5, text="You stop.")


def write_store(
    folder: Path, frames: FrameConfig, video_ids: list[str], fingerprint: str = "tiny", fps: float = 2
) -> FrameStore:
    """A store of 12 frames a video, each of tokens drawn for it."""
    info = StoreInfo(fingerprint=fingerprint, vision="tiny", fps=fps, num_tokens=frames.num_tokens, width=WIDTH)
    store = FrameStore.create(folder, info)
    generator = torch.Generator().manual_seed(0)
    with store.locked():
        for video_id in video_ids:
            tokens = torch.randn(12, frames.num_tokens, WIDTH, generator=generator).half()
            with store.writer(video_id) as writer:
                writer.append([frame / fps for frame in range(12)], tokens)
                writer.commit()
    return store


def untrained_config(config: ModelConfig) -> ModelConfig:
    """The same model before training."""
    return config.model_copy(update={"checkpoint": None})

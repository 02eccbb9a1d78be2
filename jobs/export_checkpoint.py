"""Write a trained checkpoint (model.checkpoint) once more, in another form: to ship it, or for other programs.

With `export.average_with` it is averaged with another one first, most often with the one that it was trained
from: that keeps more of what was learned before. bfloat16 halves the files; what a model says may change by a
hair, so its threshold is chosen again (jobs.evaluate). `export.form=published` writes what the public
reference reads.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from actors import checkpoint
from actors.config import Config, ConfigError, ModelConfig, Section
from actors.parts import CheckpointError
from actors.weights import WeightsError
from jobs.program import run

logger = logging.getLogger(__name__)


class ExportConfig(Section):
    """Where to, and in which form."""

    folder: str | None = Field(default=None, description="must not exist, unless export.replace is set")
    form: Literal["ours", "published"] = "ours"
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="of adapter and connector, in our form"
    )
    average_with: str | None = Field(default=None, description="another checkpoint, of the same model and adapter")
    share: float = Field(default=0.5, gt=0, lt=1, description="weight of model.checkpoint in the average")
    replace: bool = Field(default=False, description="whether a checkpoint that is there already may be overwritten")


def export(config: Config) -> Path:
    """Write the checkpoint; returns its folder."""
    settings = config.section("export", ExportConfig)
    if settings.folder is None:
        raise ConfigError("export.folder is not set: say where the checkpoint is to be written")
    folder = Path(settings.folder)
    if folder.exists() and not (settings.replace and _is_checkpoint(folder)):
        raise ConfigError(
            f"{folder} exists: choose another export.folder, or set export.replace for a checkpoint there"
        )
    loaded = checkpoint.load(config.model, dtype=torch.float32, merged=False)
    videos: list[str] = []
    if settings.average_with is not None:
        with_it = config.model.model_copy(update={"checkpoint": settings.average_with})
        other = checkpoint.load(with_it, dtype=torch.float32, merged=False)
        checkpoint.average(loaded, other, settings.share)
        videos = other.trained_videos
    if settings.form == "published":
        checkpoint.export_published(folder, loaded)
    else:
        checkpoint.save(folder, loaded, videos, dtype=getattr(torch, settings.dtype))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    logger.info("checkpoint=%s size=%.1f MB", folder, size / 1e6)
    return folder


def _is_checkpoint(folder: Path) -> bool:
    """Whether the folder holds a checkpoint in either form, and no folders, as that of a training run does."""
    names = {entry.name for entry in folder.iterdir()}
    ours = {checkpoint.SETTINGS_FILE, checkpoint.CONNECTOR_FILE}
    published = {"adapter_config.json", "adapter_model.safetensors"}
    return (names >= ours or names >= published) and not any(entry.is_dir() for entry in folder.iterdir())


SECTIONS: dict[str, type[Section]] = {"model": ModelConfig, "export": ExportConfig}

if __name__ == "__main__":
    sys.exit(
        run(
            export,
            module="jobs.export_checkpoint",
            about=__doc__,
            example="configs/embedded.yaml export.folder=runs/exported",
            sections=SECTIONS,
            user_errors=(CheckpointError, WeightsError),
        )
    )

"""Vision transformers out of a Hugging Face folder, one small class per family.

The family is chosen by the `model_type` of the folder's own config, so that any folder works like the
hub name it was downloaded from. Of a two-tower model only the vision half is read. What stands for the
CLS token differs: see each class. `vision.py` imports this module only for a model that needs it,
because transformers' modelling code takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    PretrainedConfig,
    PreTrainedModel,
    Siglip2VisionModel,
    SiglipVisionModel,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging as transformers_logging

from actors.vision import EMBEDDED, Constants, Tower, VisionError
from actors.weights import check_safetensors, weight_files

HALF: Constants = (0.5, 0.5, 0.5)
CLIP_MEAN: Constants = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Constants = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Constants = (0.485, 0.456, 0.406)
IMAGENET_STD: Constants = (0.229, 0.224, 0.225)


class TransformerTower(Tower):
    """A Hugging Face vision transformer, its weights read from a folder or hub name."""

    model_class: ClassVar[type[PreTrainedModel]]
    default_mean: ClassVar[Constants] = HALF
    default_std: ClassVar[Constants] = HALF

    def __init__(self, folder: Path, config: PretrainedConfig) -> None:
        super().__init__()
        self.family = config.model_type.removesuffix("_vision_model")
        self.model = load_weights(self.model_class, folder, getattr(config, "vision_config", config))
        self.patch_px: int = self.model.config.patch_size
        self.width = self.model.config.hidden_size
        self.mean, self.std = self._constants(folder)

    def grid_side(self, resolution_px: int) -> int:
        if resolution_px % self.patch_px:
            raise VisionError(
                f"frames.resolution_px is {resolution_px}, expected a multiple of {self.patch_px}, "
                f"the patch size of this {self.family} model"
            )
        return resolution_px // self.patch_px

    def _constants(self, folder: Path) -> tuple[Constants, Constants]:
        """From the preprocessor settings beside the weights, else the family's usual ones."""
        try:
            settings, _ = ImageProcessingMixin.get_image_processor_dict(folder)
        except OSError:
            settings = {}
        mean, std = settings.get("image_mean", self.default_mean), settings.get("image_std", self.default_std)
        return tuple(mean), tuple(std)

    def _as_grid(self, patches: Tensor, pixels: Tensor) -> Tensor:
        side = self.grid_side(pixels.shape[-1])
        return patches.unflatten(1, (side, side))


class SiglipTower(TransformerTower):
    """SigLIP has no class token: the summary is the output of its attention-pooling head.

    SigLIP2 checkpoints of a fixed resolution are of this family too.
    """

    model_class = SiglipVisionModel

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(pixels, interpolate_pos_encoding=True)
        return out.pooler_output, self._as_grid(out.last_hidden_state, pixels)


class Siglip2Tower(TransformerTower):
    """SigLIP2 NaFlex takes patches instead of pictures; every frame here fills its square grid."""

    model_class = Siglip2VisionModel

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        batch, side, patch = len(pixels), self.grid_side(pixels.shape[-1]), self.patch_px
        cells = pixels.unflatten(3, (side, patch)).unflatten(2, (side, patch))  # (B, 3, h, patch, w, patch)
        patches = cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, side * side, -1)
        shapes = torch.tensor([[side, side]], device=pixels.device).expand(batch, 2)
        mask = torch.ones(patches.shape[:2], dtype=torch.int64, device=pixels.device)
        out = self.model(patches, pixel_attention_mask=mask, spatial_shapes=shapes)
        return out.pooler_output, self._as_grid(out.last_hidden_state, pixels)


class ClipTower(TransformerTower):
    """The summary is the class token of the last hidden state.

    Like the patches it is taken before CLIP's final layer norm (which CLIP applies to the class token
    alone), so that all tokens of a frame come from one space. The reference means the same, but drops
    the token axis and cannot run.
    """

    model_class = CLIPVisionModel
    default_mean, default_std = CLIP_MEAN, CLIP_STD

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.model(pixels, interpolate_pos_encoding=True).last_hidden_state
        return hidden[:, 0], self._as_grid(hidden[:, 1:], pixels)


class Dinov2Tower(TransformerTower):
    """The summary is the class token of the last hidden state, after the final layer norm."""

    model_class: ClassVar[type[PreTrainedModel]] = Dinov2Model
    default_mean, default_std = IMAGENET_MEAN, IMAGENET_STD

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.model(pixels).last_hidden_state
        registers = getattr(self.model.config, "num_register_tokens", 0)
        return hidden[:, 0], self._as_grid(hidden[:, 1 + registers :], pixels)


class Dinov2RegistersTower(Dinov2Tower):
    """DINOv2 with register tokens, which stand between class token and patches and are left out."""

    model_class = Dinov2WithRegistersModel


TOWERS: dict[str, type[TransformerTower]] = {
    "siglip": SiglipTower,
    "siglip_vision_model": SiglipTower,
    "siglip2": Siglip2Tower,
    "siglip2_vision_model": Siglip2Tower,
    "clip": ClipTower,
    "clip_vision_model": ClipTower,
    "dinov2": Dinov2Tower,
    "dinov2_with_registers": Dinov2RegistersTower,
}


def load_transformer(folder: Path) -> TransformerTower:
    """The tower in `folder`, in fp32 on the CPU. Raises VisionError, WeightsError."""
    tower, config = _family(folder)
    return tower(folder, config)


def transformer_width(folder: Path) -> int:
    """The width D of its tokens, from its config.json alone. Raises VisionError."""
    _, config = _family(folder)
    return int(getattr(config, "vision_config", config).hidden_size)


def load_weights(model_class: type[PreTrainedModel], folder: Path, config: PretrainedConfig) -> PreTrainedModel:
    """A model with every one of its weights from the safetensors files in `folder`. Raises VisionError."""
    for file in weight_files(folder):
        check_safetensors(file)
    try:
        with _quiet_transformers():
            loaded = model_class.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise VisionError(
            f"the vision weights in {folder} do not fit their config.json: {_first_line(error)}"
        ) from None
    # The annotated return type leaves out the report that was asked for.
    model, report = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)
    if missing := sorted(report["missing_keys"]):
        raise VisionError(
            f"the vision weights in {folder} lack {len(missing)} tensors of a {model_class.__name__}, "
            f"such as {missing[0]}: copy or download all of its files"
        )
    return model


def _family(folder: Path) -> tuple[type[TransformerTower], PretrainedConfig]:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise VisionError(
            f"the config.json in {folder} cannot be used for model.vision: {_first_line(error)}"
        ) from None
    if config.model_type not in TOWERS:
        raise VisionError(
            f"model.vision {folder} is of type {config.model_type!r}, expected one of {', '.join(TOWERS)}, "
            f"or {EMBEDDED!r} in place of a folder"
        )
    return TOWERS[config.model_type], config


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without a report about the text tower's weights, left unread on purpose, and a bar for a second of loading."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]

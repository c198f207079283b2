"""Convolutional classifier for small images: convolution, batch norm, dropout."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dougong.core.config import config
from dougong.core.errors import ConfigError
from dougong.nn.conv import BatchNorm2d, Conv2d
from dougong.nn.dropout import Dropout
from dougong.nn.init import Initialised
from dougong.nn.linear import Linear
from dougong.nn.ranges import Count, Probability


@config
class CNNConfig:
    """Stages of two 3×3 convolutions, each stage halving the image; then the mean over places and a linear
    head."""

    kind: Literal["cnn"] = "cnn"
    of_arrays: ClassVar[bool] = True
    num_classes: Count | None = None
    """labels; derived: from the data"""
    in_channels: Count = 1
    """1 for grey images, 3 for colour"""
    channels: tuple[Count, ...] = (32, 64)
    """width of each stage"""
    dropout: Probability = 0.25
    """of the features the head reads"""

    def build(self) -> "CNN":
        if self.num_classes is None:
            raise ConfigError("num_classes=None: a recipe derives it from its data. Outside one, give it, "
                              "such as num_classes=10.")
        if not self.channels:
            raise ConfigError("channels=(): a CNN needs at least one stage. Try channels=[32, 64].")
        return CNN(self)


class CNN(Initialised):
    """`pixels -> logits`. Pixels are B C Y X, or B Y X for one channel."""

    not_additive: str | None = ("BatchNorm normalises by the statistics of the batch it is given, so the "
                                "loss of two halves is not the loss of the whole")

    def __init__(self, section: CNNConfig) -> None:
        super().__init__()
        assert section.num_classes, "CNNConfig.build checks it"
        self.config, self.compute_dtype = section, torch.float32
        widths = (section.in_channels, *section.channels)
        self.stages = nn.ModuleDict({str(i): Stage(*widths[i:i + 2]) for i in range(len(section.channels))})
        self.dropout = Dropout(section.dropout)
        self.head = Linear(widths[-1], section.num_classes, bias=True)

    def forward(self, pixels: Float[Tensor, "B *image"]) -> Float[Tensor, "B classes"]:
        x = as_image(pixels).to(self.compute_dtype)
        for stage in self.stages.values():
            x = stage(x)
        return self.head(self.dropout(x.mean((-2, -1))))


class Stage(nn.Module):
    """Two convolutions with batch norm, then the larger of each 2 × 2 places (an odd edge is kept)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm1 = BatchNorm2d(channels)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = BatchNorm2d(channels)

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C2 Y2 X2"]:
        x = F.relu(self.norm1(self.conv1(x)))
        return F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2, ceil_mode=True)


def as_image(pixels: Tensor) -> Tensor:
    """B C Y X, from that or from B Y X."""
    return pixels[:, None] if pixels.dim() == 3 else pixels

"""Generative adversarial network for small images (Goodfellow et al. 2014, arXiv:1406.2661)."""

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from dougong.core.config import config
from dougong.core.errors import ConfigError
from dougong.models.families.cnn import as_image
from dougong.nn.conv import Conv2d
from dougong.nn.dropout import Dropout
from dougong.nn.init import Initialised
from dougong.nn.linear import Linear
from dougong.nn.norm import LayerNorm
from dougong.nn.ranges import Count, Probability


@config
class GANConfig:
    """A generator that draws images and a discriminator that scores them."""

    kind: Literal["gan"] = "gan"
    of_arrays: ClassVar[bool] = True
    image_size: Count | None = None
    """rows and columns of an image, a multiple of 4; derived: from the data"""
    channels: Count = 1
    """1 for grey images, 3 for colour"""
    noise_dim: Count = 32
    """numbers the generator draws an image from"""
    dim: Annotated[int, Field(ge=2)] = 128
    """width of both networks"""
    dropout: Probability = 0.3
    """in the discriminator, so that it cannot learn a small data set by heart"""

    def build(self) -> "GAN":
        if self.image_size is None or self.image_size % 4:
            raise ConfigError(f"image_size={self.image_size}: the networks halve the image twice. Try "
                              f"image_size={max(4, 4 * round((self.image_size or 8) / 4))}.")
        return GAN(self)


class GAN(Initialised):
    """Two models with a loss each: `generator` and `discriminator` are parameter groups of their own.

    No batch statistics: layer norm in the generator, none in the discriminator, so losses add over
    micro-batches.
    """

    not_additive: str | None = None

    def __init__(self, section: GANConfig) -> None:
        super().__init__()
        self.config, self.compute_dtype = section, torch.float32
        self.generator = Generator(section)
        self.discriminator = Discriminator(section)

    def forward(self, noise: Float[Tensor, "B Z"]) -> Float[Tensor, "B C Y X"]:
        return self.generator(noise)


class Generator(nn.Module):
    """`noise -> pixels` in 0…1: a linear map to a quarter-size image, then two doublings with
    convolutions."""

    def __init__(self, section: GANConfig) -> None:
        super().__init__()
        assert section.image_size, "GANConfig.build checks it"
        self.noise_dim, self.dim, self.side = section.noise_dim, section.dim, section.image_size // 4
        self.seed = Linear(section.noise_dim, section.dim * self.side**2, bias=True)
        self.norm = LayerNorm(section.dim * self.side**2)
        self.conv1 = Conv2d(section.dim, section.dim // 2, 3, padding=1)
        self.conv2 = Conv2d(section.dim // 2, section.channels, 3, padding=1)

    def forward(self, noise: Float[Tensor, "B Z"]) -> Float[Tensor, "B C Y X"]:
        x = F.relu(self.norm(self.seed(noise))).unflatten(1, (self.dim, self.side, self.side))
        x = F.relu(self.conv1(F.interpolate(x, scale_factor=2.0)))
        return self.conv2(F.interpolate(x, scale_factor=2.0)).sigmoid()


class Discriminator(nn.Module):
    """`pixels -> score`, one number per image, above 0 for "real". Pixels are B C Y X, or B Y X for one
    channel."""

    def __init__(self, section: GANConfig) -> None:
        super().__init__()
        assert section.image_size, "GANConfig.build checks it"
        self.conv1 = Conv2d(section.channels, section.dim // 2, 3, stride=2, padding=1)
        self.conv2 = Conv2d(section.dim // 2, section.dim, 3, stride=2, padding=1)
        self.dropout = Dropout(section.dropout)
        self.head = Linear(section.dim * (section.image_size // 4) ** 2, 1, bias=True)

    def forward(self, pixels: Float[Tensor, "B *image"]) -> Float[Tensor, "B"]:
        x = self.dropout(F.leaky_relu(self.conv1(as_image(pixels)), 0.2))
        x = self.dropout(F.leaky_relu(self.conv2(x), 0.2))
        return self.head(x.flatten(1)).squeeze(-1)

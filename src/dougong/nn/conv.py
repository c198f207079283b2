"""Convolutions and batch norm with named initial values; weights are cast to the precision of the input."""

import math

import torch
from torch import Tensor, nn

from dougong.nn.init import ONES, ZEROS, Normal


class Conv2d(nn.Conv2d):
    """Convolution, He initialisation (arXiv:1502.01852, eq. 10)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1,
                 padding: int = 0, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=bias)
        self.init = {"weight": Normal(math.sqrt(2 / (in_channels * kernel_size**2))), "bias": ZEROS}

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, self.weight.to(x.dtype), bias)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm (Ioffe & Szegedy 2015, arXiv:1502.03167). Statistics and parameters stay float32."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.init = {"weight": ONES, "bias": ZEROS}

    def reset_buffers(self) -> None:
        self.reset_running_stats()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)

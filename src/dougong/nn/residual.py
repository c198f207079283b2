"""What a layer receives from the residual stream."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dougong.core.config import config
from dougong.nn.init import Constant


@config
class PlainResidualConfig:
    """The layer receives the stream as it is."""

    kind: Literal["plain"] = "plain"

    def build(self) -> "PlainResidual":
        return PlainResidual()


@config
class X0ResidualConfig:
    """The layer receives `carry · x + origin · x0`, x0 being the embedded tokens, both factors learned per
    layer.

    From the modded-nanogpt speedrun and nanochat's `resid_lambdas` and `x0_lambdas`.
    """

    kind: Literal["x0"] = "x0"
    carry: float = 1.0
    """first value of the factor on the stream"""
    origin: float = 0.1
    """first value of the factor on the embedded tokens"""

    def build(self) -> "X0Residual":
        return X0Residual(carry=self.carry, origin=self.origin)


class PlainResidual(nn.Module):
    """Passes the stream on."""

    def forward(self, x: Float[Tensor, "B T D"], x0: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return x


class X0Residual(nn.Module):
    """Mixes the embedded tokens into the stream."""

    def __init__(self, *, carry: float, origin: float) -> None:
        super().__init__()
        self.carry = nn.Parameter(torch.empty(()))
        self.origin = nn.Parameter(torch.empty(()))
        self.init = {"carry": Constant(carry), "origin": Constant(origin)}

    def forward(self, x: Float[Tensor, "B T D"], x0: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.carry.to(x.dtype) * x + self.origin.to(x.dtype) * x0

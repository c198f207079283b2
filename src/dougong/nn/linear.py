"""Linear map whose float32 master weight is cast to the precision of its input."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, empty, nn

from dougong.nn.init import ZEROS, FanIn, Init


class Linear(nn.Module):
    """`y = x Wᵀ + b` in the precision of `x`; an explicit cast instead of autocast.

    `init` is the rule of the weight (default: `FanIn`); a bias begins at 0.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False,
                 init: Init | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(empty(out_features, in_features))
        self.bias = nn.Parameter(empty(out_features)) if bias else None
        self.init = {"weight": init or FanIn(), "bias": ZEROS}

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}" + (", bias" if self.bias is not None else "")

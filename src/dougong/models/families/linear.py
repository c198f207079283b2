"""Linear model: the smallest thing the loop can train, and one whose answer is known in closed form."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dougong.core.config import config
from dougong.core.errors import ConfigError
from dougong.nn.init import Initialised, matrix
from dougong.nn.linear import Linear
from dougong.nn.ranges import Count, NotNegative


@config
class LinearConfig:
    """`prediction = W features + b`."""

    kind: Literal["linear"] = "linear"
    of_arrays: ClassVar[bool] = True
    in_features: Count | None = None
    """columns of `features`; derived: from the data"""
    out_features: Count = 1
    """columns of the prediction"""
    bias: bool = False
    init_std: NotNegative = 0.0
    """std of W at the start; from 0, gradient descent on squared error ends at the minimum-norm solution"""

    def build(self) -> "LinearModel":
        if self.in_features is None:
            raise ConfigError("in_features=None: a recipe derives it from its data. Outside one, give it, "
                              "such as in_features=8.")
        return LinearModel(self)


class LinearModel(Initialised):
    """`features -> prediction`."""

    not_additive: str | None = None

    def __init__(self, section: LinearConfig) -> None:
        super().__init__()
        assert section.in_features, "LinearConfig.build checks it"
        self.config, self.compute_dtype = section, torch.float32
        self.linear = Linear(section.in_features, section.out_features, bias=section.bias,
                             init=matrix(section.init_std))

    def forward(self, features: Float[Tensor, "B in"]) -> Float[Tensor, "B out"]:
        return self.linear(features.to(self.compute_dtype))

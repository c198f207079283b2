"""Linear map whose float32 master weight is cast to the precision of its input."""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dougong.nn.init import ZEROS, FanIn, Init


def product(x: Float[Tensor, "*batch in"], weight_OI: Float[Tensor, "out in"],
            bias: Float[Tensor, " out"] | None) -> Float[Tensor, "*batch out"]:
    """`x Wᵀ + b` in the precision of `x`."""
    return F.linear(x, weight_OI.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Linear(nn.Linear):
    """`y = x Wᵀ + b` in the precision of `x`; an explicit cast instead of autocast. `multiply` is how (`nn.float8` has
    another way).

    `init` is the rule of the weight (default: `FanIn`); a bias begins at 0. It is torch's class underneath, so that
    whatever knows `nn.Linear` (tensor parallelism, quantisation) knows this one; torch's first values are not drawn.
    """

    multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor] = staticmethod(product)

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False,
                 init: Init | None = None) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.init = {"weight": init or FanIn(), "bias": ZEROS}

    def reset_parameters(self) -> None:
        """Nothing: values come from `init`, and drawing here would move the random numbers of a run."""

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self.multiply(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}" + (", bias" if self.bias is not None else "")

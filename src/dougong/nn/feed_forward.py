"""The layer's second half: each token alone, through a wider space."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dougong.core.config import config
from dougong.nn.init import Init
from dougong.nn.linear import Linear
from dougong.nn.ranges import Count

MULTIPLE_OF = 64   # widths that matrix kernels like


@config
class SwiGLUConfig:
    """`down(silu(gate(x)) · up(x))` (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    kind: Literal["swiglu"] = "swiglu"
    ffn_dim: Count | None = None
    """inner width; derived: 8/3 of the model's width, rounded up to 64, so the three matrices cost as much as
    two of 4×"""
    bias: bool = False

    def width(self, dim: int) -> int:
        return self.ffn_dim or -(-8 * dim // (3 * MULTIPLE_OF)) * MULTIPLE_OF

    def build(self, *, dim: int, init: Init | None = None, output_init: Init | None = None) -> "SwiGLU":
        return SwiGLU(dim, self.width(dim), bias=self.bias, init=init, output_init=output_init)


@config
class GELUConfig:
    """`down(gelu(up(x)))` (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""

    kind: Literal["gelu"] = "gelu"
    ffn_dim: Count | None = None
    """inner width; derived: 4 × the model's width"""
    approximate: Literal["tanh", "none"] = "tanh"
    """GPT-2 uses the tanh form; none: the exact error function"""
    bias: bool = True

    def width(self, dim: int) -> int:
        return self.ffn_dim or 4 * dim

    def build(self, *, dim: int, init: Init | None = None, output_init: Init | None = None) -> "FeedForward":
        activation = nn.GELU(approximate=self.approximate)
        return FeedForward(dim, self.width(dim), activation, bias=self.bias, init=init,
                           output_init=output_init)


@config
class ReLU2Config:
    """`down(relu(up(x))²)` (So et al. 2021, arXiv:2109.08668)."""

    kind: Literal["relu2"] = "relu2"
    ffn_dim: Count | None = None
    """inner width; derived: 4 × the model's width"""
    bias: bool = False

    def width(self, dim: int) -> int:
        return self.ffn_dim or 4 * dim

    def build(self, *, dim: int, init: Init | None = None, output_init: Init | None = None) -> "FeedForward":
        return FeedForward(dim, self.width(dim), ReLU2(), bias=self.bias, init=init, output_init=output_init)


class ReLU2(nn.Module):
    """`relu(x)²`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square() if torch.compiler.is_compiling() else _ReLU2.apply(x)  # type: ignore[return-value]


class _ReLU2(torch.autograd.Function):
    """Keeps only relu(x): the derivative is twice it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        r = x.relu()
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        (r,) = ctx.saved_tensors
        return (gradient * r).mul_(2)


class SwiGLU(nn.Module):
    """Gated feed-forward of three matrices."""

    def __init__(self, dim: int, ffn_dim: int, *, bias: bool, init: Init | None,
                 output_init: Init | None) -> None:
        super().__init__()
        self.gate = Linear(dim, ffn_dim, bias=bias, init=init)
        self.up = Linear(dim, ffn_dim, bias=bias, init=init)
        self.down = Linear(ffn_dim, dim, bias=bias, init=output_init)

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class FeedForward(nn.Module):
    """Feed-forward of two matrices around an activation."""

    def __init__(self, dim: int, ffn_dim: int, activation: nn.Module, *, bias: bool, init: Init | None,
                 output_init: Init | None) -> None:
        super().__init__()
        self.up = Linear(dim, ffn_dim, bias=bias, init=init)
        self.activation = activation
        self.down = Linear(ffn_dim, dim, bias=bias, init=output_init)

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.down(self.activation(self.up(x_BTD)))

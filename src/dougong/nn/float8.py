"""Products of the layers in 8-bit floating point: forward in e4m3, gradients in e5m2.

Micikevicius et al. 2022 (arXiv:2209.05433): e4m3 keeps three bits of a number up to 448, e5m2 two bits up to 57,344;
gradients differ more in size than activations, so they get the wider one. Each tensor is stretched before it is
rounded, by one number taken from the tensor as it is, so that its largest value becomes the format's largest; products
are summed in float32 and shrunk again. Weights stay float32: what is rounded lives for one product.

GPUs with float8 (compute capability 8.9 on) state twice the peak of bf16 for it. The op has a CPU form too, slower than
float32, so what rounding does to a model can be seen and tested anywhere.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dougong.core.errors import ConfigError
from dougong.nn.linear import Linear, product
from dougong.nn.moe import MoE

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""of which the hardware wants every side of a matrix to be one"""
_LEAST = torch.finfo(torch.float32).tiny      # of a scale, so that a tensor of zeros stays one


def multiply_in_float8(model: nn.Module) -> None:
    """In place: the linear maps of the model's layers compute by `float8_product` while they are trained. Head, tables,
    router and experts stay as they are, and so do all parameters, names and values.

    Raises ConfigError where there is no such map.
    """
    stack = getattr(model, "stack", None) or nn.Module()
    parts = [part for owner in stack.modules() if not isinstance(owner, MoE) for part in owner.children()
             if type(part) is Linear and _divides(part.weight)]
    if not parts:
        raise ConfigError(f"runtime.float8 multiplies the matrices of a decoder's layers whose sides divide by "
                          f"{MULTIPLE}, and there are none in this model.\nTry runtime.float8=false, or a model.dim of "
                          f"a multiple of {MULTIPLE}.")
    for part in parts:
        part.multiply = float8_product


def why_not_float8(device: torch.device) -> str | None:
    """Why this device has no products of float8; None if it has."""
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < (8, 9):
        return (f"it needs a GPU of compute capability 8.9 (Ada, Hopper) or later, and "
                f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}")
    return None if device.type in ("cuda", "cpu") else f"it is multiplied on CUDA and on CPUs, not on {device.type}"


def float8_product(x: Float[Tensor, "*batch in"], weight_OI: Float[Tensor, "out in"],
                   bias: Float[Tensor, " out"] | None) -> Float[Tensor, "*batch out"]:
    """`product` with all its factors rounded to float8, and its gradients' too. Without gradients (evaluation, samples)
    it is `product` itself: what is scored is the model that will be used."""
    if not torch.is_grad_enabled() or not _divides(weight_OI):
        return product(x, weight_OI, bias)
    x_MI = x.flatten(0, -2)
    M = x_MI.shape[0]
    if missing := -M % MULTIPLE:        # tokens are summed over in the weight's gradient
        x_MI = nn.functional.pad(x_MI, (0, 0, 0, missing))
    y: Tensor = Float8Product.apply(x_MI, weight_OI)[:M].unflatten(0, x.shape[:-1])  # type: ignore[index]
    return y if bias is None else y + bias.to(y.dtype)


class Float8Product(torch.autograd.Function):
    """x Wᵀ, (M I) and (O I) -> (M O) in the precision of x. What the backward needs of x it keeps rounded, a byte a
    number; the weight it rounds anew, as one that is gathered from other processes may be gone by then."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight_OI: Tensor) -> Tensor:
        x8_MI, x_scale = rounded(x_MI, FORWARD)
        weight8_OI, weight_scale = rounded(weight_OI, FORWARD)
        ctx.save_for_backward(x8_MI, x_scale, weight_OI)
        return torch._scaled_mm(x8_MI, weight8_OI.t(), scale_a=x_scale, scale_b=weight_scale, out_dtype=x_MI.dtype,
                                use_fast_accum=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_MO: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x8_MI, x_scale, weight_OI = ctx.saved_tensors
        g8_MO, g_scale = rounded(gradient_MO, BACKWARD)
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            weight8_OI, weight_scale = rounded(weight_OI, FORWARD)
            for_x = torch._scaled_mm(g8_MO, _by_columns(weight8_OI), scale_a=g_scale, scale_b=weight_scale,
                                     out_dtype=gradient_MO.dtype)
        if ctx.needs_input_grad[1]:
            for_weight = torch._scaled_mm(g8_MO.t().contiguous(), _by_columns(x8_MI), scale_a=g_scale,
                                          scale_b=x_scale, out_dtype=weight_OI.dtype)
        return for_x, for_weight


def rounded(x: Tensor, to: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in float8, row by row in memory, and the scale () in float32 that it is to be multiplied with. NaN and infinity
    make the whole product NaN."""
    scale = (x.detach().abs().amax().float() / torch.finfo(to).max).clamp(min=_LEAST)
    return (x.float() / scale).to(to).contiguous(), scale


def _by_columns(matrix: Tensor) -> Tensor:
    """The same matrix, its columns contiguous: how the second factor is wanted."""
    return matrix.t().contiguous().t()


def _divides(weight_OI: Tensor) -> bool:
    return all(side % MULTIPLE == 0 for side in weight_OI.shape)

"""Dropout (Srivastava et al. 2014): in training each element is 0 with probability p, else scaled by 1/(1-p).

On a CPU PyTorch draws a float for each element, which took an eighth of a training step. Here eight elements share one
64-bit draw, a byte each, and the mask is a product of floats (a boolean mask is converted element by element): 2.3 ms
against 16.0 for 3.1M elements in bf16. A byte resolves p to 1/256, so p=0.1 drops 26 of 256; p below 1/512 drops
nothing, and one of 256 is kept at least. The scale follows the share really kept, so the mean is exact.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 256


def dropout(x: Tensor, p: float, *, training: bool) -> Tensor:
    """`x` with elements dropped while training; `x` itself otherwise or where p is 0."""
    if not training or p == 0.0:
        return x
    if x.device.type in ("cuda", "mps"):
        return F.dropout(x, p)
    return _Dropout.apply(x, random_bytes(x.shape, x.device), p)  # type: ignore[return-value]


def random_bytes(shape: tuple[int, ...] | torch.Size, device: torch.device) -> Tensor:
    """Uniform uint8 noise from torch's generator: the same after its state is put back."""
    count = math.prod(shape)
    draws = torch.randint(-(2**63), 2**63 - 1, ((count + 7) // 8,), device=device)
    return draws.view(torch.uint8)[:count].view(shape)


def kept(noise: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """1 where an element is kept and 0 where it is dropped, in `dtype`."""
    return torch.ge(noise, _dropped(p), out=torch.empty_like(noise, dtype=dtype))


def kept_scale(p: float) -> float:
    """1 / (share kept)."""
    return _LEVELS / (_LEVELS - _dropped(p))


def _dropped(p: float) -> int:
    return min(round(_LEVELS * p), _LEVELS - 1)


class _Dropout(torch.autograd.Function):
    """Keeps the noise (a byte an element) for the way back and makes the mask again from it."""

    @staticmethod
    def forward(ctx, x: Tensor, noise: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(noise)
        ctx.p = p
        return kept(noise, p, x.dtype).mul_(kept_scale(p)).mul_(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        (noise,) = ctx.saved_tensors
        return kept(noise, ctx.p, gradient.dtype).mul_(kept_scale(ctx.p)).mul_(gradient), None, None


class _DropoutOnto(torch.autograd.Function):
    """`onto + dropout(x)`."""

    @staticmethod
    def forward(ctx, x: Tensor, onto: Tensor, noise: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(noise)
        ctx.p = p
        return torch.addcmul(onto, x, kept(noise, p, x.dtype), value=kept_scale(p))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        (noise,) = ctx.saved_tensors
        return kept(noise, ctx.p, gradient.dtype).mul_(gradient).mul_(kept_scale(ctx.p)), gradient, None, None


class Dropout(nn.Module):
    """`dropout` as a part."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, *, onto: Tensor | None = None) -> Tensor:
        """The rest of `x`, added to `onto` where that is given (in the same pass on a CPU)."""
        if onto is None:
            return dropout(x, self.p, training=self.training)
        if not self.training or self.p == 0.0 or x.device.type in ("cuda", "mps"):
            return onto + dropout(x, self.p, training=self.training)
        return _DropoutOnto.apply(x, onto, random_bytes(x.shape, x.device), self.p)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"p={self.p}"

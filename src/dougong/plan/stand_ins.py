"""Without the device: parts that keep for the backward pass what its kernels keep, and compute nothing.

Attention keeps queries, keys, values, output and one sum a query (FlashAttention: arXiv:2205.14135); its backward
accumulates the queries' gradient in fp32. The root-mean-square norm keeps its input and one number a row. Everything
else keeps on a GPU what it keeps here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dougong.nn import attention, attention_kernels, norm
from dougong.nn.mask import Mask


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # laid out as the queries came, B T N H underneath: what follows needs no copy
        y = torch.empty_like(q.transpose(1, 2).contiguous()).transpose(1, 2) if q.dim() == 4 else torch.empty_like(q)
        sums = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, y, sums)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:   # type: ignore[override]
        q, k, v, _, sums = ctx.saved_tensors
        accumulated, row_sums = torch.empty_like(q, dtype=torch.float32), torch.empty_like(sums)
        heads = q.shape[1] // k.shape[1]
        dk, dv = (torch.empty_like(x.repeat_interleave(heads, 1) if heads > 1 else x) for x in (k, v))
        del row_sums
        dq = torch.empty_like(q)
        del accumulated
        if heads > 1:
            dk, dv = torch.empty_like(k), torch.empty_like(v)
        return dq, dk, dv


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, dropout: float = 0.0) -> Tensor:
    return _FlashAttention.apply(q, k, v)   # type: ignore[return-value]


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        r = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, weight, r)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:   # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def fused_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return _FusedNorm.apply(x, None if weight is None else weight.to(x.dtype))   # type: ignore[return-value]


@contextmanager
def kernels_of(device: str) -> Iterator[None]:
    """Inside, models on the meta device or of fake tensors go the way that they go on "cuda" or "cpu"."""
    kernel, rms_norm = attention.choose_kernel, norm.rms_norm
    if device == "cuda":
        norm.rms_norm = fused_norm

    def choose(q: Tensor, k: Tensor) -> Any:
        blocks = device != "cuda" and q.shape[2] == k.shape[2] <= attention_kernels.BLOCKS_UP_TO
        return attention_kernels.blocked if blocks else flash_attention

    attention.choose_kernel = choose
    try:
        yield
    finally:
        attention.choose_kernel, norm.rms_norm = kernel, rms_norm

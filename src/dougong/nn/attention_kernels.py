"""Softmax attention, several ways behind one signature; `choose_kernel` says which is used where.

A kernel takes `q_BNTH, k_BKSH, v_BKSH, mask, dropout=p` and returns `y_BNTH`; N is a multiple of K, and query head n
reads key/value head n // (N // K). `dropout` is the probability that applies now (0 outside training).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dougong.nn.dropout import kept, kept_scale, random_bytes
from dougong.nn.mask import Mask

Kernel = Callable[..., Tensor]

BLOCKS_UP_TO = 1024
"""Longest sequence on a CPU that `blocked` serves: beyond it the T × S weights cost more memory than they save time."""


def choose_kernel(q_BNTH: Tensor, k_BKSH: Tensor) -> Kernel:
    """`blocked` for whole sequences on a CPU up to 1024 tokens, PyTorch's fused attention for all else.

    Forward and backward at batch 32, 4 heads of 64, T = 256 on two Zen 5 cores: bf16 13.6 ms against 50.6 for the fused
    kernel, fp32 30.6 against 44.2; batch 16, 4 heads of 32, T = 64 in bf16: 0.6 against 4.4.
    """
    T, S = q_BNTH.shape[2], k_BKSH.shape[2]
    plain = T == S <= BLOCKS_UP_TO and not torch.compiler.is_compiling()
    return blocked if plain and q_BNTH.device.type == "cpu" else fused


def fused(q_BNTH: Float[Tensor, "B N T H"], k_BKSH: Float[Tensor, "B K S H"],
          v_BKSH: Float[Tensor, "B K S H"], mask: Mask, *, dropout: float = 0.0) -> Float[Tensor, "B N T H"]:
    """PyTorch's `scaled_dot_product_attention`, which keeps no T × S scores where it has a fused form."""
    k, v = k_BKSH, v_BKSH
    if mask.bias is not None and q_BNTH.device.type == "cuda":
        # The forms that take a bias want a key head for each query head; else all scores would lie in memory.
        k, v = (_a_head_for_each(q_BNTH, part) for part in (k, v))
    return F.scaled_dot_product_attention(
        q_BNTH, k, v, attn_mask=mask.bias, is_causal=mask.causal, dropout_p=dropout,
        enable_gqa=q_BNTH.shape[1] != k.shape[1])


def explicit(q_BNTH: Float[Tensor, "B N T H"], k_BKSH: Float[Tensor, "B K S H"], v_BKSH: Float[Tensor, "B K S H"],
             mask: Mask, *, dropout: float = 0.0) -> Float[Tensor, "B N T H"]:
    """`blocked` with all queries in one block: every score is computed, hidden ones too."""
    return _attend(q_BNTH, k_BKSH, v_BKSH, mask, dropout, block=q_BNTH.shape[2])


def blocked(q_BNTH: Float[Tensor, "B N T H"], k_BKSH: Float[Tensor, "B K S H"], v_BKSH: Float[Tensor, "B K S H"],
            mask: Mask, *, dropout: float = 0.0, block: int | None = None) -> Float[Tensor, "B N T H"]:
    """Batched products over blocks of queries, each with the keys up to its own end: a third or so of all scores is
    never computed. T queries and as many keys, under a causal mask (or a bias that hides what is later).
    """
    T = q_BNTH.shape[2]
    if block is None:    # as measured: in bf16 small products cost more than they save
        smallest = 128 if q_BNTH.dtype == torch.bfloat16 else 64
        block = T if smallest >= T else max(smallest, -(-T // 4))
    return _attend(q_BNTH, k_BKSH, v_BKSH, mask, dropout, block=block)


def _attend(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Mask, dropout: float, *, block: int) -> Tensor:
    B, N, T, H = q_BNTH.shape
    S = k_BKSH.shape[2]
    q, k, v = (_a_head_for_each(q_BNTH, part).reshape(B * N, -1, H) for part in (q_BNTH, k_BKSH, v_BKSH))
    noise = random_bytes((B * N, T, S), q.device) if dropout else None
    y: Tensor = _Attention.apply(q, k, v, _bias(mask, B, N, T, S, like=q), noise, dropout, block)  # type: ignore
    return y.view(B, N, T, H)


def _a_head_for_each(q_BNTH: Tensor, part_BKSH: Tensor) -> Float[Tensor, "B N S H"]:
    """Keys or values, repeated for the query heads that share them."""
    shared_by = q_BNTH.shape[1] // part_BKSH.shape[1]
    return part_BKSH if shared_by == 1 else part_BKSH.repeat_interleave(shared_by, dim=1)


def _bias(mask: Mask, B: int, N: int, T: int, S: int, *, like: Tensor) -> Tensor:
    """What is added to the scores of shape (B·N, T, S), as small as broadcasting allows."""
    if mask.causal:
        return torch.full((T, S), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)
    if mask.bias is None:
        return torch.zeros((), dtype=like.dtype, device=like.device).expand(T, S)
    if mask.bias.shape[:2] == (1, 1):
        return mask.bias[0, 0]
    return mask.bias.expand(B, N, T, S).reshape(B * N, T, S)


class _Attention(torch.autograd.Function):
    """softmax(q kᵀ / √H + bias) v in blocks of queries, with its derivative by hand: the weights are kept, everything
    else is computed in place. One block means that all keys are read by all queries."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, noise: Tensor | None, dropout: float, block: int):
        T, scale = q.shape[1], q.shape[2] ** -0.5
        out, weights = None if block >= T else torch.empty_like(q), []
        for start, end, seen in _blocks(T, k.shape[1], block):
            w = torch.baddbmm(bias[..., start:end, :seen], q[:, start:end], k[:, :seen].transpose(1, 2), alpha=scale)
            weights.append(w := w.softmax(-1))
            if noise is not None:
                w = kept(noise[:, start:end, :seen], dropout, w.dtype).mul_(w)
            y = torch.bmm(w, v[:, :seen])
            if out is None:
                out = y
            else:
                out[:, start:end] = y
        assert out is not None, "a sequence has at least one token"
        if noise is not None:
            out = out * kept_scale(dropout)     # T × H numbers, not T × S; checkpointing may keep the product
        ctx.save_for_backward(q, k, v, noise, *weights)
        ctx.dropout, ctx.block = dropout, block
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        q, k, v, noise, *weights = ctx.saved_tensors
        T, scale = q.shape[1], q.shape[2] ** -0.5
        if noise is not None:
            gradient = gradient * kept_scale(ctx.dropout)
        dq, dk, dv = torch.empty_like(q), None, None
        for (start, end, seen), w in reversed(list(zip(_blocks(T, k.shape[1], ctx.block), weights))):
            g = gradient[:, start:end]
            dw = torch.bmm(g, v[:, :seen].transpose(1, 2))
            dropped = w
            if noise is not None:
                keep = kept(noise[:, start:end, :seen], ctx.dropout, w.dtype)
                dw.mul_(keep)
                dropped = keep.mul_(w)
            ds = torch._softmax_backward_data(dw, w, -1, w.dtype)
            torch.mul(torch.bmm(ds, k[:, :seen]), scale, out=dq[:, start:end])
            dk_block = torch.bmm(ds.transpose(1, 2), q[:, start:end])
            dv_block = torch.bmm(dropped.transpose(1, 2), g)
            if dk is None or dv is None:    # the last block sees every key
                dk, dv = dk_block, dv_block
            else:
                dk[:, :seen] += dk_block
                dv[:, :seen] += dv_block
        assert dk is not None
        return dq, dk.mul_(scale), dv, None, None, None, None


def _blocks(T: int, S: int, block: int) -> list[tuple[int, int, int]]:
    """(first query, end, keys seen) of each block."""
    return [(start, min(start + block, T), S if block >= T else min(start + block, T)) for start in range(0, T, block)]

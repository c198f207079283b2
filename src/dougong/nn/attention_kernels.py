"""Softmax attention, several ways behind one signature; `choose_kernel` says which is used where.

A kernel takes `q_BNTH, k_BKSH, v_BKSH, mask, dropout=p` and returns `y_BNTH`; N is a multiple of K, and query
head n reads key/value head n // (N // K). `dropout` is the probability that applies now (0 outside training).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dougong.nn.dropout import dropout as drop
from dougong.nn.mask import Mask

Kernel = Callable[..., Tensor]

EXPLICIT_UP_TO = 512
"""Longest bf16 sequence on a CPU for which explicit products beat the fused kernel (measured: 31 ms against
74 ms forward and backward at batch 32, 4 heads of 64, T = 256, two Zen 5 cores; in fp32 the fused kernel
wins, 65 against 123). Beyond it the T × S scores cost more memory than they save time."""


def choose_kernel(q_BNTH: Tensor, k_BKSH: Tensor) -> Kernel:
    """Explicit products for bf16 on a CPU up to 512 keys, PyTorch's fused attention for all else."""
    short = k_BKSH.shape[2] <= EXPLICIT_UP_TO
    return explicit if q_BNTH.device.type == "cpu" and q_BNTH.dtype == torch.bfloat16 and short else fused


def fused(q_BNTH: Float[Tensor, "B N T H"], k_BKSH: Float[Tensor, "B K S H"],
          v_BKSH: Float[Tensor, "B K S H"], mask: Mask, *, dropout: float = 0.0) -> Float[Tensor, "B N T H"]:
    """PyTorch's `scaled_dot_product_attention`, which keeps no T × S scores where it has a fused form."""
    return F.scaled_dot_product_attention(
        q_BNTH, k_BKSH, v_BKSH, attn_mask=mask.bias, is_causal=mask.causal, dropout_p=dropout,
        enable_gqa=q_BNTH.shape[1] != k_BKSH.shape[1])


def explicit(q_BNTH: Float[Tensor, "B N T H"], k_BKSH: Float[Tensor, "B K S H"],
             v_BKSH: Float[Tensor, "B K S H"], mask: Mask, *,
             dropout: float = 0.0) -> Float[Tensor, "B N T H"]:
    """Scores, softmax and average as three operations; the heads of one group share a product."""
    B, N, T, H = q_BNTH.shape
    K, S = k_BKSH.shape[1:3]
    q = q_BNTH.reshape(B * K, N // K * T, H)
    k, v = k_BKSH.reshape(B * K, S, H), v_BKSH.reshape(B * K, S, H)
    bias = _grouped(mask, B, N, K, T, S, like=q)
    if bias is None:
        scores = torch.bmm(q * H**-0.5, k.transpose(1, 2))
    else:
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=H**-0.5)
    weights = drop(scores.softmax(-1), dropout, training=True)
    return torch.bmm(weights, v).view(B, N, T, H)


def _grouped(mask: Mask, B: int, N: int, K: int, T: int, S: int, *, like: Tensor) -> Tensor | None:
    """The bias for scores of shape (B·K, N/K·T, S), as small as broadcasting allows."""
    bias = mask.bias
    if mask.causal:
        bias = torch.full((1, 1, T, S), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)
    if bias is None:
        return None
    if bias.shape[:2] == (1, 1):
        return bias[0].repeat(1, N // K, 1)
    return bias.expand(B, N, T, S).reshape(B * K, N // K * T, S)

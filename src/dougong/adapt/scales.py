"""The scale of each group that loses least: a little clipping of the largest weight often helps all the others."""

import torch
from jaxtyping import Float
from torch import Tensor

from dougong.nn.quantized import dequantize, group_scale, round_to

_FACTORS = {8: (1.0,), 4: tuple(1.06 - 0.03 * step for step in range(16))}
"""times the scale that reaches the largest weight; at 8 bits nothing is gained"""


def best_scale(weight_OI: Float[Tensor, "O I"], bits: int, group: int | None,
               importance_I: Float[Tensor, " I"] | None = None) -> Float[Tensor, "O G"]:
    """float16 scales for which the squared error of the rounded weights, times the importance of their columns (None:
    all alike), is least over a grid of clippings and, at 4 bits, both signs (which decide the side that reaches 8)."""
    plain = group_scale(weight_OI, bits, group)
    weight, importance = weight_OI.float(), 1.0 if importance_I is None else importance_I.float()
    best, least = plain.half(), torch.full_like(plain, torch.inf)
    for sign in (1, -1) if bits == 4 else (1,):
        for factor in _FACTORS[bits]:
            scale = (plain * (sign * factor)).half()
            error_OI = (weight - dequantize(round_to(weight, scale, bits, group), scale, group)).square() * importance
            error = by_group(error_OI, group)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def by_group(values_OI: Float[Tensor, "O I"], group: int | None) -> Float[Tensor, "O G"]:
    """Sums over the columns of each group."""
    columns = values_OI.shape[1]
    place = torch.arange(columns, device=values_OI.device) // (group or max(1, columns))
    sums = torch.zeros(len(values_OI), int(place[-1]) + 1, dtype=values_OI.dtype, device=values_OI.device)
    return sums.index_add_(1, place, values_OI)

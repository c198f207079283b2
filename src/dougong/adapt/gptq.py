"""GPTQ: each column is rounded in turn, and the columns that are still free make up for its error.

Frantar et al. 2022, arXiv:2210.17323, algorithm 1. For a map y = W x the squared error of the outputs over calibration
inputs is tr(E H Eᵀ) with H = Σ x xᵀ. Rounding column i of W by an error e_i is best answered by moving the columns
after it by -e_i / U_ii · U_i,j, where U is the upper Cholesky factor of H⁻¹. Columns of large H_ii may go first
(`act_order`): they are rounded while most others are free; scales still belong to neighbouring columns, as the stored
form has it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dougong.adapt.calibrate import Moments, head_moments, layers
from dougong.adapt.quantize import matrices
from dougong.adapt.scales import best_scale
from dougong.data.batch import Batch
from dougong.models.heads import TiedHead
from dougong.nn.quantized import GROUP, dequantize, round_to, spread

DAMPING = 0.01
"""share of the mean of H's diagonal added to it: few inputs leave H near to singular"""
_LOOKED_UP = 0.1
"""the same for a table that is head and embedding at once: as an embedding its error enters the model as it is"""
_BLOCK = 128
"""columns after which the error is passed on to all columns that follow, as one product"""


def gptq(model: Any, batches: Sequence[Batch], *, bits: int, group: int | None = GROUP, damping: float = DAMPING,
         act_order: bool = True) -> dict[str, tuple[Tensor, Tensor]]:
    """Integers and scales of every linear map and table by module name; the model's weights become what these stand
    for. Tables that are only looked up are rounded: nothing says which of their columns matter more.

    Raises DataError where there are too few tokens.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    wanted = matrices(model)

    def settle(name: str, part: Any, integers: Tensor, scale: Tensor) -> None:
        found[name] = integers, scale
        part.weight.data = dequantize(integers, scale, group, part.weight.dtype)

    for name, table in tables(model).items():
        if name == "stem.tokens" and isinstance(model.head, TiedHead):
            settle(name, table, *solve(table.weight.detach(), head_moments(model, batches), bits, group,
                                       damping=_LOOKED_UP, act_order=act_order))
        else:
            scale = best_scale(table.weight.detach(), bits, group)
            settle(name, table, round_to(table.weight.detach(), scale, bits, group), scale)
    for layer in layers(model, batches):
        for together, moments in layer.maps():
            for name, linear in together.items():
                if name not in wanted:
                    continue
                settle(name, linear, *solve(linear.weight.detach(), moments, bits, group, damping=damping,
                                            act_order=act_order))
    if not isinstance(model.head, TiedHead):
        settle("head", model.head, *solve(model.head.weight.detach(), head_moments(model, batches), bits, group,
                                          damping=damping, act_order=act_order))
    return found


def tables(model: Any) -> dict[str, Any]:
    """The embeddings of tokens, by module name."""
    values = {f"stem.values.{name}": part for name, part in model.stem.values.items()}
    return {"stem.tokens": model.stem.tokens, **values}


def solve(weight_OI: Float[Tensor, "O I"], moments: Moments, bits: int, group: int | None, *, damping: float = DAMPING,
          act_order: bool = True) -> tuple[Int[Tensor, "O I"], Float[Tensor, "O G"]]:
    """Integers (int8) and float16 scales of one map. The scales are those of the weights before anything moved, each
    the best for its group by H's diagonal."""
    home, products = weight_OI.device, moments.products
    if home.type == "mps":      # it has no float64
        weight_OI, products = weight_OI.cpu(), products.cpu()
    products, weight = products.double(), weight_OI.double()
    diagonal = products.diagonal()
    scale_OG = best_scale(weight_OI, bits, group, diagonal)
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(diagonal),
                                                                                           device=weight.device)
    factor = inverse_factor(products[order][:, order], damping)
    scale_OI = spread(scale_OG.double(), weight.shape[1], group)[:, order]
    integers = solve_in_order(weight[:, order], scale_OI, factor, bits)
    return torch.empty_like(integers).index_copy_(1, order, integers).to(home), scale_OG.to(home)


def inverse_factor(products_II: Float[Tensor, "I I"], damping: float) -> Float[Tensor, "I I"]:
    """U, upper, with Uᵀ U = (H + λ I)⁻¹, λ a share of the mean diagonal. An input that was never there counts as one
    of no dependence on the others."""
    H = products_II.clone()
    H.diagonal().add_(damping * H.diagonal().mean().clamp(min=torch.finfo(H.dtype).tiny))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)


def solve_in_order(weight_OI: Float[Tensor, "O I"], scale_OI: Float[Tensor, "O I"], factor_II: Float[Tensor, "I I"],
                   bits: int) -> Int[Tensor, "O I"]:
    """Algorithm 1: the columns in the order given, error passed on within a block at once and beyond it at its end."""
    weight, columns = weight_OI.clone(), weight_OI.shape[1]
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        errors = torch.zeros_like(weight[:, begin:end])
        for i in range(begin, end):
            column, scale = weight[:, i:i + 1], scale_OI[:, i:i + 1]
            integers[:, i:i + 1] = round_to(column, scale, bits)
            error = (column - integers[:, i:i + 1] * scale) / factor_II[i, i]
            weight[:, i:end] -= error * factor_II[i, i:end]
            errors[:, i - begin:i - begin + 1] = error
        weight[:, end:] -= errors @ factor_II[begin:end, end:]
    return integers

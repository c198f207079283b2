"""AWQ: columns that read large inputs are scaled up before rounding, and what makes these inputs is scaled down.

Lin et al. 2023, arXiv:2306.00978. W x = (W diag(s)) (x / s); the error of rounding W diag(s) is then divided by s, so
columns of large s keep more of their precision. s = (mean |x|)^α, and α is the one of a grid for which the outputs on
calibration text change least. Dividing x by s costs nothing where it can be folded exactly into what comes before: the
scale of a norm, the rows of `value` before `output` and of `up` before `down`. Where it cannot, s is 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dougong.adapt.calibrate import Layer, Linears, Moments, head_moments, layers
from dougong.adapt.gptq import tables
from dougong.adapt.quantize import matrices
from dougong.adapt.scales import best_scale
from dougong.data.batch import Batch
from dougong.models.heads import TiedHead
from dougong.models.stack import PostNormBlock
from dougong.nn.attention import Attention
from dougong.nn.feed_forward import FeedForward, ReLU2, SwiGLU
from dougong.nn.norm import LayerNorm, RMSNorm
from dougong.nn.quantized import GROUP, dequantize, round_to

_GRID = tuple(step / 20 for step in range(21))
"""values of α; 0 leaves everything as it is"""
Fold = Callable[[Tensor], None]
"""divides what enters a map by s, in the parts before it"""


def awq(model: Any, batches: Sequence[Batch], *, bits: int, group: int | None = GROUP,
        ) -> dict[str, tuple[Tensor, Tensor]]:
    """Integers and scales of every linear map and table by module name; the model's weights become what these stand
    for, and its norms take up what was divided. Raises DataError where there are too few tokens."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    wanted = matrices(model)

    def settle(name: str, part: Any, importance: Tensor | None) -> None:
        weight = part.weight.detach()
        scale = best_scale(weight, bits, group, importance)
        found[name] = round_to(weight, scale, bits, group), scale
        part.weight.data = dequantize(*found[name], group, weight.dtype)

    for name, table in tables(model).items():
        read_back = name == "stem.tokens" and isinstance(model.head, TiedHead)
        settle(name, table, _of_table(head_moments(model, batches)) if read_back else None)
    for layer in layers(model, batches):
        for linears, importance in scale_layer(layer, bits, group):
            for name in linears.keys() & wanted.keys():
                settle(name, linears[name], importance)
    if not isinstance(model.head, TiedHead):
        settle("head", model.head, head_moments(model, batches).products.diagonal())
    return found


def _of_table(moments: Moments) -> Tensor:
    """Importance of the columns of a table that is head and embedding at once."""
    diagonal = moments.products.diagonal()
    return diagonal + diagonal.mean()


@torch.no_grad()
def scale_layer(layer: Layer, bits: int, group: int | None) -> list[tuple[Linears, Tensor]]:
    """Scales the columns of a layer's maps and folds the division into what comes before: its function stays the same.
    Returns its maps with the mean square of each input after that."""
    block = layer.model.stack[layer.name]
    measured = list(layer.maps())
    scaled = []
    for linears, moments in measured:
        s = torch.ones_like(moments.magnitude)
        fold, shared = foldable(block, linears)
        if fold is not None:
            s = shared(best_power([part.weight for part in linears.values()], moments, bits, group, shared))
            for part in linears.values():
                part.weight.mul_(s.to(part.weight.dtype))
            fold(s)
        scaled.append((linears, moments.products.diagonal() / s.square()))
    return scaled


def best_power(weights: Sequence[Tensor], moments: Moments, bits: int, group: int | None,
               shared: Callable[[Tensor], Tensor]) -> Float[Tensor, " I"]:
    """The scales of least error tr(E H Eᵀ), summed over the maps that read these inputs."""
    mean = (moments.magnitude / moments.count).clamp(min=1e-8)
    best, least = torch.ones_like(mean), torch.inf
    for power in _GRID:
        s = mean.pow(power)
        s = shared(s / (s.max() * s.min()).sqrt())
        importance = moments.products.diagonal() / s.square()
        error = 0.0
        for weight in weights:
            scale = best_scale(weight * s, bits, group, importance)
            lost = weight - dequantize(round_to(weight * s, scale, bits, group), scale, group) / s
            error += float((lost.float() @ moments.products * lost).sum())
        if error < least:
            best, least = s, error
    return best


def foldable(block: Any, linears: Linears) -> tuple[Fold | None, Callable[[Tensor], Tensor]]:
    """How to divide what enters these maps, or None where no part before them can take it exactly; and what makes
    scales fit (channels that are copies of one share theirs)."""
    attention, feed_forward = block.attention, block.feed_forward
    kinds = set(linears.values())
    if type(attention) is Attention and attention.query in kinds:
        return _into_norm(block, block.attention_norm), _as_they_are
    if type(attention) is Attention and attention.output in kinds and attention.value_gate is None:
        return _into_values(attention), lambda s: _shared_by_heads(attention, s)
    if isinstance(feed_forward, SwiGLU | FeedForward) and feed_forward.up in kinds:
        return _into_norm(block, block.feed_forward_norm), _as_they_are
    if isinstance(feed_forward, SwiGLU) and feed_forward.down in kinds:
        return lambda s: _divide_rows(feed_forward.up, s), _as_they_are
    if isinstance(feed_forward, FeedForward) and feed_forward.down in kinds and isinstance(feed_forward.activation,
                                                                                          ReLU2):
        return lambda s: _divide_rows(feed_forward.up, s.sqrt()), _as_they_are    # relu(a x)² = a² relu(x)²
    return None, _as_they_are


def _as_they_are(s: Tensor) -> Tensor:
    return s


def _into_norm(block: Any, norm: Any) -> Fold | None:
    if isinstance(block, PostNormBlock) or not isinstance(norm, RMSNorm | LayerNorm) or norm.weight is None:
        return None

    def fold(s: Tensor) -> None:
        for parameter in norm.parameters():
            parameter.div_(s.to(parameter.dtype))

    return fold


def _into_values(attention: Attention) -> Fold:
    """`output` reads, of every query head, a mixture of the values of its kv head."""
    def fold(s: Tensor) -> None:
        s_KGH = s.unflatten(0, (attention.num_kv_heads, -1, attention.head_dim))
        _divide_rows(attention.value, s_KGH[:, 0].flatten())

    return fold


def _shared_by_heads(attention: Attention, s: Tensor) -> Tensor:
    """The geometric mean over the query heads that read the same values."""
    s_KGH = s.unflatten(0, (attention.num_kv_heads, -1, attention.head_dim))
    return s_KGH.log().mean(1, keepdim=True).exp().expand_as(s_KGH).flatten()


def _divide_rows(linear: Any, s: Tensor) -> None:
    linear.weight.div_(s.to(linear.weight.dtype)[:, None])
    if linear.bias is not None:
        linear.bias.div_(s.to(linear.bias.dtype))

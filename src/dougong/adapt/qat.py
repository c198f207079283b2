"""Training of weights that know they will be rounded: each forward uses what the integers stand for.

Fake quantisation with a straight-through gradient (Bengio et al. 2013, arXiv:1308.3432; Jacob et al. 2017,
arXiv:1712.05877, section 3): the forward computes with the rounded weights, the gradient goes to the float weights as
if they were the same, but for those that lie outside the integers' range. The scales follow the weights, by the rule of
`quantize`; so `dougong compress --method rtn` with the same bits and group gives exactly the model that was trained.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from dougong.core.config import config
from dougong.core.errors import ConfigError
from dougong.models.heads import Head
from dougong.nn.embedding import Embedding
from dougong.nn.linear import Linear
from dougong.nn.quantized import GROUP, dequantize, group_scale, quantize, round_to, spread
from dougong.nn.ranges import Count


@config
class QATConfig:
    """Every linear map and table is rounded in each forward; all weights are trained."""

    kind: Literal["qat"] = "qat"
    bits: Literal[4, 8] = 4
    """of the integers that the weights will be"""
    group: Count | None = GROUP
    """columns that share a scale; null: a whole row"""

    @property
    def whole(self) -> bool:
        """A checkpoint holds every weight, so a run can be opened without its start."""
        return True

    def apply(self, model: nn.Module, *, seed: int = 0) -> None:
        """In place: parts keep their parameters, names and places, and compute otherwise. Nothing is drawn."""
        parts: list[Any] = [part for part in model.modules() if type(part) in _ROUNDED]
        if not parts:
            raise ConfigError("adapt.kind=qat rounds this project's linear maps and embeddings, and there are none in "
                              f"{type(model).__name__}.")
        for part in parts:
            part.__class__ = _ROUNDED[type(part)]
            part.rounding = (self.bits, self.group)

    @torch.no_grad()
    def merge(self, model: nn.Module) -> None:
        """In place: plain parts whose weights are what the integers stand for; the same of a model that was never
        applied, into which a checkpoint was read."""
        plain = {rounding: part for part, rounding in _ROUNDED.items()}
        parts: list[Any] = [part for part in model.modules() if type(part) in _ROUNDED or type(part) in plain]
        for part in parts:
            if type(part) in plain:
                part.__class__ = plain[type(part)]
                del part.rounding
            part.weight.copy_(dequantize(*quantize(part.weight, self.bits, self.group), self.group, part.weight.dtype))


class FakeQuantised(torch.autograd.Function):
    """What the integers of a weight stand for. The gradient passes to every weight whose nearest integer exists: at 4
    bits the side opposite to a group's largest weight ends at 7 steps, and what lies beyond changes nothing."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, bits: int, group: int | None) -> Tensor:
        exact_OG = group_scale(weight_OI, bits, group)
        if bits == 4:
            steps_OI = weight_OI / spread(exact_OG, weight_OI.shape[1], group)      # NaN where a group is all zeros
            ctx.save_for_backward((steps_OI >= _BEYOND).logical_not())
        return dequantize(round_to(weight_OI, exact_OG, bits, group), exact_OG.half(), group, weight_OI.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (inside,) = ctx.saved_tensors or (None,)
        return gradient if inside is None else gradient * inside, None, None


class _Rounded:
    """Stands before a part's class: who reads its `weight`, a head tied to it too, gets the rounded one. The parameter
    itself stays what optimiser and checkpoints know by that name."""

    rounding: tuple[int, int | None]
    _parameters: dict[str, Any]

    @property
    def weight(self) -> Tensor:
        return FakeQuantised.apply(self._parameters["weight"], *self.rounding)  # type: ignore[return-value]


class RoundedLinear(_Rounded, Linear):
    """`Linear` of rounded weights."""


class RoundedEmbedding(_Rounded, Embedding):
    """`Embedding` of rounded rows."""


class RoundedHead(_Rounded, Head):
    """`Head` of rounded weights."""


_ROUNDED: dict[type, type] = {Linear: RoundedLinear, Embedding: RoundedEmbedding, Head: RoundedHead}
_BEYOND = 7.5

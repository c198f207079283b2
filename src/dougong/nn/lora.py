"""Frozen linear maps with a low-rank map learned beside them: LoRA (Hu et al. 2021, arXiv:2106.09685) and DoRA.

    y = x Wᵀ + s · (x Aᵀ) Bᵀ + b        W frozen; A (R x I) and B (O x R) trained, B from 0; s = alpha / R

DoRA (Liu et al. 2024, arXiv:2402.09353) learns the length m of each row too: with V = W + s B A, the weight is m V/‖V‖,
‖V‖ taken as a constant on the way back (its section 4.3). W keeps its name, so that weights of the model as it was load
as they did; it may also be integers (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), computed anew at each product.

M rows, I inputs, O outputs, R rank.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dougong.nn.dropout import dropout
from dougong.nn.init import ONES, ZEROS, FanIn
from dougong.nn.linear import Linear
from dougong.nn.quantized import QuantizedLinear
from dougong.runtime.parts import local

_UNIFORM = 3 ** -0.5
"""A begins with the variance of a uniform draw from ±1/√I, which PEFT makes"""


class LowRank(nn.Module):
    """What is learned beside a frozen linear map, whatever holds the weight; mixed into a class that has one.

    `active` False leaves the frozen map alone: the model as it was before.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    bias: nn.Parameter | None
    init: dict[str, Any]
    in_features: int
    out_features: int

    def learn(self, rank: int, *, factor: float, dropout: float, like: Tensor) -> None:
        """Adds the parameters, unfilled, on the device of `like` and in its type."""
        options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, **options))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, rank, **options))
        self.init = {**self.init, "lora_a": FanIn(_UNIFORM), "lora_b": ZEROS}
        self.rank, self.factor, self.dropout, self.active = rank, factor, dropout, True

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self.product(x, self.bias) if self.active else super().forward(x)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        low = dropout(x, self.dropout, training=True) if self.dropout and self.training else None
        weight = self.held(x.dtype)
        return _Product.apply(x, low, weight, self if weight is None else None,  # type: ignore[return-value]
                              None if bias is None else bias.to(x.dtype), self.lora_a.to(x.dtype),
                              self.lora_b.to(x.dtype), self.factor)

    def held(self, dtype: torch.dtype) -> Tensor | None:
        """The frozen weight, where it is a tensor; None where `dequantize` makes it."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The frozen weight (O I)."""
        raise NotImplementedError

    @torch.no_grad()
    def whole(self) -> Float[Tensor, "O I"]:
        """`W + s B A`, summed in float32 at least."""
        wide = torch.promote_types(self.lora_a.dtype, torch.float32)
        return torch.addmm(self.dequantize(wide), self.lora_b.to(wide), self.lora_a.to(wide), alpha=self.factor)

    @torch.no_grad()
    def exactly(self, x: Float[Tensor, "M in"]) -> Float[Tensor, "M out"]:
        """By the formula, in the precision of x, in evaluation."""
        y = self.product_of(x)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def product_of(self, x: Tensor) -> Tensor:
        """`x Wᵀ + s (x Aᵀ) Bᵀ`, operation by operation."""
        a, b = self.lora_a.to(x.dtype), self.lora_b.to(x.dtype)
        return x @ self.dequantize(x.dtype).t() + self.factor * (x @ a.t()) @ b.t()

    @torch.no_grad()
    def merged(self) -> Linear:
        """One plain linear map that computes the same."""
        made = _empty(Linear, self.in_features, self.out_features, bias=self.bias is not None)
        made.weight = nn.Parameter(self.whole().to(self.lora_a.dtype))
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().to(self.lora_a.dtype))
        made.init |= {name: rule for name, rule in self.init.items() if name in made.init}
        return made.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank {self.rank}, factor {self.factor:g}"


class LowRankRows(LowRank):
    """DoRA: the rows' lengths are learned apart from their directions."""

    magnitude: nn.Parameter

    def learn(self, rank: int, *, factor: float, dropout: float, like: Tensor) -> None:
        super().learn(rank, factor=factor, dropout=dropout, like=like)
        self.magnitude = nn.Parameter(torch.empty(self.out_features, device=like.device, dtype=like.dtype))
        self.init |= {"magnitude": ONES}

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """The lengths that the frozen rows have, so that nothing changes at first."""
        rows = local(self.dequantize(self.magnitude.dtype))
        local(self.magnitude).copy_(torch.linalg.vector_norm(rows, dim=1))

    @torch.no_grad()
    def stretch(self) -> Float[Tensor, " O"]:
        """m / ‖V‖ is what each row is multiplied with; here 1 / ‖V‖."""
        return _inverse(torch.linalg.vector_norm(super().whole(), dim=1))

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = super().product(x, None) * (self.magnitude * self.stretch()).to(x.dtype)
        return y if bias is None else y + bias.to(x.dtype)

    def product_of(self, x: Tensor) -> Tensor:
        directions = self.dequantize(x.dtype) + self.factor * self.lora_b.to(x.dtype) @ self.lora_a.to(x.dtype)
        return super().product_of(x) * (self.magnitude.to(x.dtype) * _inverse(directions.norm(dim=1)))

    @torch.no_grad()
    def whole(self) -> Float[Tensor, "O I"]:
        return super().whole() * (self.magnitude * self.stretch())[:, None]


class LoRALinear(LowRank, Linear):
    """LoRA over a weight of floating-point numbers."""

    @classmethod
    def over(cls, part: Linear, rank: int, *, factor: float, dropout: float, bits: int | None = None) -> "LoRALinear":
        made = _empty(cls, part.in_features, part.out_features, bias=part.bias is not None)
        made.weight, made.bias, made.init = part.weight, part.bias, part.init
        made.learn(rank, factor=factor, dropout=dropout, like=part.weight)
        return made.train(part.training)

    def held(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.weight.detach().to(dtype)


class DoRALinear(LowRankRows, LoRALinear):
    """DoRA over a weight of floating-point numbers."""


class QuantizedLoRALinear(LowRank, QuantizedLinear):
    """LoRA over integers: the frozen weight is made for each product, forward and backward, and kept by none."""

    @classmethod
    def over(cls, part: Linear, rank: int, *, factor: float, dropout: float, bits: int) -> "QuantizedLoRALinear":
        made: Any = _empty(cls, part.in_features, part.out_features, bits=bits, bias=part.bias is not None) \
            if part.weight.is_meta else cls.from_linear(part, bits)
        made.bias, made.init = part.bias, {"bias": ZEROS}
        for name in ("values", "scale"):    # the start's weights, rounded: a checkpoint of the adapter leaves them out
            made.register_buffer(name, made._buffers.pop(name), persistent=False)
        made.learn(rank, factor=factor, dropout=dropout, like=part.weight)
        return made.train(part.training)

    def held(self, dtype: torch.dtype) -> None:
        return None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return QuantizedLinear.dequantize(self, dtype)


class QuantizedDoRALinear(LowRankRows, QuantizedLoRALinear):
    """DoRA over integers."""


def _inverse(lengths: Tensor) -> Tensor:
    """0 for a row of zeros, which has no direction and stays one."""
    return 1 / lengths.masked_fill(lengths == 0, torch.inf)


def _empty(kind: Any, *sizes: int, **options: Any) -> Any:
    with torch.device("meta"):
        return kind(*sizes, **options)


class _Product(torch.autograd.Function):
    """`x Wᵀ + b + s (low Aᵀ) Bᵀ`, with `low` = x where it is None.

    Composed of PyTorch's own operations this takes two passes more over the outputs and one over the inputs' gradient,
    which at these ranks cost as much as the low-rank products. W has no gradient, so x is kept for A alone.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor | None, weight: Tensor | None, owner: LowRank | None,
                bias: Tensor | None, a: Tensor, b: Tensor, factor: float) -> Tensor:
        rows = x.flatten(0, -2)
        low_rows = rows if low is None else low.flatten(0, -2)
        h = low_rows @ a.t()
        frozen = owner.dequantize(x.dtype) if owner is not None else weight
        y = _add_product(F.linear(rows, frozen, bias), h, b.t(), factor)    # type: ignore[arg-type]
        ctx.save_for_backward(low_rows, weight, a, b, h)
        ctx.owner, ctx.factor, ctx.apart, ctx.shape = owner, factor, low is not None, x.shape
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        low_rows, weight, a, b, h = ctx.saved_tensors
        g = gradient.flatten(0, -2)
        gb = (g @ b) * ctx.factor
        dx = dlow = dbias = None
        if ctx.needs_input_grad[0]:
            dx = g @ (weight if ctx.owner is None else ctx.owner.dequantize(g.dtype))
            if not ctx.apart:
                dx.addmm_(gb, a)
            dx = dx.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dlow = (gb @ a).view(ctx.shape)
        if ctx.needs_input_grad[4]:
            dbias = g.sum(0)
        return dx, dlow, None, None, dbias, gb.t() @ low_rows, (h.t() @ g).t() * ctx.factor, None


def _add_product(y: Tensor, h: Tensor, b: Tensor, factor: float) -> Tensor:
    """`y + factor h b`: into y, unless something watches that keeps y for later (selective checkpointing)."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return torch.addmm(y, h, b, alpha=factor)
    return y.addmm_(h, b, alpha=factor)


PARAMETERS = ("lora_a", "lora_b", "magnitude")


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.rpartition(".")[2] in PARAMETERS


def adapters(model: nn.Module) -> dict[str, LowRank]:
    """The adapted maps of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRank)}


def replace_part(model: nn.Module, name: str, part: nn.Module) -> None:
    """Puts a part into the place of that name."""
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._modules[leaf] = part


def merge_adapters(model: nn.Module) -> nn.Module:
    """Turns every adapted map into the plain one that computes the same, in place."""
    for name, part in adapters(model).items():
        replace_part(model, name, part.merged())
    return model


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it was before it was adapted, inside the block: a reference that costs no memory. What else is
    trained (`also`) stays as it is."""
    parts = adapters(model).values()
    before = [part.active for part in parts]
    for part in parts:
        part.active = False
    try:
        yield model
    finally:
        for part, active in zip(parts, before):
            part.active = active

"""Linear maps and embeddings whose weights are integers with a scale for each group: 8 or 4 bits instead of 32.

The form is plain, so that a file of it can be read by anyone and for ever; kernels have orders of their own, which
are made from it when a model is opened for decoding (`generate/packed.py`) and are never stored. Row o, column i:

    weight[o, i] = integer[o, i] * scale[o, i // group]

`values` holds the integers: at 8 bits an int8 each, at 4 bits two in a byte, column 2j in the low half of byte j and
column 2j + 1 in the high one, each plus 8. `scale` is float16. There is no zero point: at 8 bits the largest magnitude
of a group becomes ±127, at 4 bits the scale takes the sign with which the largest becomes -8, so all 16 integers are
used. These are the roundings of GGUF's q8_0 and q4_0; with groups of 32 integers and scales are theirs, bit for bit.

O outputs (or rows of a table), I inputs (columns), G = ceil(I / group) groups in a row; the last may be shorter.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor, nn

from dougong.core.errors import ConfigError
from dougong.nn.init import ZEROS

BITS = (4, 8)
GROUP = 32
"""columns that share a scale, unless asked otherwise: GGUF's block"""
Activations = Literal["float", "int8"]
_LARGEST = {8: 127, 4: -8}
_OFFSET = 8
"""what is added to an integer of 4 bits so that it is stored without a sign"""
_ACTIVATION_OFFSET = 128
_SMALLEST = 1e-30   # of a row's magnitudes: a row of zeros stays one


def group_scale(weight_OI: Float[Tensor, "O I"], bits: int, group: int | None = GROUP) -> Float[Tensor, "O G"]:
    """The scale of each group in float32, before it is rounded to float16: what makes its largest magnitude ±127 (8
    bits) or -8 (4 bits). 0 where all of a group is 0. `group` None: a whole row. Raises ConfigError for other bits."""
    if bits not in BITS:
        raise ConfigError(f"bits={bits}: weights of {' or '.join(map(str, BITS))} bits are known.")
    grouped_OGi = _grouped(weight_OI.float(), group)
    place_OG1 = grouped_OGi.abs().argmax(-1, keepdim=True)
    largest_OG = grouped_OGi.gather(-1, place_OG1).squeeze(-1)
    return (largest_OG.abs() if bits == 8 else largest_OG) / _LARGEST[bits]


def quantize(weight_OI: Float[Tensor, "O I"], bits: int, group: int | None = GROUP,
             ) -> tuple[Int8[Tensor, "O I"], Float[Tensor, "O G"]]:
    """Round to nearest: int8 integers (one each, also at 4 bits) and float16 scales.

    Raises ConfigError for weights that are not finite or whose scale float16 cannot hold.
    """
    exact_OG = group_scale(weight_OI, bits, group)
    scale_OG = exact_OG.half()
    if not scale_OG.isfinite().all():
        raise ConfigError(f"a weight is {weight_OI.abs().max().item():.3g}; scales are float16, which at {bits} bits "
                          f"holds weights up to {abs(_LARGEST[bits]) * 65504:,}. The training may have diverged.")
    return round_to(weight_OI, exact_OG, bits, group), scale_OG


def round_to(weight_OI: Float[Tensor, "O I"], scale_OG: Float[Tensor, "O G"], bits: int,
             group: int | None = GROUP) -> Int8[Tensor, "O I"]:
    """The nearest integers to `weight / scale`, int8, within the range of so many bits; 0 where the scale is 0."""
    inverse_OG = torch.where(scale_OG == 0, 0.0, 1 / scale_OG.float())
    scaled_OI = weight_OI.float() * spread(inverse_OG, weight_OI.shape[1], group)
    if bits == 8:   # a half goes away from 0, as C's roundf: torch.round would take it to the even integer
        magnitude_OI = scaled_OI.abs()
        whole_OI = magnitude_OI.floor()
        return (scaled_OI.sign() * (whole_OI + (2 * (magnitude_OI - whole_OI)).floor())).clamp(-127, 127).to(torch.int8)
    return ((scaled_OI + (_OFFSET + 0.5)).trunc().clamp(0, 15) - _OFFSET).to(torch.int8)


def dequantize(integers_OI: Int8[Tensor, "O I"], scale_OG: Float[Tensor, "O G"], group: int | None = GROUP,
               dtype: torch.dtype = torch.float32) -> Float[Tensor, "O I"]:
    """The weights that the integers stand for. In float32 they are exact: 8 bits times the 11 of a float16 fit."""
    wide = torch.promote_types(dtype, torch.float32)
    rows, columns = integers_OI.shape
    if columns == 0 or columns % (group or columns):
        return (integers_OI.to(wide) * spread(scale_OG.to(wide), columns, group)).to(dtype)
    grouped_OGi = integers_OI.to(wide).view(rows, scale_OG.shape[1], group or columns)
    return grouped_OGi.mul_(scale_OG.to(wide)[..., None]).view(rows, columns).to(dtype)


def quantize_rows(x: Float[Tensor, "*batch I"]) -> tuple[UInt8[Tensor, "*batch I"], Float[Tensor, "*batch 1"]]:
    """Activations as integers of 8 bits: each row's largest magnitude becomes 127 of its own scale, so what a row gives
    does not depend on the rows beside it. Stored plus 128, as the kernels want them; the scale is in the precision of
    `x`, at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = torch.linalg.vector_norm(x, torch.inf, -1, True).clamp_(min=_SMALLEST)
    return torch.addcmul(_half_above(x), x, 127 / largest).to(torch.uint8), largest / 127


def _half_above(like: Tensor) -> Tensor:
    """128.5: what makes cutting off a positive number the rounding of a signed one."""
    return torch.full((), _ACTIVATION_OFFSET + 0.5, dtype=like.dtype, device=like.device)


def spread(scale_OG: Tensor, columns: int, group: int | None) -> Float[Tensor, "O I"]:
    """What holds for a group, for each of its columns."""
    return scale_OG.repeat_interleave(group or max(1, columns), dim=1)[:, :columns]


def _grouped(weight_OI: Tensor, group: int | None) -> Float[Tensor, "O G i"]:
    """Columns by groups; zeros fill up the last, where they change no largest magnitude."""
    columns = weight_OI.shape[1]
    group = group or max(1, columns)
    return F.pad(weight_OI, (0, -columns % group)).unflatten(1, (-1, group))


def halves_to_bytes(integers_OI: Int8[Tensor, "O I"]) -> UInt8[Tensor, "O bytes"]:
    """Integers of 4 bits two to a byte; an odd row ends with a half that holds 0."""
    stored_OI = F.pad((integers_OI + _OFFSET).to(torch.uint8), (0, integers_OI.shape[1] % 2), value=_OFFSET)
    return stored_OI[:, 0::2] | (stored_OI[:, 1::2] << 4)


def bytes_to_halves(values: UInt8[Tensor, "O bytes"], columns: int) -> Int8[Tensor, "O I"]:
    """The inverse, as int8."""
    return torch.stack([values & 15, values >> 4], -1).flatten(1)[:, :columns].to(torch.int8) - _OFFSET


class Quantized(nn.Module):
    """A matrix of integers and scales. Both are buffers: nothing trains them.

    `integers` (int8, one each) and `weight` (float32) are made anew at each call. With `activations="int8"` what is
    multiplied by the matrix is rounded to integers too, row by row; that takes 8 bits and one scale for a whole row
    (`group` None), so that the product is one of integers.
    """

    values: Tensor
    scale: Tensor

    def __init__(self, rows: int, columns: int, bits: int, group: int | None, activations: Activations) -> None:
        super().__init__()
        if bits not in BITS or (group is not None and group < 1):
            raise ConfigError(f"bits={bits}, group={group}: weights of {' or '.join(map(str, BITS))} bits are known, "
                              "in groups of at least 1 column (null: a whole row).")
        if activations == "int8" and (bits != 8 or group is not None):
            raise ConfigError(f"activations=int8 with bits={bits}, group={group}: a product of integers needs weights "
                              "of 8 bits with one scale a row. Try bits=8 group=null, or activations=float.")
        self.shape, self.bits, self.group, self.activations = (rows, columns), bits, group, activations
        values = torch.zeros(rows, columns, dtype=torch.int8) if bits == 8 else \
            torch.full((rows, -(-columns // 2)), _OFFSET * 17, dtype=torch.uint8)
        self.register_buffer("values", values)
        self.register_buffer("scale", torch.zeros(rows, -(-columns // (group or max(1, columns))), dtype=torch.float16))

    @property
    def integers(self) -> Int8[Tensor, "O I"]:
        return self.values if self.bits == 8 else bytes_to_halves(self.values, self.shape[1])

    @property
    def weight(self) -> Float[Tensor, "O I"]:
        return self.dequantize(torch.float32)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for a weight, scales included."""
        stored = sum(buffer.numel() * buffer.element_size() for buffer in (self.values, self.scale))
        return 8 * stored / max(1, self.shape[0] * self.shape[1])

    def dequantize(self, dtype: torch.dtype) -> Float[Tensor, "O I"]:
        return dequantize(self.integers, self.scale, self.group, dtype)

    def product(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        """`x Wᵀ` in the precision of `x`. The gradient reaches `x`, past the rounding of activations as if there were
        none. For the way back the weights are computed once more instead of kept, so an adapter trained over them
        costs no float copy of the model."""
        return _Product.apply(x, self)  # type: ignore[return-value]

    @torch.no_grad()
    def set(self, integers_OI: Int8[Tensor, "O I"], scale_OG: Float[Tensor, "O G"]) -> None:
        """Takes integers (int8, one each) and their scales, however they were found."""
        low, high = (-127, 127) if self.bits == 8 else (-_OFFSET, 7)
        assert integers_OI.shape == self.shape and scale_OG.shape == self.scale.shape
        assert integers_OI.numel() == 0 or (integers_OI.min() >= low and integers_OI.max() <= high)
        self.values.copy_(integers_OI if self.bits == 8 else halves_to_bytes(integers_OI))
        self.scale.copy_(scale_OG)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves to devices, but scales stay float16: a model that is cast to bf16 keeps its weights."""
        before = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != before.dtype:
            self.scale = before.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}, {self.bits} bits, groups of {self.group or self.shape[1]}" + (
            ", int8 activations" if self.activations == "int8" else "")


class QuantizedLinear(Quantized):
    """`Linear` over integers: `y = x Wᵀ + b` in the precision of `x`, on any device."""

    def __init__(self, in_features: int, out_features: int, *, bits: int, group: int | None = GROUP,
                 activations: Activations = "float", bias: bool = False) -> None:
        super().__init__(out_features, in_features, bits, group, activations)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.init = {"bias": ZEROS}

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int, group: int | None = GROUP,
                    activations: Activations = "float") -> "QuantizedLinear":
        """Rounds a linear map's weights to the nearest; its bias is kept as it is."""
        integers_OI, scale_OG = quantize(linear.weight.detach(), bits, group)
        return cls.from_integers(integers_OI, scale_OG, bits=bits, group=group, activations=activations,
                                 bias=linear.bias)

    @classmethod
    def from_integers(cls, integers_OI: Int8[Tensor, "O I"], scale_OG: Float[Tensor, "O G"], *, bits: int,
                      group: int | None = GROUP, activations: Activations = "float",
                      bias: Tensor | None = None) -> "QuantizedLinear":
        """Of integers found by another method; int8, one each."""
        with torch.device(integers_OI.device):
            made = cls(integers_OI.shape[1], integers_OI.shape[0], bits=bits, group=group, activations=activations,
                       bias=bias is not None)
        made.set(integers_OI, scale_OG)
        if bias is not None and made.bias is not None:
            made.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return made

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        y = self.product(x)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class _Product(torch.autograd.Function):
    """`x Wᵀ`, and `g W` back. Nothing of `x` is kept, since integers have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Quantized) -> Tensor:
        ctx.part = part
        if part.activations == "int8":
            integers, scale = quantize_rows(x)
            wide = (integers.to(scale.dtype) - _ACTIVATION_OFFSET) * scale
            return F.linear(wide, part.dequantize(wide.dtype)).to(x.dtype)
        return F.linear(x, part.dequantize(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ ctx.part.dequantize(gradient.dtype), None


class QuantizedEmbedding(Quantized):
    """`Embedding` over integers: looks up a row and computes it in float32. A head tied to it uses its `product`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, bits: int, group: int | None = GROUP,
                 activations: Activations = "float") -> None:
        super().__init__(num_embeddings, embedding_dim, bits, group, activations)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, bits: int, group: int | None = GROUP,
                       activations: Activations = "float") -> "QuantizedEmbedding":
        integers_OI, scale_OG = quantize(embedding.weight.detach(), bits, group)
        with torch.device(integers_OI.device):
            made = cls(*integers_OI.shape, bits=bits, group=group, activations=activations)
        made.set(integers_OI, scale_OG)
        return made

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:
        values, scale = F.embedding(ids.flatten(), self.values), F.embedding(ids.flatten(), self.scale)
        integers = values if self.bits == 8 else bytes_to_halves(values, self.embedding_dim)
        return dequantize(integers, scale, self.group).unflatten(0, ids.shape)

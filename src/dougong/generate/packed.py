"""Products with weights of integers, in the forms this CPU is fast with; made when a model is opened, never stored.

PyTorch's CPU kernels and what each is good for, one thread of an Ice Lake Xeon (AVX-512 VNNI, no bf16 arithmetic), all
matrices of a 91M Qwen3 for one row and for 16 (`benchmarks/decoding.py` gives whole models):

    groups, 4 bits    6.7 ms    49 ms   `_weight_int4pack_mm_for_cpu`, bf16 rows (fp32 or fp16 rows: 100 times that)
    groups, 8 bits   2.0 and 2.6 times  the same kernel over the integer's two halves, which lie side by side
    integers         13.6 ms    22 ms   8 bits a weight with one scale a row, times activations of 8 bits
    floats             33 ms    86 ms

`_weight_int8pack_mm` knows no groups and takes 15.7 and 81 ms. So few rows are multiplied in groups; for many rows the
weights are computed first, from how many on is measured once; int8 activations are fast for any number of rows. The
next tokens of a few texts do not come here where `program` computes them.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dougong.nn.quantized import Quantized, quantize_rows

_KERNEL_GROUPS = (256, 128, 64, 32)
_KERNEL_ROWS = 16       # outputs, of which the kernel takes only whole numbers
_MIDDLE = 8             # the kernel computes (half byte - 8) * scale + zero
_PROBE = 1024


def quantized_product(*parts: Quantized) -> nn.Module:
    """The products of one input with several matrices of the same form, as one; a module from (*batch, I) to
    (*batch, all O), in the precision of its input."""
    first = parts[0]
    alike = len({(part.bits, part.group, part.activations) for part in parts}) == 1
    if alike and first.values.device.type == "cpu":
        if first.activations == "int8" and _multiplies_integers():
            return IntegerProduct(*parts)
        if first.activations == "float" and _kernel_group(first):
            return GroupProduct(*parts)
    return EachProduct(*parts)


class _Joined(nn.Module):
    """Several matrices, and their biases after one another (zeros where a part has none)."""

    def __init__(self, *parts: Quantized) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        biases = [getattr(part, "bias", None) for part in parts]
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            self.bias = torch.cat([part.scale.new_zeros(part.shape[0], dtype=torch.float32) if bias is None else
                                   bias.detach() for part, bias in zip(parts, biases)])

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        y = self.rows(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def rows(self, x_MI: Float[Tensor, "M I"]) -> Float[Tensor, "M O"]:
        raise NotImplementedError

    def _each(self, get: Callable[[Any], Tensor]) -> Tensor:
        whole = [get(part) for part in self.parts]
        return torch.cat(whole) if len(whole) > 1 else whole[0]


class EachProduct(_Joined):
    """On devices and for forms without a kernel: the parts' own products."""

    def rows(self, x_MI: Float[Tensor, "M I"]) -> Float[Tensor, "M O"]:
        return torch.cat([part.product(x_MI) for part in self.parts], -1)  # type: ignore[operator]


class IntegerProduct(_Joined):
    """Integers times integers, added up exactly: the result of a row is the same in any batch."""

    def __init__(self, *parts: Quantized) -> None:
        super().__init__(*parts)
        integers_OI = self._each(lambda part: part.integers)
        self.packed = torch.ops.onednn.qlinear_prepack(integers_OI.contiguous(), None)
        self.scale_O = self._each(lambda part: part.scale.float().squeeze(1))
        self.zero_O = torch.zeros(len(integers_OI), dtype=torch.int32)

    def rows(self, x_MI: Float[Tensor, "M I"]) -> Float[Tensor, "M O"]:
        rounded_MI, scale_M1 = quantize_rows(x_MI)
        y_MO = torch.ops.onednn.qlinear_pointwise(rounded_MI, 1.0, 128, self.packed, self.scale_O, self.zero_O, None,
                                                  1.0, 0, torch.float32, "none", [], "")
        return y_MO.mul_(scale_M1).to(x_MI.dtype)


class GroupProduct(_Joined):
    """Groups of integers times bf16 rows, by PyTorch's kernel for 4 bits; of many rows, by weights computed first.

    An integer q of 8 bits is 16 h + l with halves h from -8 to 7 and l from 0 to 15. The kernel is given the halves of
    all columns side by side, with scales 16 s and s, and the row twice: it reads 8 bits a weight and adds in float32.
    Scales are rounded to bf16 like the rows, by at most 2^-9.
    """

    def __init__(self, *parts: Quantized) -> None:
        super().__init__(*parts)
        first = parts[0]
        group = _kernel_group(first)
        assert group is not None
        self.group, self.bits, self.num_outputs = group, first.bits, sum(part.shape[0] for part in parts)
        self.missing = -first.shape[1] % group     # columns that fill up the last group
        repeated = (first.group or first.shape[1]) // group if first.group != group else 1
        whole = (first.shape[1] + self.missing) // group
        scale_OG = self._each(lambda part: part.scale).repeat_interleave(repeated, 1)[:, :whole].bfloat16()
        pad = -self.num_outputs % _KERNEL_ROWS
        integers_OI = F.pad(self._each(lambda part: part.integers), (0, self.missing, 0, pad)).int()
        scale_OG = F.pad(scale_OG, (0, 0, 0, pad))
        if self.bits == 4:
            stored_OI, zero_OG = integers_OI + _MIDDLE, torch.zeros_like(scale_OG)
        else:
            high_OI = integers_OI.div(16, rounding_mode="floor")
            stored_OI = torch.cat([high_OI + _MIDDLE, integers_OI - 16 * high_OI], 1)
            zero_OG = torch.cat([torch.zeros_like(scale_OG), _MIDDLE * scale_OG], 1)
            scale_OG = torch.cat([16 * scale_OG, scale_OG], 1)
        self.scale_and_zero_GO2 = torch.stack([scale_OG.t(), zero_OG.t()], -1).contiguous()
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(stored_OI.contiguous(), 1)

    def rows(self, x_MI: Float[Tensor, "M I"]) -> Float[Tensor, "M O"]:
        if len(x_MI) >= many_rows(self.bits, x_MI.dtype, torch.get_num_threads()):
            return F.linear(x_MI, self._each(lambda part: part.dequantize(x_MI.dtype)))
        given_MI = x_MI.bfloat16()
        if self.missing:
            given_MI = F.pad(given_MI, (0, self.missing))
        if self.bits == 8:
            given_MI = torch.cat([given_MI, given_MI], -1)
        y_MO = torch.ops.aten._weight_int4pack_mm_for_cpu(given_MI.contiguous(), self.packed, self.group,
                                                          self.scale_and_zero_GO2)
        if y_MO.shape[1] != self.num_outputs:
            y_MO = y_MO[:, :self.num_outputs]
        return y_MO.to(x_MI.dtype)


def _kernel_group(part: Quantized) -> int | None:
    """The largest group of the kernel's that divides the part's own; None where it has none for it."""
    own = part.group or part.shape[1]
    return next((group for group in _KERNEL_GROUPS if own % group == 0), None)


def _multiplies_integers() -> bool:
    """Whether products of integers are fast and right here: without VNNI, pairs of them are added up in 16 bits."""
    return (torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_prepack")
            and bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)()))


@cache
def many_rows(bits: int, dtype: torch.dtype, threads: int) -> int:
    """From how many rows on it is faster to compute the weights and multiply by them. Measured, on this CPU with so
    many threads: the kernel computes in float32, so where bf16 products have hardware they win early."""
    own = torch.Generator().manual_seed(0)     # measuring must not move the random numbers of a run
    part = Quantized(_PROBE, _PROBE, bits, 32, "float")
    part.set(torch.randint(-8, 8, part.shape, generator=own, dtype=torch.int8), torch.ones_like(part.scale))
    product = GroupProduct(part)
    x_MI = torch.randn(64, _PROBE, generator=own).to(dtype)
    weight = part.dequantize(dtype)
    by_kernel = _seconds(lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(
        torch.zeros(64, product.packed.shape[1] * 2, dtype=torch.bfloat16), product.packed, product.group,
        product.scale_and_zero_GO2)) / 64
    by_weight = _seconds(lambda: F.linear(x_MI, weight)) / 64
    dequantise = _seconds(lambda: part.dequantize(dtype))
    return 1 + int(dequantise / (by_kernel - by_weight)) if by_kernel > by_weight else 1 << 30


def _seconds(call: Callable[[], Any], repeats: int = 3) -> float:
    best = float("inf")
    for _ in range(repeats + 1):     # the first also warms up
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best

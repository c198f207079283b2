"""Integers and scales against float64, against GGUF's own rounding, and as parts of a model."""

import copy

import pytest
import torch
import torch.nn.functional as F

from dougong.core.errors import ConfigError
from dougong.nn.embedding import Embedding
from dougong.nn.linear import Linear
from dougong.nn.quantized import (
    QuantizedEmbedding,
    QuantizedLinear,
    bytes_to_halves,
    dequantize,
    halves_to_bytes,
    quantize,
)

GROUPS = (1, 7, 32, 40, None)   # of 40 columns: each alone, not dividing, dividing not, the row, the row


def _linear(inputs: int = 40, outputs: int = 24, bias: bool = False) -> Linear:
    linear = Linear(inputs, outputs, bias=bias)
    torch.nn.init.normal_(linear.weight)
    if bias:
        torch.nn.init.normal_(linear.bias)
    return linear


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", (8, 4))
def test_no_weight_moves_by_more_than_half_a_step(bits, group):
    weight = torch.randn(24, 40)
    integers, scale = quantize(weight, bits, group)
    step = scale.double().abs().repeat_interleave(group or 40, 1)[:, :40]
    error = (dequantize(integers, scale, group, torch.float64) - weight.double()).abs()
    # At 4 bits the side opposite to the largest ends at 7: a weight there that equals it is a whole step away. Scales
    # are rounded to float16 (2^-11), which moves a weight of n steps by n * 2^-11 steps.
    allowed = (0.5 if bits == 8 else 1.0) + 2**-11 * (127 if bits == 8 else 8)
    assert (error <= allowed * step).all()
    inside = weight.double().abs() <= 7 * step
    assert (error <= (0.5 + 2**-11 * 127) * step)[inside].all()


@pytest.mark.parametrize(("bits", "name"), [(8, "Q8_0"), (4, "Q4_0")])
def test_groups_of_32_are_ggufs_blocks_bit_for_bit(bits, name):
    gguf = pytest.importorskip("gguf")
    import numpy as np

    weight = torch.randn(64, 96)
    weight[3, :32] = 0
    weight[4, 5], weight[4, 9] = 3.5, -3.5       # two of the same largest magnitude: the first decides the sign
    weight[5, :32] = torch.arange(32) * 0.5      # halves lie exactly between integers
    integers, scale = quantize(weight, bits, 32)
    kind = gguf.GGMLQuantizationType[name]
    blocks = gguf.quants.quantize(weight.numpy(), kind)
    theirs = gguf.quants.dequantize(blocks, kind)
    assert np.array_equal(dequantize(integers, scale, 32).numpy(), theirs)
    d = blocks.reshape(64, 3, -1)[..., :2].copy().view(np.float16)[..., 0]
    assert np.array_equal(d, scale.numpy())


def test_dequantised_weights_are_exact_in_float32():
    integers, scale = quantize(torch.randn(16, 64), 8, 32)
    exact = dequantize(integers, scale, 32, torch.float64)
    assert torch.equal(dequantize(integers, scale, 32).double(), exact)


@pytest.mark.parametrize("columns", (1, 2, 7, 32))
def test_two_integers_share_a_byte_and_part_again(columns):
    integers = torch.randint(-8, 8, (5, columns), dtype=torch.int8)
    stored = halves_to_bytes(integers)
    assert stored.shape == (5, -(-columns // 2)) and stored.dtype == torch.uint8
    assert torch.equal(bytes_to_halves(stored, columns), integers)
    assert int(stored[0, 0]) & 15 == int(integers[0, 0]) + 8     # the documented place of column 0


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.parametrize("bias", (False, True))
def test_linear_equals_float64_with_the_same_weights(bits, group, bias):
    part = QuantizedLinear.from_linear(_linear(bias=bias), bits, group)
    x = torch.randn(3, 5, 40)
    exact = F.linear(x.double(), part.dequantize(torch.float64), None if part.bias is None else part.bias.double())
    torch.testing.assert_close(part(x).double(), exact, rtol=0, atol=40 * 2**-24 * 50)
    assert part(x.double()).dtype == torch.float64
    torch.testing.assert_close(part(x.double()), exact, rtol=0, atol=1e-12)
    naive = F.linear(x.bfloat16(), part.weight.bfloat16()).double()
    if bias:
        naive = naive + part.bias.double()
    error, allowed = (part(x.bfloat16()).double() - exact).abs().max(), (naive - exact).abs().max()
    assert error <= 2 * allowed + 2**-8


@pytest.mark.parametrize("bits", (8, 4))
def test_the_gradient_reaches_the_input_and_the_bias_but_no_integer(bits):
    part = QuantizedLinear.from_linear(_linear(bias=True), bits, 32)
    x = torch.randn(5, 40, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(5, 24, dtype=torch.float64)
    part(x).backward(seed)
    torch.testing.assert_close(x.grad, seed @ part.dequantize(torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(part.bias.grad, seed.sum(0).float())
    assert [name for name, _ in part.named_parameters()] == ["bias"]
    assert all(buffer.grad is None and not buffer.requires_grad for buffer in part.buffers())


@pytest.mark.parametrize("group", (7, 32, None))
@pytest.mark.parametrize("bits", (8, 4))
def test_an_embedding_looks_up_the_rows_of_its_weight(bits, group):
    table = Embedding(11, 41)
    torch.nn.init.normal_(table.weight)
    part = QuantizedEmbedding.from_embedding(table, bits, group)
    ids = torch.tensor([[0, 10, 3], [3, 3, 1]])
    assert torch.equal(part(ids), part.weight[ids])
    assert part(ids[:, :0]).shape == (2, 0, 41)


def test_bits_per_weight_count_the_scales():
    assert QuantizedLinear(64, 8, bits=8, group=32).bits_per_weight == 8.5
    assert QuantizedLinear(64, 8, bits=4, group=32).bits_per_weight == 4.5
    assert QuantizedLinear(64, 8, bits=4, group=None).bits_per_weight == 4.25


def test_casting_a_model_keeps_its_weights():
    part = QuantizedLinear.from_linear(_linear(bias=True), 4, 32)
    before = part.weight.clone()
    for cast in (part.bfloat16(), part.double(), copy.deepcopy(part).to(torch.bfloat16)):
        assert cast.scale.dtype == torch.float16
        assert torch.equal(cast.weight, before)


@pytest.mark.parametrize("bits", (8, 4))
def test_a_state_dict_carries_integers_and_scales(bits):
    part = QuantizedLinear.from_linear(_linear(bias=True), bits, 32)
    with torch.device("meta"):
        other = QuantizedLinear(40, 24, bits=bits, bias=True)
    other.to_empty(device="cpu").load_state_dict(part.state_dict())
    assert torch.equal(other.weight, part.weight) and torch.equal(other.bias, part.bias)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="bits=3"):
        quantize(torch.randn(2, 4), 3, 2)
    with pytest.raises(ConfigError, match="group=0"):
        QuantizedLinear(4, 4, bits=4, group=0)
    with pytest.raises(ConfigError, match="diverged"):
        quantize(torch.full((2, 4), 1e9), 8, 2)
    with pytest.raises(ConfigError, match="diverged"):
        quantize(torch.tensor([[float("nan"), 1.0]]), 8, 2)

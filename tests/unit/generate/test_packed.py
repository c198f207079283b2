"""The kernels for weights of integers against float64 products of what the integers stand for."""

import pytest
import torch
import torch.nn.functional as F

from dougong.generate import packed
from dougong.generate.fused import product_of
from dougong.generate.packed import EachProduct, GroupProduct, IntegerProduct, quantized_product
from dougong.nn.linear import Linear
from dougong.nn.quantized import QuantizedLinear, quantize_rows


def _part(inputs: int, outputs: int, bits: int, group: int | None, activations: str = "float",
          bias: bool = False) -> QuantizedLinear:
    linear = Linear(inputs, outputs, bias=bias)
    torch.nn.init.normal_(linear.weight)
    if bias:
        torch.nn.init.normal_(linear.bias)
    return QuantizedLinear.from_linear(linear, bits, group, activations)


def _exact(parts, x):
    return torch.cat([F.linear(x.double(), part.dequantize(torch.float64),
                               None if part.bias is None else part.bias.double()) for part in parts], -1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("inputs", "group"), [(64, 32), (512, 256), (512, None), (96, None), (100, 32), (384, 192)])
@pytest.mark.parametrize("bits", (8, 4))
def test_group_products_err_as_bf16_products_do(bits, inputs, group, dtype, monkeypatch):
    monkeypatch.setattr(packed, "many_rows", lambda *_: 1 << 30)
    parts = [_part(inputs, outputs, bits, group, bias=True) for outputs in (24, 40)]
    product = quantized_product(*parts)
    if inputs == 100 or group != 100:
        assert isinstance(product, GroupProduct)
    x = torch.randn(3, 5, inputs).to(dtype)
    exact = _exact(parts, x)
    naive = torch.cat([F.linear(x.bfloat16(), part.weight.bfloat16(), part.bias.bfloat16()) for part in parts], -1)
    y = product(x)
    assert y.dtype == dtype and y.shape == exact.shape
    error, allowed = (y.double() - exact), (naive.double() - exact)
    assert error.square().mean() <= 2 * allowed.square().mean(), "worse than the same product in bf16"


def test_every_integer_of_8_bits_comes_back_from_its_halves():
    part = QuantizedLinear(256, 16, bits=8, group=32)
    part.set((torch.arange(256) - 128).clamp(-127).to(torch.int8).expand(16, 256), torch.ones(16, 8).half())
    product = GroupProduct(part)
    columns = torch.cat([product.rows(one) for one in torch.eye(256).split(8)])
    assert torch.equal(columns[:, 0], part.integers[0].float())   # integers to 127 are exact in bf16


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_integer_products_are_those_of_the_part(dtype):
    parts = [_part(100, outputs, 8, None, "int8", bias=True) for outputs in (24, 41)]
    product = quantized_product(*parts)
    if not packed._multiplies_integers():
        pytest.skip("no VNNI here")
    assert isinstance(product, IntegerProduct)
    x = torch.randn(3, 5, 100).to(dtype)
    exact = torch.cat([part(x.double()) for part in parts], -1)
    rounding = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(product(x).double(), exact, rtol=rounding, atol=rounding * exact.abs().max().item())


def test_integer_products_of_a_row_do_not_depend_on_the_rows_beside_it():
    part = _part(96, 64, 8, None, "int8")
    product = quantized_product(part)
    x = torch.randn(9, 96) * torch.logspace(-3, 3, 9)[:, None]
    assert torch.equal(product(x), torch.cat([product(row) for row in x.split(1)]))


def test_activations_move_by_half_a_step_of_their_own_row():
    x = torch.randn(7, 33) * torch.logspace(-6, 6, 7)[:, None]
    x[3] = 0
    integers, scale = quantize_rows(x)
    error = ((integers.double() - 128) * scale.double() - x.double()).abs()
    assert (error <= 0.50001 * scale.double()).all() and (integers[3] == 128).all()


@pytest.mark.parametrize("bits", (8, 4))
def test_many_rows_are_multiplied_by_computed_weights(bits, monkeypatch):
    monkeypatch.setattr(packed, "many_rows", lambda *_: 4)
    parts = [_part(64, 48, bits, 32), _part(64, 16, bits, 32)]
    product, x = quantized_product(*parts), torch.randn(4, 64)
    torch.testing.assert_close(product(x).double(), _exact(parts, x), rtol=0, atol=1e-4)
    assert (product(x[:3]).double() - _exact(parts, x[:3])).abs().max() > 1e-4    # the kernel's bf16


def test_the_number_of_many_rows_is_measured_and_positive():
    assert packed.many_rows(4, torch.float32, 1) >= 1


def test_what_no_kernel_knows_is_multiplied_part_by_part():
    odd = [_part(40, 24, 4, 7), _part(40, 8, 8, 32)]
    for parts in ([odd[0]], odd):
        product, x = quantized_product(*parts), torch.randn(2, 40)
        assert isinstance(product, EachProduct)
        torch.testing.assert_close(product(x).double(), _exact(parts, x), rtol=0, atol=1e-4)


def test_floats_and_integers_that_read_one_input_stand_side_by_side():
    parts = [_part(64, 16, 8, None, "int8"), Linear(64, 8)]
    torch.nn.init.normal_(parts[1].weight)
    x = torch.randn(2, 64)
    expected = torch.cat([part(x) for part in parts], -1)
    torch.testing.assert_close(product_of(*parts)(x), expected, rtol=1e-4, atol=1e-4)

"""GPTQ against an independent computation in float64, and against rounding."""

import copy

import pytest
import torch
from tiny_decoders import batches_of, tiny

from dougong.adapt.calibrate import Moments, layers
from dougong.adapt.gptq import gptq, inverse_factor, solve, solve_in_order
from dougong.core.errors import DataError
from dougong.nn.quantized import dequantize, quantize


def _moments(x):
    moments = Moments.of(x.shape[-1], x.device)
    moments.add(x)
    return moments


def _correlated(rows, inputs):
    """Inputs of which some always come together and some are much larger."""
    mixed = torch.randn(rows, inputs // 2) @ torch.randn(inputs // 2, inputs)
    return (mixed + 0.1 * torch.randn(rows, inputs)) * torch.rand(inputs).mul(4).exp()


def _obq(weight, products, damping, scale, low, high):
    """Optimal brain quantisation in a fixed order (Frantar & Alistarh 2022, arXiv:2208.11580, eq. 3), as its equations
    say: after each column the inverse of what is left of H is computed anew."""
    weight = weight.clone()
    H = products + damping * products.diagonal().mean() * torch.eye(len(products), dtype=products.dtype)
    integers = torch.zeros_like(weight)
    for i in range(weight.shape[1]):
        free = list(range(i, weight.shape[1]))
        inverse = torch.linalg.inv(H[free][:, free])
        integers[:, i] = (weight[:, i] / scale[:, i] + 0.5).floor().clamp(low, high)
        error = weight[:, i] - integers[:, i] * scale[:, i]
        weight[:, free] -= (error / inverse[0, 0])[:, None] * inverse[0][None]
    return integers


@pytest.mark.parametrize("columns", (6, 150))   # within one block, and over two
def test_it_is_obq_in_a_fixed_order(columns):
    x, weight = _correlated(4 * columns, columns).double(), torch.randn(5, columns, dtype=torch.float64)
    scale = torch.full_like(weight, 0.31)
    products = x.T @ x
    found = solve_in_order(weight, scale, inverse_factor(products, 0.01), bits=4)
    assert torch.equal(found.double(), _obq(weight, products, 0.01, scale, -8, 7))


@pytest.mark.parametrize("group", (8, 32, None))
@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("act_order", (False, True))
def test_outputs_change_less_than_with_rounding(bits, group, act_order):
    x, weight = _correlated(512, 64), torch.randn(48, 64)
    ours = dequantize(*solve(weight, _moments(x), bits, group, act_order=act_order), group)
    rounded = dequantize(*quantize(weight, bits, group), group)
    error, theirs = (((w - weight) @ x.T).square().mean() for w in (ours, rounded))
    assert error < 0.5 * theirs


def test_an_input_that_never_came_is_rounded_as_it_is():
    x, weight = torch.randn(100, 8), torch.randn(3, 8)
    x[:, 2] = 0
    integers, scale = solve(weight, _moments(x), 8, None)
    torch.testing.assert_close(dequantize(integers, scale, None)[:, 2], weight[:, 2], rtol=0, atol=float(scale.max()))


def test_without_calibration_nothing_is_claimed():
    with pytest.raises(DataError, match="fewer than"):
        gptq(tiny(), batches_of(1, rows=1, length=2), bits=4)


@pytest.mark.parametrize("family", ("qwen3", "gpt2", "nano", "llama"))
def test_every_matrix_of_every_family_gets_integers(family):
    model = tiny(family)
    plain = copy.deepcopy(model)
    found = gptq(model, batches_of(2), bits=4, group=8)
    matrices = {name.removesuffix(".weight") for name, p in plain.named_parameters()
                if p.ndim == 2 and "position" not in name}
    assert set(found) == matrices
    for name, (integers, scale) in found.items():
        part = model.get_submodule(name)
        torch.testing.assert_close(part.weight, dequantize(integers, scale, 8), rtol=0, atol=0)


def test_layers_after_a_rounded_one_see_what_it_now_gives():
    model, batches = tiny(), batches_of(2)
    first, second = layers(model, batches)
    for linears, _ in first.maps():
        for linear in linears.values():
            linear.weight.data.zero_()
    list(second.maps())
    silent = first.run()     # a layer of zeros adds nothing
    torch.testing.assert_close(silent[0][0], first.carries[0][0], rtol=0, atol=0)


def test_maps_that_read_the_same_vectors_are_found_together():
    (layer, *_) = layers(tiny("qwen3"), batches_of(1))
    names = [[name.split(".", 2)[2] for name in linears] for linears, _ in layer.maps()]
    assert names == [["attention.query", "attention.key", "attention.value"], ["attention.output"],
                     ["feed_forward.gate", "feed_forward.up"], ["feed_forward.down"]]

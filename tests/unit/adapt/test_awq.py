"""AWQ: its scaling changes nothing before rounding, and less than nothing-at-all after it."""

import copy

import pytest
import torch
from tiny_decoders import batches_of, tiny

from dougong.adapt.awq import awq, best_power, scale_layer
from dougong.adapt.calibrate import Moments, layers
from dougong.adapt.scales import best_scale
from dougong.nn.quantized import dequantize, quantize, round_to


@pytest.mark.parametrize("family", ("qwen3", "gpt2", "nano", pytest.param("llama", marks=pytest.mark.slow)))
def test_scaling_alone_leaves_the_function_as_it_was(family):
    model, batches = tiny(family).double(), batches_of(2)
    model.compute_dtype = torch.float64
    tokens = batches[0]["tokens"]
    before, weights = model(tokens).detach(), copy.deepcopy(model.state_dict())
    for layer in layers(model, batches):
        scale_layer(layer, 4, 8)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])]
    assert any("output.weight" in name for name in changed)
    assert any("norm" in name for name in changed) == (family != "nano")     # whose norms have no scale to fold into
    torch.testing.assert_close(model(tokens), before, rtol=1e-5, atol=1e-6)


def test_large_inputs_get_finer_columns():
    x, weight = torch.randn(400, 32), torch.randn(24, 32)
    x[:, 5] *= 40
    moments = Moments.of(32, x.device)
    moments.add(x)
    s = best_power([weight], moments, 4, 8, lambda s: s)
    assert s.argmax() == 5 and s[5] > 2 * s.median()
    scaled = quantize(weight * s, 4, 8)
    error, plain = (((w - weight) @ x.T).square().mean() for w in
                    (dequantize(*scaled, 8) / s, dequantize(*quantize(weight, 4, 8), 8)))
    assert error < 0.7 * plain


def test_the_best_scale_is_never_worse_than_the_plain_one():
    weight, importance = torch.randn(16, 40), torch.rand(40)
    for bits in (4, 8):
        scale = best_scale(weight, bits, 8, importance)
        ours = dequantize(round_to(weight, scale, bits, 8), scale, 8)
        plain = dequantize(*quantize(weight, bits, 8), 8)
        error, theirs = ((((w - weight).square() * importance).sum()) for w in (ours, plain))
        assert error <= theirs * 1.001 and (bits == 8 or error < 0.9 * theirs)


@pytest.mark.parametrize("family", ("qwen3", "gpt2"))
def test_the_weights_left_are_those_of_the_integers(family):
    model = tiny(family)
    found = awq(model, batches_of(2), bits=4, group=8)
    for name, (integers, scale) in found.items():
        torch.testing.assert_close(model.get_submodule(name).weight, dequantize(integers, scale, 8), rtol=0, atol=0)

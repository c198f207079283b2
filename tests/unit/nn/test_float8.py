"""Products in float8 against ml_dtypes' own rounding, summed in float64."""

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from dougong.core.errors import ConfigError
from dougong.models.families.gan import GANConfig
from dougong.models.families.qwen3 import Qwen3Config
from dougong.models.families.qwen3_moe import Qwen3MoEConfig
from dougong.nn.float8 import float8_product, multiply_in_float8, rounded, why_not_float8
from dougong.nn.linear import Linear, product


def in_float8(x: torch.Tensor, dtype: type, largest: float) -> np.ndarray:
    """x as the format holds it, scaled by its own largest number, in float64."""
    values = x.detach().float().numpy()
    scale = np.float32(np.abs(values).max()) / np.float32(largest)
    return (values / scale).astype(dtype).astype(np.float64) * np.float64(scale)


def forward8(x: torch.Tensor) -> np.ndarray:
    return in_float8(x, ml_dtypes.float8_e4m3fn, 448.0)


def backward8(x: torch.Tensor) -> np.ndarray:
    return in_float8(x, ml_dtypes.float8_e5m2, 57344.0)


def close(found: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-5) -> bool:
    return bool(np.abs(found.detach().double().numpy() - expected).max() <= tolerance * np.abs(expected).max())


@pytest.mark.parametrize("M", [1, 16, 21])
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e6])
def test_product_and_gradients_are_those_of_the_rounded_factors(M, size):
    draw = torch.Generator().manual_seed(M)
    x = (torch.randn(M, 64, generator=draw) * size).requires_grad_()
    weight = torch.randn(48, 64, generator=draw, requires_grad=True)
    bias = torch.randn(48, generator=draw, requires_grad=True)
    seed = torch.randn(M, 48, generator=draw) * size
    y = float8_product(x, weight, bias)
    y.backward(seed)
    assert close(y, forward8(x) @ forward8(weight).T + bias.detach().double().numpy())
    assert x.grad is not None and weight.grad is not None and bias.grad is not None
    assert close(x.grad, backward8(seed) @ forward8(weight))
    assert close(weight.grad, backward8(seed).T @ forward8(x))
    assert torch.equal(bias.grad, seed.sum(0))


def test_the_precision_of_each_is_kept():
    x = torch.randn(2, 8, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(16, 32, requires_grad=True)
    y = float8_product(x, weight, None)
    y.sum().backward()
    assert x.grad is not None and weight.grad is not None
    assert (y.dtype, y.shape, x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, (2, 8, 16), torch.bfloat16,
                                                                   torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    x = torch.randn(16, 32)
    x[3, 5] = bad
    assert not torch.isfinite(float8_product(x, torch.randn(16, 32, requires_grad=True), None)).any()


def test_zeros_stay_zeros():
    x, weight = torch.zeros(16, 32, requires_grad=True), torch.zeros(16, 32, requires_grad=True)
    y = float8_product(x, weight, None)
    y.backward(torch.zeros_like(y))
    for tensor in (y, x.grad, weight.grad):
        assert tensor is not None and torch.equal(tensor, torch.zeros_like(tensor))


def test_the_largest_number_is_the_largest_of_the_format():
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        for number in (1e-30, 0.1, 3.3e38):
            x8, scale = rounded(torch.tensor([[number, -number]]), dtype)
            assert x8.float().tolist() == [[torch.finfo(dtype).max, -torch.finfo(dtype).max]]
            assert float(scale) * torch.finfo(dtype).max == pytest.approx(number)


def test_without_gradients_or_with_odd_sides_it_is_the_usual_product():
    x, weight, odd = torch.randn(5, 32), torch.randn(16, 32, requires_grad=True), torch.randn(17, 32)
    with torch.no_grad():
        assert torch.equal(float8_product(x, weight, None), product(x, weight, None))
    assert torch.equal(float8_product(x, odd, None), product(x, odd, None))


def test_of_its_input_a_byte_a_number_is_kept():
    kept = []
    x, weight = torch.randn(256, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        float8_product(x, weight, None)
    assert sum(t.numel() * t.element_size() for t in kept if t.data_ptr() != weight.data_ptr()) <= 256 * 64 + 8


QWEN = Qwen3Config(vocab_size=96, context=16, dim=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
                   ffn_dim=64)


def in_float8_of(model: nn.Module) -> set[str]:
    return {name for name, part in model.named_modules() if isinstance(part, Linear)
            and part.multiply is float8_product}


def test_the_layers_of_a_decoder_and_nothing_else():
    model = QWEN.build()
    before = list(model.state_dict())
    multiply_in_float8(model)
    parts = ("attention.query", "attention.key", "attention.value", "attention.output", "feed_forward.gate",
             "feed_forward.up", "feed_forward.down")
    assert in_float8_of(model) == {f"stack.{layer}.{part}" for layer in range(2) for part in parts}
    assert list(model.state_dict()) == before
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert in_float8_of(copied) == in_float8_of(model)


def test_a_router_chooses_in_full_precision():
    model = Qwen3MoEConfig(vocab_size=96, context=16, dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16,
                           ffn_dim=32, num_experts=16, top_k=2).build()
    multiply_in_float8(model)
    assert not any("router" in name for name in in_float8_of(model)) and in_float8_of(model)


def test_a_model_without_such_matrices_is_refused():
    odd = Qwen3Config(vocab_size=96, context=16, dim=24, num_layers=1, num_heads=3, num_kv_heads=3, head_dim=8,
                      ffn_dim=40)
    for model in (GANConfig(image_size=8).build(), odd.build()):
        with pytest.raises(ConfigError, match="divide by 16"):
            multiply_in_float8(model)


def test_devices_that_cannot():
    assert why_not_float8(torch.device("cpu")) is None
    assert "not on mps" in (why_not_float8(torch.device("mps")) or "")


def test_an_older_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    assert "A100 has 8.0" in (why_not_float8(torch.device("cuda")) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_not_float8(torch.device("cuda")) is None

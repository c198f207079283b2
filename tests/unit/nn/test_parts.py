"""Norms, feed-forwards, positions, dropout, residuals and first values against independent definitions."""

import math

import pytest
import torch
import torch.nn.functional as F

from dougong.core.errors import ConfigError
from dougong.nn.dropout import Dropout
from dougong.nn.feed_forward import GELUConfig, ReLU2Config, SwiGLUConfig
from dougong.nn.init import ZEROS, FanIn, Initialised, Normal, initialise, matrix
from dougong.nn.linear import Linear
from dougong.nn.norm import LayerNorm, RMSNorm, layer_norm, rms_norm
from dougong.nn.position import (
    ALiBiConfig,
    LearnedConfig,
    RoPE,
    RoPEConfig,
    SinusoidalConfig,
    Span,
    alibi_slopes,
    rotate,
)
from dougong.nn.residual import X0ResidualConfig

CPU = torch.device("cpu")


def test_rms_norm_equals_torch():
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64)
    for w in (weight, None):
        mine, theirs = rms_norm(x, w, 1e-3), F.rms_norm(x, (8,), w, 1e-3)
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-14)
        seed = torch.randn_like(x)
        gradients = [torch.autograd.grad(y, x, seed)[0] for y in (mine, theirs)]
        assert torch.allclose(*gradients, rtol=0, atol=1e-13)


@pytest.mark.parametrize("norm", [lambda x, w: rms_norm(x, w, 1e-6),
                                  lambda x, w: layer_norm(x, w, None, 1e-6)])
def test_statistics_of_bf16_are_taken_in_float32(norm):
    # A thousand equal bf16 squares summed in bf16 would stop growing at 256; in float32 the result is exact
    # to rounding.
    x = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    x[:, ::2] = -1.0
    assert torch.equal(norm(x, torch.ones(4096)).float().abs(), torch.ones(1, 4096))
    x = torch.randn(4, 512).bfloat16()
    exact = norm(x.double(), torch.ones(512).double())
    error = (norm(x, torch.ones(512)).double() - exact).abs()
    assert (error <= 2 * 2**-8 * exact.abs() + 1e-6).all(), "worse than rounding to bf16 twice"


def test_norms_without_parameters_have_none():
    assert not list(RMSNorm(8, learned=False).parameters())
    assert not list(LayerNorm(8, learned=False).parameters())
    assert len(list(LayerNorm(8, bias=False).parameters())) == 1


@pytest.mark.parametrize(("section", "activation"), [
    (GELUConfig(), lambda x: F.gelu(x, approximate="tanh")),
    (GELUConfig(approximate="none"), lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
    (ReLU2Config(), lambda x: torch.where(x > 0, x * x, 0)),
])
def test_feed_forward_of_two_matrices(section, activation):
    part = section.build(dim=6)
    initialise(part, 0)
    x = torch.randn(2, 3, 6)
    up_bias, down_bias = (0 if b is None else b for b in (part.up.bias, part.down.bias))
    expected = activation(x @ part.up.weight.T + up_bias) @ part.down.weight.T + down_bias
    assert part.up.weight.shape == (24, 6)
    assert torch.allclose(part(x), expected, atol=1e-5)


def test_swiglu():
    part = SwiGLUConfig(ffn_dim=10).build(dim=6)
    initialise(part, 0)
    x = torch.randn(2, 3, 6)
    gate, up = x @ part.gate.weight.T, x @ part.up.weight.T
    assert torch.allclose(part(x), (gate * gate.sigmoid() * up) @ part.down.weight.T, atol=1e-5)
    assert SwiGLUConfig().width(768) == 2048 and SwiGLUConfig().width(160) == 448


def test_rope_turns_by_position_so_that_only_distance_counts():
    rope = RoPE(8, theta=100.0)
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        at = [rope.rotation(Span(T=1, length=n, device=CPU), torch.float64) for n in (i, j)]
        return (rotate(q, at[0]) * rotate(k, at[1])).sum()

    assert torch.allclose(score(9, 4), score(25, 20), atol=1e-5)
    assert not torch.allclose(score(9, 4), score(9, 5), atol=1e-3)
    # The pair (i, i + H/2) is a complex number turned by position · theta^(-2i/H).
    turned = torch.view_as_complex(torch.stack([q[..., :4], q[..., 4:]], -1)) * torch.exp(
        1j * 9 * 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4))
    mine = rotate(q, rope.rotation(Span(T=1, length=9, device=CPU), torch.float64))
    assert torch.allclose(mine, torch.cat([turned.real, turned.imag], -1), atol=1e-6)


def test_rope_tables_made_in_inference_mode_serve_training():
    rope = RoPE(8, theta=100.0)
    with torch.inference_mode():
        rope.rotation(Span(T=5, device=CPU), torch.float32)
    x = torch.randn(1, 5, 1, 8, requires_grad=True)
    rotate(x, rope.rotation(Span(T=5, device=CPU), torch.float32)).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_sinusoidal_positions_are_the_paper_s():
    position = SinusoidalConfig().build(dim=6, head_dim=2, num_heads=3, context=None, init=None)
    table = position.embed(Span(T=4, device=CPU))
    for t in range(4):
        for i in range(3):
            angle = t / 10_000 ** (2 * i / 6)
            assert table[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_alibi_slopes_are_the_published_ones():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(12) == [2.0**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    bias = ALiBiConfig().build(dim=8, head_dim=4, num_heads=2, context=None, init=None).bias(
        Span(T=2, length=3, device=CPU))
    assert torch.equal(bias[0], 2.0**-4 * torch.tensor([[-3.0, -2, -1, 0, 1], [-4, -3, -2, -1, 0]]))


def test_positions_restart_with_each_document_and_count_from_a_row_s_start():
    segment = torch.tensor([[5, 5, 5, 2, 2, 9], [1, 1, 1, 1, 1, 1]])
    span = Span(T=6, device=CPU, segment_BS=segment)
    assert span.index_in_document().tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    padded = Span(T=3, length=2, device=CPU, start_B=torch.tensor([0, 3]))
    assert padded.index().tolist() == [[2, 3, 4], [0, 0, 1]]


def test_positions_that_do_not_fit_are_explained():
    with pytest.raises(ConfigError, match=r"head_dim=5.*Try head_dim=6"):
        RoPEConfig().build(dim=10, head_dim=5, num_heads=2, context=8, init=None)
    learned = LearnedConfig().build(dim=10, head_dim=5, num_heads=2, context=8, init=None)
    with pytest.raises(ConfigError, match=r"9 tokens.*context=8"):
        learned.embed(Span(T=9, device=CPU))


def test_dropout_keeps_the_mean_and_rests_in_evaluation():
    part, x = Dropout(0.3), torch.ones(200_000)
    y = part(x)
    share = 77 / 256    # 0.3 to the nearest 1/256
    assert y.unique().tolist() == pytest.approx([0.0, 1 / (1 - share)])
    # The share of zeros is binomial: standard deviation sqrt(0.21 / n) = 0.001.
    assert abs((y == 0).double().mean().item() - share) < 0.005
    assert part.eval()(x) is x and Dropout(0.0)(x) is x


def test_dropout_drops_the_same_elements_on_the_way_back_and_again_after_a_restored_state():
    part, x = Dropout(0.5), torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    state = torch.get_rng_state()
    y = part(x)
    y.sum().backward()
    assert torch.equal(x.grad == 0, y == 0) and torch.equal(y.detach(), x.detach() * x.grad)
    torch.set_rng_state(state)
    assert torch.equal(part(x), y)
    stream, again = torch.ones_like(x, requires_grad=True), x.detach().clone().requires_grad_()
    torch.set_rng_state(state)
    added = part(again, onto=stream)
    added.sum().backward()
    assert torch.allclose(added, 1 + y) and torch.equal(again.grad, x.grad) and torch.equal(stream.grad, stream)


@pytest.mark.parametrize("p", [0.998, 0.9999])
def test_dropout_of_nearly_all_keeps_one_of_256(p):
    x = torch.ones(200_000, requires_grad=True)
    for y in (Dropout(p)(x), Dropout(p)(x, onto=torch.zeros_like(x))):
        assert y.unique().tolist() == [0, 256]
        y.sum().backward()
    assert x.grad.isfinite().all()


def test_x0_residual_mixes_with_its_scalars():
    part = X0ResidualConfig(carry=0.5, origin=2.0).build()
    initialise(part, 0)
    assert torch.equal(part(torch.ones(1, 1, 2), torch.full((1, 1, 2), 3.0)), torch.full((1, 1, 2), 6.5))


class _Two(Initialised):
    def __init__(self, names):
        super().__init__()
        for name in names:
            self.add_module(name, Linear(64, 32, bias=True))


def test_a_weight_depends_on_seed_and_path_alone():
    both, reverse, one = _Two(["a", "b"]), _Two(["b", "a"]), _Two(["b"])
    for model in (both, reverse, one):
        torch.rand(3)   # the global generator plays no part
        model.initialise(1)
    assert torch.equal(both.b.weight, reverse.b.weight) and torch.equal(both.b.weight, one.b.weight)
    assert not torch.equal(both.a.weight, both.b.weight)
    assert torch.equal(both.a.bias, torch.zeros(32))


@pytest.mark.parametrize(("rule", "std"), [(matrix(0.5), 0.5), (matrix(None), 0.1),
                                           (matrix(None, scale=2.0), 0.2), (matrix(0.5, scale=0.5), 0.25),
                                           (FanIn(), 0.1), (Normal(0.02), 0.02)])
def test_first_values_have_their_standard_deviation(rule, std):
    weight = torch.empty(300, 100)
    rule(weight, torch.Generator().manual_seed(0))
    assert weight.std().item() == pytest.approx(std, rel=0.03) and abs(weight.mean().item()) < 0.05 * std
    assert matrix(0.0) is ZEROS


def test_a_parameter_without_a_rule_is_our_mistake():
    with pytest.raises(AssertionError, match="gives no initial value for weight"):
        initialise(torch.nn.Linear(2, 2), 0)

"""A mixture of experts against a loop over tokens and their experts, and what keeps its loads equal."""

import copy

import pytest
import torch
import torch.nn.functional as F

from dougong.core.config import from_dict, replace
from dougong.core.errors import ConfigError
from dougong.generate.engine import Engine
from dougong.generate.sampling import SamplingConfig
from dougong.models import FAMILIES
from dougong.nn import moe as moe_module
from dougong.nn.feed_forward import SwiGLUConfig
from dougong.nn.init import initialise
from dougong.nn.moe import MoEConfig
from dougong.optim.build import MuonConfig
from dougong.optim.groups import describe

SECTION = MoEConfig(num_experts=6, top_k=2, ffn_dim=16)
SECTIONS = {
    "softmax": SECTION,
    "softmax, weights as they are": replace(SECTION, normalised=False, top_k=3),
    "sigmoid, shared, scaled": replace(SECTION, score="sigmoid", shared_experts=2, scale=2.5),
    "one expert each": replace(SECTION, top_k=1, normalised=False),
    "all experts": replace(SECTION, top_k=6, balance="none"),
    "odd width": replace(SECTION, ffn_dim=7),
}


def layer_of(section, dim=12, dtype=torch.float64):
    layer = section.build(dim=dim)
    initialise(layer, 0)
    if layer.balance_bias is not None:
        layer.balance_bias.copy_(torch.linspace(-0.2, 0.2, section.num_experts))
    return layer.to(dtype)


def by_loops(layer, x_BTD):
    """Token by token, expert by expert, from the published formulas."""
    section, results = layer.section, []
    for x in x_BTD.flatten(0, 1):
        logits = layer.router.weight @ x
        score = logits.softmax(0) if section.score == "softmax" else 1 / (1 + (-logits).exp())
        wanted = score if layer.balance_bias is None else score + layer.balance_bias
        chosen = sorted(range(section.num_experts), key=lambda e: -wanted[e])[:section.top_k]
        total = sum(score[e] for e in chosen) if section.normalised else 1.0
        result = layer.shared(x[None, None])[0, 0] if layer.shared is not None else 0.0
        for e in chosen:
            inner = F.silu(layer.experts.gate[e] @ x) * (layer.experts.up[e] @ x)
            result = result + section.scale * score[e] / total * (layer.experts.down[e] @ inner)
        results.append(result)
    return torch.stack(results).view_as(x_BTD)


def gradients(function, layer, x):
    x = x.clone().requires_grad_()
    y = function(x)
    wanted = [x, *layer.parameters()]
    return [y, *torch.autograd.grad(y, wanted, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))]


def assert_close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.isfinite(a).all() and torch.isfinite(b).all()
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("name", SECTIONS)
def test_equals_a_double_loop_with_every_gradient(name):
    layer, x = layer_of(SECTIONS[name]), torch.randn(3, 5, 12, dtype=torch.float64)
    assert_close(gradients(layer, layer, x), gradients(lambda x: by_loops(layer, x), layer, x), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_kernel_equals_one_product_for_each_expert(dtype, monkeypatch):
    layer, x = layer_of(SECTION, dim=32, dtype=torch.float32), torch.randn(2, 40, 32).to(dtype)
    assert moe_module._has_kernel(x.flatten(0, 1), layer.experts.gate.to(dtype)), "else this test compares nothing"
    grouped = gradients(layer, layer, x)
    monkeypatch.setattr(moe_module, "_has_kernel", lambda *_: False)
    assert_close(grouped, gradients(layer, layer, x), 1e-6 if dtype == torch.float32 else 2e-2)


def test_no_token_is_dropped_however_many_choose_one_expert():
    layer, x = layer_of(replace(SECTION, top_k=1, normalised=True)), torch.randn(2, 50, 12, dtype=torch.float64)
    layer.balance_bias[3] = 100.0
    expected = SwiGLUConfig(ffn_dim=16).build(dim=12).double()
    expected.load_state_dict({f"{name}.weight": stack[3] for name, stack in layer.experts.named_parameters()})
    assert_close([layer(x)], [expected(x)], 1e-12)
    layer(x)
    assert layer.load.tolist() == [0, 0, 0, 200, 0, 0]


def test_a_token_costs_what_it_costs_in_a_dense_swiglu():
    assert MoEConfig(top_k=2, shared_experts=1).width(2048) * 3 == pytest.approx(SwiGLUConfig().width(2048), rel=0.06)


def test_every_experts_matrix_begins_as_a_matrix_by_itself():
    layer = MoEConfig(num_experts=4, top_k=1, ffn_dim=512).build(dim=128)
    initialise(layer, 0)
    for stack, inputs in ((layer.experts.gate, 128), (layer.experts.up, 128), (layer.experts.down, 512)):
        assert stack.std(dim=(1, 2)).detach() * inputs**0.5 == pytest.approx(torch.ones(4), rel=0.02)
    assert not torch.equal(layer.experts.gate[0], layer.experts.gate[1])


def test_a_step_moves_the_bias_against_the_load():
    layer = MoEConfig(num_experts=4, top_k=1, balance_rate=0.01).build(dim=4)
    initialise(layer, 0)
    layer.load.copy_(torch.tensor([5.0, 1.0, 3.0, 3.0]))
    layer.after_step(None, applied=True)
    assert layer.balance_bias.tolist() == pytest.approx([-0.01, 0.01, 0.0, 0.0])
    assert not layer.load.any()
    layer.load.fill_(float("nan"))
    layer.after_step(None, applied=False)
    assert layer.balance_bias.tolist() == pytest.approx([-0.01, 0.01, 0.0, 0.0]) and not layer.load.any()


def test_only_training_is_counted():
    layer, x = layer_of(SECTION), torch.randn(2, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    assert not layer.load.any()
    layer.train()(x)
    assert layer.load.sum() == 2 * 5 * 2


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_loads_become_equal_without_a_loss(score):
    section = MoEConfig(num_experts=8, top_k=2, ffn_dim=8, score=score, balance_rate=0.02)
    layer, x = layer_of(section, dim=16, dtype=torch.float32), torch.randn(1, 4000, 16) + 1.0   # a direction they share

    def imbalance():
        layer(x)
        return (layer.load.max() / layer.load.mean()).item()

    before = imbalance()
    for _ in range(60):
        layer.after_step(None, applied=True)
        after = imbalance()
    assert before > 1.8 and after < 1.3, (before, after)


def test_without_balance_nothing_is_kept():
    layer = replace(SECTION, balance="none").build(dim=12)
    assert not list(layer.buffers())
    layer.after_step(None, applied=True)
    assert list(SECTION.build(dim=12).state_dict()).count("balance_bias") == 1
    assert "load" not in SECTION.build(dim=12).state_dict()


def test_more_experts_a_token_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"top_k=3 of num_experts=2.*Try top_k=2"):
        MoEConfig(num_experts=2, top_k=3).build(dim=8)


def test_muon_treats_each_expert_as_a_matrix_by_itself():
    layer = MoEConfig(num_experts=3, top_k=1, ffn_dim=8).build(dim=12)
    initialise(layer, 0)
    alone = torch.nn.ModuleList(torch.nn.Linear(12, 8, bias=False) for _ in range(3))
    for linear, matrix in zip(alone, layer.experts.gate):
        linear.weight.data.copy_(matrix)
    assert any("experts.down" in row["names"] for row in describe(MuonConfig().build(layer))
               if row["optimizer"] == "muon")
    optimizers = [MuonConfig(lr=0.1, weight_decay=0.1).build(model) for model in (layer, alone)]
    for _ in range(2):
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
        for linear, gradient in zip(alone, layer.experts.gate.grad):
            linear.weight.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for linear, matrix in zip(alone, layer.experts.gate):
        assert torch.allclose(linear.weight, matrix, atol=1e-6)


@pytest.mark.parametrize(("kind", "values"), [
    ("qwen3_moe", {"num_experts": 6, "top_k": 2, "ffn_dim": 16}),
    ("nano", {"feed_forward": {"kind": "moe", "num_experts": 5, "ffn_dim": 10, "shared_experts": 1,
                               "score": "sigmoid"}}),
])
def test_generating_with_a_cache_equals_reading_everything_again(kind, values):
    config = from_dict(FAMILIES[kind], {"vocab_size": 61, "context": 40, "dim": 32, "num_layers": 2, "num_heads": 2,
                                        **values})
    model = config.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 if parameter.dim() > 1 else torch.ones_like(parameter))
        for layer in model.stack.values():
            if layer.feed_forward.balance_bias is not None:
                layer.feed_forward.balance_bias.copy_(torch.randn(5) * 0.3)
    model.eval()
    prompts = [[5, 9, 2], [7, 1, 30, 4, 11]]
    steps = list(Engine(copy.deepcopy(model)).start(prompts, SamplingConfig(max_tokens=12, temperature=0)))
    for row, prompt in enumerate(prompts):
        written = [token.id for step in steps for token in step if token.row == row]
        tokens = torch.tensor([prompt + written])
        with torch.no_grad():
            expected = model(tokens)[0].argmax(-1)
        assert written == expected[len(prompt) - 1:-1].tolist()

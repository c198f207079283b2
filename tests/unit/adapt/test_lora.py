"""Adapters: what is trained, what it begins as, what merging leaves, and what is refused."""

import copy

import pytest
import torch

from dougong.adapt.lora import LoRAConfig, hold_frozen, trained, widths
from dougong.core.errors import ConfigError
from dougong.data.batch import Batch
from dougong.generate.engine import Engine, _for_inference
from dougong.models import FAMILIES
from dougong.nn.linear import Linear
from dougong.nn.lora import adapters, without_adapters
from dougong.nn.quantized import dequantize, quantize
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.optim.build import AdamWConfig
from dougong.runtime.device import Runtime
from dougong.train.shadow import moving

SIZES = {"vocab_size": 53, "context": 32, "dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 64}
QWEN3 = FAMILIES["qwen3"](**SIZES, num_kv_heads=2, head_dim=16)
KINDS = [("lora", "float"), ("dora", "float"), ("lora", "int8"), ("dora", "int4")]


def model_of(config=QWEN3, dtype=torch.float32):
    model = config.build().to(dtype)
    model.compute_dtype = dtype
    model.initialise(0)
    return model


def moved(model, by=0.1):
    """Adapters as training leaves them: B not zero, lengths changed."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * by)
    return model


def batch(rows=3, T=20):
    tokens = torch.randint(53, (rows, T + 1), generator=torch.Generator().manual_seed(1))
    return Batch(tokens=tokens[:, :-1].contiguous(), targets=tokens[:, 1:].contiguous(), weight=torch.ones(rows, T))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_new_adapter_changes_nothing_and_only_it_is_trained(kind):
    model = model_of()
    before = model(batch()["tokens"])
    adapt = LoRAConfig(kind=kind, rank=4)
    matrices = widths(adapt.chosen(model).values())
    adapt.apply(model, seed=0)
    torch.testing.assert_close(model(batch()["tokens"]), before, rtol=1e-5, atol=1e-5)
    lengths = sum(part.out_features for part in adapters(model).values()) if kind == "dora" else 0
    assert trained(model) == 4 * matrices + lengths == sum(t.numel() for t in moving(model).values())
    assert len(adapters(model)) == 2 * 7
    CausalLMConfig().build().losses(model, batch()).sums["model"].backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(moving(model))


@pytest.mark.parametrize(("kind", "base"), KINDS)
def test_merged_computes_what_the_adapted_model_computes(kind, base):
    adapt = LoRAConfig(kind=kind, rank=4, base=base)
    model = moved(adapt.apply(model_of(), seed=0)).eval()
    tokens = batch()["tokens"]
    expected, apart = model(tokens), model_of()(tokens)
    names = set(dict(model_of().named_parameters()))
    adapt.merge(model)
    assert set(dict(model.named_parameters())) == names and all(p.requires_grad for p in model.parameters())
    assert all(type(part) is not type(None) and not hasattr(part, "lora_a") for part in model.modules())
    scale = expected.abs().max()
    assert (model(tokens) - expected).abs().max() < 1e-5 * scale < (apart - expected).abs().max()


@pytest.mark.parametrize("base", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_over_integers_gradients_are_those_over_the_numbers_that_they_stand_for(kind, base):
    bits = {"int8": 8, "int4": 4}[base]
    over_integers = moved(LoRAConfig(kind=kind, rank=4, base=base).apply(model_of(dtype=torch.float64), seed=0))
    plain = model_of(dtype=torch.float64)
    with torch.no_grad():
        for part in LoRAConfig().chosen(plain).values():
            part.weight.copy_(dequantize(*quantize(part.weight, bits), dtype=torch.float64))
    over_floats = moved(LoRAConfig(kind=kind, rank=4).apply(plain, seed=0))
    for model in (over_integers, over_floats):
        CausalLMConfig().build().losses(model, batch()).sums["model"].backward()
    expected = {name: p.grad for name, p in over_floats.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in over_integers.named_parameters() if p.requires_grad}
    assert set(expected) == set(found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)
    assert not any("values" in name or "scale" in name for name in moving(over_integers))


def test_with_dropout_gradients_are_those_of_the_formula():
    model = model_of(dtype=torch.float64)
    part = next(iter(LoRAConfig().chosen(model).values()))
    from dougong.nn.dropout import dropout
    from dougong.nn.lora import LoRALinear

    adapted = LoRALinear.over(part, 4, factor=2.0, dropout=0.25).train()
    torch.nn.init.normal_(adapted.lora_a), torch.nn.init.normal_(adapted.lora_b)
    x = torch.randn(5, 7, part.in_features, dtype=torch.float64, requires_grad=True)
    wanted = [x, adapted.lora_a, adapted.lora_b]
    torch.manual_seed(4)
    y = adapted(x)
    found = torch.autograd.grad(y.square().sum(), wanted)
    torch.manual_seed(4)
    z = x @ part.weight.detach().t() + 2.0 * (dropout(x, 0.25, training=True) @ adapted.lora_a.t()) @ adapted.lora_b.t()
    torch.testing.assert_close(y, z)
    for mine, formula in zip(found, torch.autograd.grad(z.square().sum(), wanted)):
        torch.testing.assert_close(mine, formula)


@pytest.mark.parametrize("again", ["full", "selective"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_recomputed_activations_give_the_same_gradients(kind, again):
    found = []
    for mode in ("none", again):
        model = moved(LoRAConfig(kind=kind, rank=4).apply(model_of(), seed=0)).train()
        model.stack.checkpoint_activations = mode
        CausalLMConfig().build().losses(model, batch()).sums["model"].backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_frozen_matrices_are_held_in_the_precision_they_compute_in():
    exact, held = (LoRAConfig(rank=4).apply(model_of(), seed=0) for _ in range(2))
    for model in (exact, held):
        model.compute_dtype = torch.bfloat16
    hold_frozen(held)
    frozen = {name: p for name, p in held.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in frozen.values() if p.ndim > 1} == {torch.bfloat16}
    assert {p.dtype for p in held.parameters() if p.requires_grad} == {torch.float32}
    tokens = batch()["tokens"]
    torch.testing.assert_close(held(tokens), exact(tokens), rtol=0, atol=0)     # they were cast so at each use


def test_without_adapters_the_model_is_the_one_it_was():
    model = model_of()
    before = model(batch()["tokens"])
    moved(LoRAConfig(rank=4).apply(model, seed=0))
    after = model(batch()["tokens"])
    with without_adapters(model):
        torch.testing.assert_close(model(batch()["tokens"]), before, rtol=0, atol=0)
    torch.testing.assert_close(model(batch()["tokens"]), after, rtol=0, atol=0)
    assert (after - before).abs().max() > 0.01


def test_what_a_model_writes_while_it_is_trained_is_written_with_its_adapter():
    model = moved(LoRAConfig(rank=4).apply(model_of(), seed=0)).eval()
    tokens = batch(rows=2)["tokens"]
    from dougong.generate.cache import KVCache

    read = Engine(model).read_each(tokens, KVCache())
    torch.testing.assert_close(read, model(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "base"), KINDS)
def test_what_it_writes_with_in_16_bits_was_merged_from_what_was_trained_and_rounded_once(kind, base):
    model = moved(LoRAConfig(kind=kind, base=base, rank=4).apply(model_of(), seed=0)).eval()
    expected = copy.deepcopy(model)
    LoRAConfig(kind=kind, base=base, rank=4).merge(expected)
    ready = _for_inference(model, Runtime(dtype=torch.bfloat16))
    found = dict(ready.named_parameters())
    assert found.keys() == dict(expected.named_parameters()).keys() and adapters(model) and not adapters(ready)
    for name, parameter in expected.named_parameters():
        assert torch.equal(found[name], parameter.to(torch.bfloat16)) and not found[name].requires_grad, name


def test_an_adapter_depends_on_seed_and_name_alone():
    one, other = (LoRAConfig(rank=4, targets=targets).apply(model_of(), seed=7) for targets in ((), ("*.query",)))
    name = "stack.1.attention.query"
    torch.testing.assert_close(adapters(one)[name].lora_a, adapters(other)[name].lora_a, rtol=0, atol=0)
    assert len(adapters(other)) == 2
    a = adapters(one)[name].lora_a.detach()
    assert a.std() == pytest.approx((1 / (3 * 32)) ** 0.5, rel=0.15)


def test_patterns_choose_what_is_adapted_and_what_is_trained_whole():
    model = LoRAConfig(rank=4, targets=("*.attention.*",), also=("*norm.weight", "stem.tokens.weight")).apply(
        model_of(), seed=0)
    assert {name.split(".")[-1] for name in adapters(model)} == {"query", "key", "value", "output"}
    assert {name.rpartition(".")[2] for name in moving(model)} == {"lora_a", "lora_b", "weight"}
    assert model.stem.tokens.weight.requires_grad and model.norm.weight.requires_grad
    CausalLMConfig().build().losses(model, batch()).sums["model"].backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in moving(model).values() if p.ndim == 1)


@pytest.mark.parametrize(("settings", "says"), [
    ({"targets": ("*.querry",)}, "matches no matrix"), ({"also": ("*.nrom",)}, "matches no parameter"),
    ({"targets": ("head",)}, "cannot be adapted"), ({"rank": None}, "rank=16"),
    ({"targets": ("*.up",), "also": ("*.up.weight",)}, "one of them is enough")])
def test_settings_that_mean_nothing_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        LoRAConfig(**{"rank": 4, **settings}).apply(model_of(), seed=0)


def test_a_frozen_router_goes_on_choosing_in_float32():
    config = FAMILIES["qwen3_moe"](**{k: v for k, v in SIZES.items() if k != "ffn_dim"}, num_kv_heads=2, head_dim=16,
                                   num_experts=4, top_k=2)
    model = LoRAConfig(rank=4, targets=("*.attention.*",)).apply(model_of(config), seed=0)
    model.compute_dtype = torch.bfloat16
    hold_frozen(model)
    dtypes = {name: p.dtype for name, p in model.named_parameters() if p.ndim > 1 and not p.requires_grad}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == \
        {name for name in dtypes if name.endswith("router.weight")} != set()


def test_experts_are_refused_by_name_and_attention_beside_them_is_adapted():
    config = FAMILIES["qwen3_moe"](**{k: v for k, v in SIZES.items() if k != "ffn_dim"}, num_kv_heads=2, head_dim=16,
                                   num_experts=4, top_k=2)
    with pytest.raises(ConfigError, match=r"experts .*\"adapt\.targets=\[.\*\.attention\.\*.\]\"$"):
        LoRAConfig(rank=4).apply(model_of(config), seed=0)
    with pytest.raises(ConfigError, match="stacks of matrices"):
        LoRAConfig(rank=4, targets=("*.experts",)).apply(model_of(config), seed=0)
    assert len(adapters(LoRAConfig(rank=4, targets=("*.attention.*",)).apply(model_of(config), seed=0))) == 8


@pytest.mark.parametrize(("kind", "base"), KINDS)
def test_on_the_meta_device_it_has_the_same_shapes(kind, base):
    with torch.device("meta"):
        model = QWEN3.build()
    adapt = LoRAConfig(kind=kind, rank=4, base=base)
    shapes = {name: t.shape for name, t in moving(adapt.apply(model, seed=0)).items()}
    assert shapes == {name: t.shape for name, t in moving(adapt.apply(model_of(), seed=0)).items()}
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])


def test_one_optimiser_step_moves_the_adapter_and_nothing_else():
    model = LoRAConfig(rank=4).apply(model_of(), seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AdamWConfig(lr=0.01).build(model)
    CausalLMConfig().build().losses(model, batch()).sums["model"].backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.endswith((".lora_a", ".lora_b")) for name in changed)
    assert any(type(part) is Linear for part in model_of().modules())

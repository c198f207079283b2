"""What every model family must do. A new family adds a row to `LANGUAGE_MODELS`.

Equality with an independent implementation is in tests/unit/interop/test_parity.py, for the families that
have one.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dougong.core.config import from_dict, json_schema, to_dict
from dougong.core.errors import ConfigError
from dougong.models import FAMILIES, count
from dougong.models.protocols import LanguageModel, Model
from dougong.nn.attention_kernels import explicit, fused

SMALL = {"vocab_size": 61, "context": 40, "dim": 48, "num_layers": 3}
FLAT = SMALL | {"num_heads": 4}
HEADS = {"num_heads": 4, "num_kv_heads": 2}
LANGUAGE_MODELS = {
    "gpt2": ("gpt2", FLAT),
    "gpt2 untied, no biases": ("gpt2", FLAT | {"tied": False, "bias": False}),
    "llama": ("llama", FLAT | {"num_kv_heads": 2}),
    "llama biases": ("llama", FLAT | {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "qwen3": ("qwen3", FLAT | {"num_kv_heads": 1, "head_dim": 16}),
    "qwen3 windows": ("qwen3", FLAT | {"window": 5, "full_layers": 1}),
    "qwen3_moe": ("qwen3_moe", FLAT | {"num_experts": 6, "top_k": 2, "ffn_dim": 20, "num_kv_heads": 2}),
    "nano": ("nano", FLAT),
    "nano experts, balanced": ("nano", FLAT | {"feed_forward": {
        "kind": "moe", "num_experts": 5, "top_k": 2, "ffn_dim": 16, "shared_experts": 1, "score": "sigmoid"}}),
    "nano everything": ("nano", FLAT | {"window": 4, "window_pattern": "SL", "value_embeddings": "alternate",
                                        "soft_cap": 5.0, "tied": True}),
    "decoder": ("decoder", SMALL | {"attention": HEADS}),
    "decoder alibi, six heads, windows": (
        "decoder", SMALL | {"attention": {"num_heads": 6, "num_kv_heads": 3}, "position": "alibi",
                            "window": 6, "window_pattern": "SSL", "value_embeddings": "all"}),
    "decoder sinusoidal, post-norm": (
        "decoder", SMALL | {"attention": HEADS, "position": "sinusoidal", "norm_placement": "post",
                            "norm": {"kind": "layer_norm", "bias": False}, "feed_forward": "relu2"}),
    "decoder no position, x0": (
        "decoder", SMALL | {"attention": HEADS | {"qk_norm": "plain"}, "position": "none", "residual": "x0",
                            "norm": {"kind": "layer_norm", "learned": False}, "tied": False,
                            "feed_forward": {"kind": "gelu", "approximate": "none"}}),
    "decoder learned positions, qk-norm": (
        "decoder", SMALL | {"attention": HEADS | {"qk_norm": "learned", "bias": True}, "position": "learned",
                            "embedding_norm": True, "residual": "x0", "output_init": "zero",
                            "init_std": None}),
}
every = pytest.mark.parametrize("name", LANGUAGE_MODELS)


def config_of(name):
    kind, values = LANGUAGE_MODELS[name]
    return from_dict(FAMILIES[kind], values)


def model_of(name, dtype=torch.float64):
    """A model of random weights (not its initial ones, which may be zero). In float64, where exactness
    shows."""
    model = config_of(name).build()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() > 1 else 1.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    model.compute_dtype = dtype
    return model.to(dtype).eval()


def tokens_of(rows=2, T=20, seed=5):
    return torch.randint(0, 61, (rows, T), generator=torch.Generator().manual_seed(seed))


def assert_close(a, b, tolerance=1e-9):
    """float64 sums of a few hundred terms in another order differ by about 1e-13; 1e-9 is a wide margin."""
    assert a.shape == b.shape and torch.isfinite(a).all() and torch.isfinite(b).all()
    assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


def assert_unchanged(name, a, b):
    """Bit for bit; with experts to rounding, as an expert's product has as many rows as tokens chose it."""
    if "moe" in str(LANGUAGE_MODELS[name]):
        assert_close(a, b, tolerance=1e-13)
    else:
        assert torch.equal(a, b)


@every
def test_it_meets_the_protocol_and_its_shapes(name):
    model, tokens = model_of(name), tokens_of()
    assert isinstance(model, LanguageModel) and model.config == config_of(name)
    hidden = model.hidden(tokens)
    assert hidden.shape == (2, 20, 48) and hidden.dtype == torch.float64
    assert model(tokens).shape == (2, 20, 61)
    assert torch.equal(model.head(hidden), model(tokens))
    assert model.head(hidden[0, :3]).shape == (3, 61), "the head takes any leading axes"
    assert list(model.stack) == ["0", "1", "2"]
    assert model.get_submodule("stack.2.attention") and model.get_submodule("stack.2.feed_forward")


@every
def test_the_config_survives_json_and_has_a_schema(name):
    config = config_of(name)
    assert from_dict(type(config), to_dict(config)) == config
    assert json_schema(type(config))["properties"]["vocab_size"]["description"]


@every
def test_a_later_token_changes_nothing_earlier(name):
    model, tokens = model_of(name), tokens_of()
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 61
    before, after = model(tokens), model(changed)
    assert_unchanged(name, before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])


@every
def test_packed_documents_do_not_see_each_other(name):
    model = model_of(name)
    first, second = tokens_of(1, 7, seed=6), tokens_of(1, 13, seed=7)
    packed = torch.cat([first, second], dim=1)
    segment = torch.tensor([[4] * 7 + [9] * 13])
    together = model(packed, segment_BT=segment)
    assert_close(together[:, :7], model(first))
    # RoPE counts on across the row; only distances matter, but its angles are rounded to float32.
    assert_close(together[:, 7:], model(second), tolerance=1e-5)
    elsewhere = torch.cat([(first + 1) % 61, second], dim=1)
    assert_unchanged(name, model(elsewhere, segment_BT=segment)[:, 7:], together[:, 7:])
    # Without segments the second document reads the first, else this test would prove nothing.
    assert (model(packed)[:, 7:] - model(second)).abs().max() > 1e-3


class ReferenceCache:
    """The cache protocol in its plainest form: everything is kept and concatenated."""

    def __init__(self, start_B=None):
        self.length, self.start_B, self.held = 0, start_B, {}

    def update(self, layer, k_BKTH, v_BKTH):
        if layer in self.held:
            old_k, old_v = self.held[layer]
            k_BKTH, v_BKTH = torch.cat([old_k, k_BKTH], 2), torch.cat([old_v, v_BKTH], 2)
        self.held[layer] = k_BKTH, v_BKTH
        return k_BKTH, v_BKTH

    def advance(self, T):
        self.length += T


@every
def test_cached_equals_uncached_in_any_pieces(name):
    model, tokens = model_of(name), tokens_of()
    whole = model(tokens)
    cache = ReferenceCache()
    pieces = [model(tokens[:, a:b], cache=cache) for a, b in [(0, 6), (6, 7), (7, 8), (8, 13), (13, 20)]]
    assert cache.length == 20 and len(cache.held) == 3
    assert_close(torch.cat(pieces, dim=1), whole)


@every
@pytest.mark.parametrize("kernel", [explicit, fused])
def test_left_padded_rows_equal_rows_alone(name, kernel):
    model = model_of(name)
    for block in model.stack.values():
        block.attention.kernel = kernel
    short, long = tokens_of(1, 9, seed=8), tokens_of(1, 14, seed=9)
    padded = torch.cat([torch.cat([torch.full((1, 5), 60), short], 1), long])
    cache = ReferenceCache(start_B=torch.tensor([5, 0]))
    prefill = model(padded[:, :11], cache=cache)
    steps = [model(padded[:, t:t + 1], cache=cache) for t in range(11, 14)]
    logits = torch.cat([prefill, *steps], dim=1)
    assert torch.isfinite(logits).all(), "padding may be rubbish, but never NaN"
    assert_close(logits[:1, 5:], model(short))
    assert_close(logits[1:], model(long))


@every
def test_the_gradient_reaches_every_parameter(name):
    model, tokens = model_of(name), tokens_of()
    F.cross_entropy(model(tokens).flatten(0, 1), tokens_of(seed=11).flatten()).backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), path
        if not path.endswith(("key.bias", "position.weight")):
            assert parameter.grad.abs().max() > 1e-12, f"no gradient reaches {path}"
    # A bias on keys adds one number to all scores of a query, which softmax ignores, unless positions or
    # norms turn it.


@every
def test_weights_come_from_seed_and_name_whatever_the_device_of_the_build(name):
    config = config_of(name)
    plain = config.build()
    plain.initialise(7)
    with torch.device("meta"):
        late = config.build()
    assert all(p.is_meta for p in late.parameters())
    late.to_empty(device="cpu")
    late.initialise(7)
    assert plain.state_dict().keys() == late.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), late.state_dict().values()))
    assert all(torch.isfinite(p).all() for p in plain.parameters())
    assert torch.equal(plain(tokens_of()), late(tokens_of()))
    other = config.build()
    other.initialise(8)
    assert not torch.equal(plain.stem.tokens.weight, other.stem.tokens.weight)


@every
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    from safetensors.torch import load_file, save_file

    model, tokens = model_of(name, torch.float32), tokens_of()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        loaded = config_of(name).build()
    loaded.to_empty(device="cpu")
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(loaded.eval()(tokens), model(tokens))


@every
def test_a_copy_is_a_model_of_its_own(name):
    model, tokens = model_of(name), tokens_of()
    twin = copy.deepcopy(model)
    before = model(tokens)
    assert torch.equal(twin(tokens), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert torch.equal(model(tokens), before)
    assert not torch.allclose(twin(tokens), before)


@every
def test_counts_are_those_of_the_real_model(name, monkeypatch):
    monkeypatch.setattr("dougong.nn.moe._has_kernel", lambda *_: False)   # PyTorch's counter sees no grouped product
    config, model = config_of(name), model_of(name, torch.float32)
    counted = count.parameters(config)
    assert counted["total"] == sum(p.numel() for p in model.parameters()) == sum(counted["by_part"].values())
    assert (count.active_parameters(config) < counted["total"]) == ("moe" in str(LANGUAGE_MODELS[name]))
    for block in model.stack.values():
        block.attention.kernel = explicit   # PyTorch's counter sees its products
    tokens = tokens_of(2, 40)
    with FlopCounterMode(display=False) as forward:
        logits = model(tokens)
    assert forward.get_total_flops() == 2 * count.forward_flops(config, 40)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops(), "two products for each"


@every
def test_bf16_computes_in_bf16_and_keeps_float32_weights(name):
    model, tokens = model_of(name, torch.float32), tokens_of()
    exact = model(tokens)
    model.compute_dtype = torch.bfloat16
    seen = []
    for block in model.stack.values():
        block.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    logits = model(tokens)
    assert logits.dtype == torch.bfloat16 and seen == [torch.bfloat16] * 3
    assert all(p.dtype == torch.float32 for p in model.parameters())
    # Rounding is 2^-9 relative; these weights are drawn so large that three layers amplify it.
    assert (logits.float() - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "qwen3_moe", "nano", "decoder"])
def test_missing_sizes_are_named(kind):
    with pytest.raises(ConfigError, match=r"vocab_size.*dim.*num_layers"):
        FAMILIES[kind]().build()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "qwen3_moe", "nano"])
def test_heads_that_do_not_divide_the_width_get_a_suggestion(kind):
    with pytest.raises(ConfigError, match=r"dim=48.*num_heads=5.*Try num_heads=4"):
        from_dict(FAMILIES[kind], FLAT | {"num_heads": 5}).build()


OTHER_MODELS = {
    "linear": ("linear", {"in_features": 5, "init_std": 0.1, "bias": True},
               lambda m: m(torch.rand(4, 5)), (4, 1)),
    "cnn": ("cnn", {"num_classes": 10}, lambda m: m(torch.rand(4, 8, 8)), (4, 10)),
    "cnn colour": ("cnn", {"num_classes": 3, "in_channels": 3, "channels": [8]},
                   lambda m: m(torch.rand(4, 3, 9, 7)), (4, 3)),
    "gan generator": ("gan", {"image_size": 8}, lambda m: m.generator(torch.randn(4, 32)), (4, 1, 8, 8)),
    "gan discriminator": ("gan", {"image_size": 8}, lambda m: m.discriminator(torch.rand(4, 8, 8)), (4,)),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_models_without_tokens(name):
    kind, values, call, shape = OTHER_MODELS[name]
    config = from_dict(FAMILIES[kind], values)
    assert from_dict(FAMILIES[kind], to_dict(config)) == config
    with torch.device("meta"):
        model = config.build()
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(7)   # what `to_empty` leaves is anything
    model.initialise(0)
    assert all(((b == 0) | (b == 1)).all() for b in model.buffers())
    assert isinstance(model, Model)
    output = call(model)
    assert output.shape == shape and torch.isfinite(output).all()
    again = config.build()
    again.initialise(0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    output.square().sum().backward()
    reached = {path.split(".")[0] for path, p in model.named_parameters() if p.grad is not None}
    children = {child for child, _ in model.named_children()} - {"dropout"}
    assert reached == ({name.split()[1]} if kind == "gan" else children)
    assert count.parameters(config)["total"] == sum(p.numel() for p in model.parameters())
    model.compute_dtype = torch.bfloat16
    assert torch.isfinite(call(model)).all()


def test_batch_statistics_are_declared_and_really_do_not_add():
    model = FAMILIES["cnn"](num_classes=10, dropout=0.0).build()
    model.initialise(0)
    assert "BatchNorm" in model.not_additive
    pixels = torch.rand(8, 8, 8)
    assert not torch.allclose(model(pixels)[:4], model(pixels[:4]), atol=1e-4)
    for kind, values in (("linear", {"in_features": 5}), ("gan", {"image_size": 8})):
        assert FAMILIES[kind](**values).build().not_additive is None


@pytest.mark.parametrize(("kind", "word"), [
    ("linear", "in_features"), ("cnn", "num_classes"), ("gan", "image_size")])
def test_missing_sizes_of_other_models_are_named(kind, word):
    with pytest.raises(ConfigError, match=word):
        FAMILIES[kind]().build()


def test_a_width_that_halves_to_nothing_is_refused():
    with pytest.raises(ConfigError, match="dim"):
        from_dict(FAMILIES["gan"], {"image_size": 8, "dim": 1})
    assert FAMILIES["gan"](image_size=8, dim=2).build()(torch.randn(3, 32)).shape == (3, 1, 8, 8)

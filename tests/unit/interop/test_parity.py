"""Logits and every gradient against transformers with random weights, and configs and tensors there and
back."""

import pytest
import torch
import torch.nn.functional as F

from dougong.core.errors import CheckpointError, ConfigError
from dougong.interop.maps import MAPS

transformers = pytest.importorskip("transformers")

GPT2 = {"vocab_size": 61, "n_positions": 24, "n_embd": 48, "n_layer": 2, "n_head": 4}
LLAMA = {"vocab_size": 61, "max_position_embeddings": 32, "hidden_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 80}
QWEN3 = LLAMA | {"head_dim": 16}
CASES = {
    "gpt2": ("gpt2", GPT2),
    "gpt2 three heads, own inner width, exact gelu": (
        "gpt2", GPT2 | {"n_head": 3, "n_inner": 100, "activation_function": "gelu",
                        "layer_norm_epsilon": 1e-3}),
    "gpt2 untied, one layer": ("gpt2", GPT2 | {"tie_word_embeddings": False, "n_layer": 1, "n_head": 1}),
    "llama": ("llama", LLAMA),
    "llama grouped 3:1, head width apart, tied": (
        "llama", LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 14,
                          "tie_word_embeddings": True}),
    "llama one kv head, five heads, biases, theta": (
        "llama", LLAMA | {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1,
                          "attention_bias": True, "mlp_bias": True,
                          "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "qwen3 multi-head, tied": ("qwen3", QWEN3 | {"tie_word_embeddings": True}),
    "qwen3 grouped 7:1, head width apart": (
        "qwen3", QWEN3 | {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 10}),
    "qwen3 biases, theta, large eps": (
        "qwen3", QWEN3 | {"num_key_value_heads": 2, "attention_bias": True, "rms_norm_eps": 1e-3,
                          "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3 sliding window from layer 1": (
        "qwen3", QWEN3 | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
                          "num_hidden_layers": 3}),
}
QWEN3_MOE = QWEN3 | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
CASES |= {
    "qwen3_moe": ("qwen3_moe", QWEN3_MOE),
    "qwen3_moe normalised, grouped, three experts each, windows": (
        "qwen3_moe", QWEN3_MOE | {"norm_topk_prob": True, "num_key_value_heads": 2, "num_experts_per_tok": 3,
                                  "attention_bias": True, "tie_word_embeddings": True, "use_sliding_window": True,
                                  "sliding_window": 5}),
}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
NO_IDS = {"bos_token_id": None, "eos_token_id": None}   # the defaults lie outside these small vocabularies


def reference(kind: str, keys: dict, seed: int = 0):
    """A transformers model of random weights, large enough that biases, scales and positions all matter."""
    no_dropout = NO_DROPOUT if kind == "gpt2" else {}
    config = transformers.AutoConfig.for_model(kind, **keys, **NO_IDS, **no_dropout)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.2 * scale if is_norm else 0.15 * scale)
    return model


def ours_from(theirs, kind: str):
    config = MAPS[kind].config_from_hf(theirs.config.to_dict())
    model = config.build()
    model.load_state_dict(MAPS[kind].tensors_from_hf(config, theirs.state_dict()))
    return model


def run(model, tokens, targets):
    """Logits and, by stored name, the gradient of the summed cross-entropy."""
    output = model(tokens)
    logits = getattr(output, "logits", output)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def error(a, b):
    assert torch.isfinite(a).all() and torch.isfinite(b).all()
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()


# transformers computes norms and softmax in float32 whatever the model's type, so both sides run in float32
# and are judged by our own model in float64. Float32 rounds at 6e-8; two or three layers and sums of up to a
# few hundred terms let that grow to about 1e-6 of the largest value. A wrong constant (say eps 1e-6 for 1e-5)
# shows at 1e-5 and more.
TOLERANCE = 5e-6


@pytest.mark.parametrize("case", CASES)
def test_logits_and_all_gradients_equal_transformers(case):
    kind, keys = CASES[case]
    theirs = reference(kind, keys)
    tokens, targets = torch.randint(0, 61, (2, 2, 19), generator=torch.Generator().manual_seed(1))
    ours, exact = ours_from(theirs, kind), ours_from(theirs, kind).double()
    exact.compute_dtype = torch.float64
    their_logits, their_gradients = run(theirs, tokens, targets)
    our_logits, our_gradients = run(ours, tokens, targets)
    exact_logits, exact_gradients = run(exact, tokens, targets)

    assert error(their_logits, exact_logits) < TOLERANCE
    assert error(our_logits, exact_logits) < TOLERANCE
    family = MAPS[kind]
    config = ours.config
    their_gradients = family.apart(their_gradients)
    our_gradients = family.tensors_to_hf(config, our_gradients)
    exact_gradients = family.tensors_to_hf(config, exact_gradients)
    assert set(our_gradients) == set(their_gradients)
    largest = max(gradient.abs().max() for gradient in exact_gradients.values())
    for name, gradient in their_gradients.items():
        # A gradient that is 0 in theory (the bias of keys) is rounding alone: it is judged by the largest of
        # all.
        scale = max(exact_gradients[name].abs().max(), 1e-3 * largest)
        for mine in (gradient, our_gradients[name]):
            assert torch.isfinite(mine).all()
            assert (mine.double() - exact_gradients[name]).abs().max() / scale < TOLERANCE, name


@pytest.mark.parametrize("case", CASES)
def test_import_export_import_is_bit_identical(case):
    kind, keys = CASES[case]
    theirs, family = reference(kind, keys), MAPS[kind]
    config = family.config_from_hf(theirs.config.to_dict())
    tensors = family.tensors_from_hf(config, theirs.state_dict())
    exported, stored = family.tensors_to_hf(config, tensors), family.apart(theirs.state_dict())
    for name, tensor in exported.items():
        assert torch.equal(tensor, stored[name]), name
    left = set(stored) - set(exported)
    assert left <= {"lm_head.weight"} and (not left or config.tied)
    again = family.tensors_from_hf(family.config_from_hf(family.config_to_hf(config)), exported)
    assert again.keys() == tensors.keys() and all(torch.equal(again[n], tensors[n]) for n in tensors)


@pytest.mark.parametrize("case", CASES)
def test_an_exported_config_builds_the_same_model_in_transformers(case, tmp_path):
    kind, keys = CASES[case]
    theirs, family = reference(kind, keys), MAPS[kind]
    config = family.config_from_hf(theirs.config.to_dict())
    exported = family.config_to_hf(config)
    assert family.config_from_hf(exported) == config
    import json

    (tmp_path / "config.json").write_text(json.dumps(exported))
    rebuilt = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path), attn_implementation="eager")
    rebuilt.load_state_dict(theirs.state_dict())
    tokens = torch.randint(0, 61, (1, 19))
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(tokens).logits, theirs.eval()(tokens).logits)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "qwen3_moe"])
def test_keys_absent_from_a_config_have_transformers_defaults(kind):
    defaults = transformers.AutoConfig.for_model(kind).to_dict()
    assert MAPS[kind].config_from_hf({"model_type": kind}) == MAPS[kind].config_from_hf(defaults)


def test_legacy_rope_key_is_read_and_written():
    legacy = {"model_type": "llama", **LLAMA, "rope_theta": 500000.0}
    config = MAPS["llama"].config_from_hf(legacy)
    assert config.rope_theta == 500000.0
    assert MAPS["llama"].config_to_hf(config)["rope_theta"] == 500000.0


@pytest.mark.parametrize(("kind", "keys", "word"), [
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("qwen3", {"model_type": "qwen2"}, "model_type"),
    ("qwen3", {"use_sliding_window": True, "num_hidden_layers": 2,
               "layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
])
def test_a_config_that_computes_something_else_is_refused(kind, keys, word):
    with pytest.raises(ConfigError, match=word):
        MAPS[kind].config_from_hf({"model_type": kind} | keys)


def test_a_bare_gpt2_checkpoint_with_old_buffers_is_read():
    theirs = reference("gpt2", GPT2)
    bare = {name.removeprefix("transformer."): t for name, t in theirs.state_dict().items()}
    del bare["lm_head.weight"]
    bare |= {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24) for i in range(2)}
    config = MAPS["gpt2"].config_from_hf(theirs.config.to_dict())
    full = MAPS["gpt2"].tensors_from_hf(config, theirs.state_dict())
    read = MAPS["gpt2"].tensors_from_hf(config, bare)
    assert read.keys() == full.keys() and all(torch.equal(read[n], full[n]) for n in full)


def test_tensors_that_do_not_belong_are_named():
    theirs = reference("llama", LLAMA)
    config = MAPS["llama"].config_from_hf(theirs.config.to_dict())
    tensors = theirs.state_dict()
    tensors["model.layers.0.self_attn.w.weight"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(CheckpointError, match="q_proj"):
        MAPS["llama"].tensors_from_hf(config, tensors)


def test_a_tied_config_with_a_head_of_its_own_is_refused():
    theirs = reference("llama", LLAMA)
    config = MAPS["llama"].config_from_hf(theirs.config.to_dict() | {"tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        MAPS["llama"].tensors_from_hf(config, theirs.state_dict())


def test_experts_are_stored_one_by_one_as_published(tmp_path):
    from safetensors.torch import load_file

    theirs = reference("qwen3_moe", QWEN3_MOE)
    theirs.save_pretrained(tmp_path)
    published, family = load_file(tmp_path / "model.safetensors"), MAPS["qwen3_moe"]
    config = family.config_from_hf(theirs.config.to_dict())
    exported = family.tensors_to_hf(config, family.tensors_from_hf(config, published))
    assert "model.layers.1.mlp.experts.5.down_proj.weight" in exported and exported.keys() == published.keys()
    assert all(torch.equal(exported[name], published[name]) for name in published)


def test_export_refuses_a_router_with_a_bias():
    config = MAPS["qwen3_moe"].config_from_hf(QWEN3_MOE)
    import dataclasses

    with pytest.raises(ConfigError, match="balance=none"):
        MAPS["qwen3_moe"].config_to_hf(dataclasses.replace(config, balance="bias"))


def test_export_refuses_what_gpt2_cannot_express():
    config = MAPS["gpt2"].config_from_hf(GPT2)
    import dataclasses

    with pytest.raises(ConfigError, match="bias"):
        MAPS["gpt2"].config_to_hf(dataclasses.replace(config, bias=False))

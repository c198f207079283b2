"""Qwen3 in Hugging Face's words: Llama's names, and a norm for queries and keys."""

from collections.abc import Mapping
from typing import Any

from dougong.core.errors import ConfigError
from dougong.interop.maps.family_map import FamilyMap, Stored, linear, refuse, rope_keys, rope_theta
from dougong.interop.maps.llama import layer
from dougong.models.families.qwen3 import Qwen3Config

SHORT, LONG = "sliding_attention", "full_attention"


def config_from_hf(given: Mapping[str, Any]) -> Qwen3Config:
    """config.json as a `Qwen3Config`; keys that are absent have transformers' defaults."""
    refuse(given, "model_type", ("qwen3",), "qwen3")
    refuse(given, "hidden_act", ("silu",), "silu")
    num_layers, num_heads = given.get("num_hidden_layers", 32), given.get("num_attention_heads", 32)
    window, full_layers = _window(given, num_layers)
    return Qwen3Config(
        vocab_size=given.get("vocab_size", 151936), context=given.get("max_position_embeddings", 32768),
        dim=given.get("hidden_size", 4096), num_layers=num_layers, num_heads=num_heads,
        num_kv_heads=given.get("num_key_value_heads", 32) or num_heads, head_dim=given.get("head_dim", 128),
        ffn_dim=given.get("intermediate_size", 22016), rope_theta=rope_theta(given),
        norm_eps=given.get("rms_norm_eps", 1e-6), tied=given.get("tie_word_embeddings", False),
        attention_bias=given.get("attention_bias", False), window=window, full_layers=full_layers,
        attention_dropout=given.get("attention_dropout") or 0.0,
        init_std=given.get("initializer_range", 0.02))


def _window(given: Mapping[str, Any], num_layers: int) -> tuple[int | None, int | None]:
    """Window and number of layers before the first short-sighted one, or two Nones where every layer sees
    all."""
    if not given.get("use_sliding_window", False):
        return None, None
    first = min(given.get("max_window_layers", 28), num_layers)
    kinds = given.get("layer_types") or [LONG] * first + [SHORT] * (num_layers - first)
    first = kinds.count(LONG)
    if kinds != [LONG] * first + [SHORT] * (num_layers - first):
        raise ConfigError(f"config.json has layer_types={kinds!r}: Qwen3 here has {LONG} layers first and "
                          f"{SHORT} ones after.")
    if first == num_layers:
        return None, None
    return given.get("sliding_window", 4096), first


def config_to_hf(config: Qwen3Config) -> dict[str, Any]:
    """A `Qwen3Config` as config.json; dropouts that only training uses are left out."""
    section = config.decoder()
    num_heads, num_kv_heads, head_dim = section.attention.heads(config.dim)
    num_layers = config.num_layers or 0
    full_layers = num_layers if config.window is None else min(config.full_layers or 0, num_layers)
    return {"model_type": "qwen3", "architectures": [MAP.architecture],
            "vocab_size": config.vocab_size, "max_position_embeddings": config.context,
            "hidden_size": config.dim, "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "head_dim": head_dim,
            "intermediate_size": section.feed_forward.width(config.dim), "hidden_act": "silu",
            **rope_keys(config.rope_theta), "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tied,
            "attention_bias": config.attention_bias, "attention_dropout": config.attention_dropout,
            "use_sliding_window": config.window is not None, "sliding_window": config.window,
            "max_window_layers": full_layers,
            "layer_types": [LONG] * full_layers + [SHORT] * (num_layers - full_layers),
            "initializer_range": config.init_std, "dtype": "float32", "torch_dtype": "float32"}


def names(config: Qwen3Config) -> dict[str, Stored]:
    """Stored names and what they hold."""
    table = {"model.embed_tokens.weight": Stored(("stem.tokens.weight",))}
    for i in range(config.num_layers or 0):
        theirs, ours = f"model.layers.{i}", f"stack.{i}"
        table |= layer(theirs, ours, attention_bias=config.attention_bias, mlp_bias=False)
        table |= linear(f"{theirs}.self_attn.q_norm", f"{ours}.attention.query_norm", bias=False)
        table |= linear(f"{theirs}.self_attn.k_norm", f"{ours}.attention.key_norm", bias=False)
    table |= linear("model.norm", "norm", bias=False)
    return table if config.tied else table | {"lm_head.weight": Stored(("head.weight",))}


MAP = FamilyMap(architecture="Qwen3ForCausalLM", base_prefix="model.", config_from_hf=config_from_hf,
                config_to_hf=config_to_hf, names=names, ignored=(".rotary_emb.inv_freq",))

"""Llama in Hugging Face's words."""

from collections.abc import Mapping
from typing import Any

from dougong.interop.maps.family_map import FamilyMap, Stored, linear, refuse, rope_keys, rope_theta
from dougong.models.families.llama import LlamaConfig


def config_from_hf(given: Mapping[str, Any]) -> LlamaConfig:
    """config.json as a `LlamaConfig`; keys that are absent have transformers' defaults."""
    refuse(given, "model_type", ("llama",), "llama")
    refuse(given, "hidden_act", ("silu",), "silu")
    dim, num_heads = given.get("hidden_size", 4096), given.get("num_attention_heads", 32)
    return LlamaConfig(
        vocab_size=given.get("vocab_size", 32000), context=given.get("max_position_embeddings", 2048),
        dim=dim, num_layers=given.get("num_hidden_layers", 32), num_heads=num_heads,
        num_kv_heads=given.get("num_key_value_heads") or num_heads,
        head_dim=given.get("head_dim") or dim // num_heads, ffn_dim=given.get("intermediate_size", 11008),
        rope_theta=rope_theta(given), norm_eps=given.get("rms_norm_eps", 1e-6),
        tied=given.get("tie_word_embeddings", False), attention_bias=given.get("attention_bias", False),
        mlp_bias=given.get("mlp_bias", False), attention_dropout=given.get("attention_dropout") or 0.0,
        init_std=given.get("initializer_range", 0.02))


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """A `LlamaConfig` as config.json; dropouts that only training uses are left out."""
    section = config.decoder()
    num_heads, num_kv_heads, head_dim = section.attention.heads(config.dim)
    return {"model_type": "llama", "architectures": [MAP.architecture],
            "vocab_size": config.vocab_size, "max_position_embeddings": config.context,
            "hidden_size": config.dim, "num_hidden_layers": config.num_layers,
            "num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "head_dim": head_dim,
            "intermediate_size": section.feed_forward.width(config.dim), "hidden_act": "silu",
            **rope_keys(config.rope_theta), "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tied,
            "attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias,
            "attention_dropout": config.attention_dropout, "initializer_range": config.init_std,
            "dtype": "float32", "torch_dtype": "float32"}


def names(config: LlamaConfig) -> dict[str, Stored]:
    """Stored names and what they hold."""
    table = {"model.embed_tokens.weight": Stored(("stem.tokens.weight",))}
    for i in range(config.num_layers or 0):
        table |= layer(f"model.layers.{i}", f"stack.{i}", attention_bias=config.attention_bias,
                       mlp_bias=config.mlp_bias)
    table |= linear("model.norm", "norm", bias=False)
    return table if config.tied else table | {"lm_head.weight": Stored(("head.weight",))}


def layer(theirs: str, ours: str, *, attention_bias: bool, mlp_bias: bool) -> dict[str, Stored]:
    """One layer, as Llama and its relatives call it."""
    table = attention(theirs, ours, bias=attention_bias)
    for name in ("gate", "up", "down"):
        table |= linear(f"{theirs}.mlp.{name}_proj", f"{ours}.feed_forward.{name}", bias=mlp_bias)
    return table


def attention(theirs: str, ours: str, *, bias: bool) -> dict[str, Stored]:
    """A layer's norms and its attention."""
    table = linear(f"{theirs}.input_layernorm", f"{ours}.attention_norm", bias=False)
    table |= linear(f"{theirs}.post_attention_layernorm", f"{ours}.feed_forward_norm", bias=False)
    for short, name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
        table |= linear(f"{theirs}.self_attn.{short}_proj", f"{ours}.attention.{name}", bias=bias)
    return table


MAP = FamilyMap(architecture="LlamaForCausalLM", base_prefix="model.", config_from_hf=config_from_hf,
                config_to_hf=config_to_hf, names=names, ignored=(".rotary_emb.inv_freq",))

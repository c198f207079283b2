"""Qwen3's mixture of experts in Hugging Face's words: Qwen3's names, and three matrices for each expert.

Published files hold every expert's matrices by themselves; transformers 5 joins them when it loads (`experts.
gate_up_proj`, `experts.down_proj`). Both are read; the published form is written.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dougong.core.errors import ConfigError
from dougong.interop.maps.family_map import FamilyMap, Stored, linear, refuse, rope_keys, rope_theta
from dougong.interop.maps.llama import attention
from dougong.models.families.qwen3_moe import Qwen3MoEConfig


def config_from_hf(given: Mapping[str, Any]) -> Qwen3MoEConfig:
    """config.json as a `Qwen3MoEConfig`; keys that are absent have transformers' defaults."""
    refuse(given, "model_type", ("qwen3_moe",), "qwen3_moe")
    refuse(given, "hidden_act", ("silu",), "silu")
    refuse(given, "decoder_sparse_step", (1,), 1)
    refuse(given, "mlp_only_layers", ([], None), None)
    num_heads = given.get("num_attention_heads", 32)
    return Qwen3MoEConfig(
        vocab_size=given.get("vocab_size", 151936), context=given.get("max_position_embeddings", 32768),
        dim=given.get("hidden_size", 2048), num_layers=given.get("num_hidden_layers", 24), num_heads=num_heads,
        num_kv_heads=given.get("num_key_value_heads", 4) or num_heads, head_dim=given.get("head_dim"),
        num_experts=given.get("num_experts", given.get("num_local_experts", 128)),
        top_k=given.get("num_experts_per_tok", 8), ffn_dim=given.get("moe_intermediate_size", 768),
        normalised=given.get("norm_topk_prob", False), rope_theta=rope_theta(given),
        norm_eps=given.get("rms_norm_eps", 1e-6), tied=given.get("tie_word_embeddings", False),
        attention_bias=given.get("attention_bias", False),
        window=given.get("sliding_window", 4096) if given.get("use_sliding_window", False) else None,
        attention_dropout=given.get("attention_dropout") or 0.0, init_std=given.get("initializer_range", 0.02))


def config_to_hf(config: Qwen3MoEConfig) -> dict[str, Any]:
    """A `Qwen3MoEConfig` as config.json; dropouts that only training uses are left out.

    Raises ConfigError for a model whose experts were chosen with a bias.
    """
    if config.balance != "none":
        raise ConfigError(f"balance={config.balance}: this model's router adds a bias that Hugging Face's Qwen3-MoE "
                          "has no place for, so an export would compute something else. Train with balance=none to "
                          "export.")
    section = config.decoder()
    num_heads, num_kv_heads, head_dim = section.attention.heads(config.dim)
    return {"model_type": "qwen3_moe", "architectures": [MAP.architecture],
            "vocab_size": config.vocab_size, "max_position_embeddings": config.context,
            "hidden_size": config.dim, "num_hidden_layers": config.num_layers,
            "num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "head_dim": head_dim,
            "num_experts": config.num_experts, "num_experts_per_tok": config.top_k,
            "moe_intermediate_size": section.feed_forward.width(config.dim), "norm_topk_prob": config.normalised,
            "decoder_sparse_step": 1, "mlp_only_layers": [], "hidden_act": "silu",
            **rope_keys(config.rope_theta), "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied,
            "attention_bias": config.attention_bias, "attention_dropout": config.attention_dropout,
            "use_sliding_window": config.window is not None, "sliding_window": config.window,
            "initializer_range": config.init_std, "dtype": "float32", "torch_dtype": "float32"}


def names(config: Qwen3MoEConfig) -> dict[str, Stored]:
    """Stored names and what they hold."""
    table = {"model.embed_tokens.weight": Stored(("stem.tokens.weight",))}
    for i in range(config.num_layers or 0):
        theirs, ours = f"model.layers.{i}", f"stack.{i}"
        table |= attention(theirs, ours, bias=config.attention_bias)
        table |= linear(f"{theirs}.self_attn.q_norm", f"{ours}.attention.query_norm", bias=False)
        table |= linear(f"{theirs}.self_attn.k_norm", f"{ours}.attention.key_norm", bias=False)
        table |= linear(f"{theirs}.mlp.gate", f"{ours}.feed_forward.router", bias=False)
        for name in ("gate", "up", "down"):
            for expert in range(config.num_experts):
                table[f"{theirs}.mlp.experts.{expert}.{name}_proj.weight"] = Stored(
                    (f"{ours}.feed_forward.experts.{name}",), expert=expert)
    table |= linear("model.norm", "norm", bias=False)
    return table if config.tied else table | {"lm_head.weight": Stored(("head.weight",))}


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Experts joined by transformers 5, in the published form."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, _, joined = name.rpartition(".")
        parts = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.get(joined)
        if parts is None or not prefix.endswith(".experts") or tensor.dim() != 3:
            found[name] = tensor
            continue
        for part, stack in zip(parts, tensor.chunk(len(parts), dim=1)):
            found |= {f"{prefix}.{expert}.{part}_proj.weight": matrix for expert, matrix in enumerate(stack)}
    return found


MAP = FamilyMap(architecture="Qwen3MoeForCausalLM", base_prefix="model.", config_from_hf=config_from_hf,
                config_to_hf=config_to_hf, names=names, ignored=(".rotary_emb.inv_freq",), apart=apart)

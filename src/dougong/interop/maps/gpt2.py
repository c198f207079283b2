"""GPT-2 in Hugging Face's words: matrices transposed (Conv1D), queries, keys and values in one."""

from collections.abc import Mapping
from typing import Any

from dougong.core.errors import ConfigError
from dougong.interop.maps.family_map import FamilyMap, Stored, refuse
from dougong.models.families.gpt2 import GPT2Config


def config_from_hf(given: Mapping[str, Any]) -> GPT2Config:
    """config.json as a `GPT2Config`; keys that are absent have transformers' defaults."""
    refuse(given, "model_type", ("gpt2",), "gpt2")
    refuse(given, "activation_function", ("gelu_new", "gelu_pytorch_tanh", "gelu"), "gelu_new")
    refuse(given, "scale_attn_weights", (True,), True)
    refuse(given, "scale_attn_by_inverse_layer_idx", (False,), False)
    refuse(given, "add_cross_attention", (False,), False)
    return GPT2Config(
        vocab_size=given.get("vocab_size", 50257), context=given.get("n_positions", 1024),
        dim=given.get("n_embd", 768), num_layers=given.get("n_layer", 12), num_heads=given.get("n_head", 12),
        ffn_dim=given.get("n_inner") or 4 * given.get("n_embd", 768),
        activation="gelu" if given.get("activation_function") == "gelu" else "gelu_new",
        norm_eps=given.get("layer_norm_epsilon", 1e-5), tied=given.get("tie_word_embeddings", True),
        embedding_dropout=given.get("embd_pdrop", 0.1), attention_dropout=given.get("attn_pdrop", 0.1),
        dropout=given.get("resid_pdrop", 0.1), init_std=given.get("initializer_range", 0.02))


def config_to_hf(config: GPT2Config) -> dict[str, Any]:
    """A `GPT2Config` as config.json. Raises ConfigError for bias=False, which GPT-2 cannot express."""
    if not config.bias:
        raise ConfigError("bias=False has no form in Hugging Face's GPT-2, whose matrices and norms all have "
                          "biases. Train with bias=True, or with the family llama or qwen3.")
    return {"model_type": "gpt2", "architectures": [MAP.architecture],
            "vocab_size": config.vocab_size, "n_positions": config.context, "n_ctx": config.context,
            "n_embd": config.dim, "n_layer": config.num_layers, "n_head": config.num_heads,
            "n_inner": config.ffn_dim or 4 * (config.dim or 0), "activation_function": config.activation,
            "layer_norm_epsilon": config.norm_eps, "tie_word_embeddings": config.tied,
            "embd_pdrop": config.embedding_dropout, "attn_pdrop": config.attention_dropout,
            "resid_pdrop": config.dropout, "initializer_range": config.init_std,
            "dtype": "float32", "torch_dtype": "float32"}


def names(config: GPT2Config) -> dict[str, Stored]:
    """Stored names and what they hold."""
    table = {"transformer.wte.weight": Stored(("stem.tokens.weight",)),
             "transformer.wpe.weight": Stored(("position.weight",))}
    for i in range(config.num_layers or 0):
        theirs, ours = f"transformer.h.{i}", f"stack.{i}"
        table |= _norm(f"{theirs}.ln_1", f"{ours}.attention_norm")
        fused = (f"{ours}.attention.{part}" for part in ("query", "key", "value"))
        table |= _conv1d(f"{theirs}.attn.c_attn", *fused)
        table |= _conv1d(f"{theirs}.attn.c_proj", f"{ours}.attention.output")
        table |= _norm(f"{theirs}.ln_2", f"{ours}.feed_forward_norm")
        table |= _conv1d(f"{theirs}.mlp.c_fc", f"{ours}.feed_forward.up")
        table |= _conv1d(f"{theirs}.mlp.c_proj", f"{ours}.feed_forward.down")
    table |= _norm("transformer.ln_f", "norm")
    return table if config.tied else table | {"lm_head.weight": Stored(("head.weight",))}


def _norm(theirs: str, ours: str) -> dict[str, Stored]:
    return {f"{theirs}.{kind}": Stored((f"{ours}.{kind}",)) for kind in ("weight", "bias")}


def _conv1d(theirs: str, *ours: str) -> dict[str, Stored]:
    return {f"{theirs}.weight": Stored(tuple(f"{name}.weight" for name in ours), transposed=True),
            f"{theirs}.bias": Stored(tuple(f"{name}.bias" for name in ours))}


MAP = FamilyMap(architecture="GPT2LMHeadModel", base_prefix="transformer.", config_from_hf=config_from_hf,
                config_to_hf=config_to_hf, names=names, ignored=(".attn.bias", ".attn.masked_bias"))

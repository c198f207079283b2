"""What a model is called in a GGUF file (llama.cpp's format): its keys, its tensors, and how their rows are ordered.

Llama's queries and keys have the rows of each head in another order: llama.cpp turns neighbouring values by an angle,
transformers and we the halves of a head. Qwen3's are stored as they are, since llama.cpp turns halves there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dougong.core.errors import CheckpointError, ConfigError
from dougong.interop.maps.family_map import FamilyMap


@dataclass(frozen=True)
class GGUFForm:
    """One model's form: `keys` go into the header, `tensors` name what each stored tensor joins."""

    architecture: str
    """llama.cpp's name of it"""
    keys: dict[str, Any]
    """metadata without the architecture's prefix"""
    tensors: dict[str, tuple[str, ...]]
    permuted: dict[str, int]
    """stored tensor -> heads, of those whose rows are reordered"""

    def stored(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors as the file holds them."""
        found = {}
        for name, ours in self.tensors.items():
            whole = [state[part] for part in ours]
            tensor = torch.cat(whole) if len(whole) > 1 else whole[0]
            found[name] = _interleaved(tensor, self.permuted[name]) if name in self.permuted else tensor
        return found

    def restored(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `stored`. Raises CheckpointError naming what is missing."""
        missing = [name for name in self.tensors if name not in stored]
        if missing:
            raise CheckpointError(f"the GGUF file lacks {missing[0]!r} and {len(missing) - 1} more of "
                                  f"{len(self.tensors)} tensors.")
        found = {}
        for name, ours in self.tensors.items():
            tensor = stored[name]
            tensor = _halves(tensor, self.permuted[name]) if name in self.permuted else tensor
            found |= dict(zip(ours, tensor.chunk(len(ours)) if len(ours) > 1 else (tensor,)))
        return found


def gguf_form(family: FamilyMap, config: Any) -> GGUFForm:
    """Raises ConfigError naming what llama.cpp's architecture has no place for."""
    hf = family.config_to_hf(config)
    return _FORMS[hf["model_type"]](config, hf)


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from (first halves, second halves) to pairs."""
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _halves(tensor: Tensor, heads: int) -> Tensor:
    return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _refuse(architecture: str, wrong: Mapping[str, bool]) -> None:
    names = [name for name, is_wrong in wrong.items() if is_wrong]
    if names:
        raise ConfigError(f"llama.cpp's {architecture} has no place for {', '.join(names)}, so a GGUF file would "
                          "compute something else. Train without, or export with --to hf.")


def _llama(config: Any, hf: Mapping[str, Any]) -> GGUFForm:
    tensors = _layers(config, bias=config.attention_bias, ffn_bias=config.mlp_bias)
    permuted = {name: hf["num_attention_heads"] if ".attn_q." in name else hf["num_key_value_heads"]
                for name in tensors if ".attn_q." in name or ".attn_k." in name}
    return GGUFForm("llama", _keys(hf), tensors, permuted)


def _qwen3(config: Any, hf: Mapping[str, Any]) -> GGUFForm:
    _refuse("qwen3", {f"window={config.window}": config.window is not None,
                      "attention_bias=true": config.attention_bias})
    return GGUFForm("qwen3", _keys(hf), _layers(config, qk_norm=True), {})


def _qwen3_moe(config: Any, hf: Mapping[str, Any]) -> GGUFForm:
    _refuse("qwen3moe", {f"window={config.window}": config.window is not None,
                         "attention_bias=true": config.attention_bias,
                         "normalised=false (experts' weights that do not add up to 1)": not config.normalised})
    keys = _keys({**hf, "intermediate_size": hf["moe_intermediate_size"]})
    keys |= {"expert_count": hf["num_experts"], "expert_used_count": hf["num_experts_per_tok"],
             "expert_feed_forward_length": hf["moe_intermediate_size"]}
    return GGUFForm("qwen3moe", keys, _layers(config, qk_norm=True, experts=True), {})


def _gpt2(config: Any, hf: Mapping[str, Any]) -> GGUFForm:
    _refuse("gpt2", {"activation=gelu (it computes the tanh form)": config.activation == "gelu"})
    keys = {"context_length": hf["n_positions"], "embedding_length": hf["n_embd"], "block_count": hf["n_layer"],
            "feed_forward_length": hf["n_inner"], "attention.head_count": hf["n_head"],
            "attention.layer_norm_epsilon": hf["layer_norm_epsilon"], "vocab_size": hf["vocab_size"]}
    tensors: dict[str, tuple[str, ...]] = {
        "token_embd.weight": ("stem.tokens.weight",), "position_embd.weight": ("position.weight",)}
    for i in range(config.num_layers):
        for kind in ("weight", "bias"):
            tensors |= {f"blk.{i}.{theirs}.{kind}": (f"stack.{i}.{ours}.{kind}",) for theirs, ours in _GPT2_PARTS}
            tensors[f"blk.{i}.attn_qkv.{kind}"] = tuple(
                f"stack.{i}.attention.{part}.{kind}" for part in ("query", "key", "value"))
    tensors |= {f"output_norm.{kind}": (f"norm.{kind}",) for kind in ("weight", "bias")}
    return GGUFForm("gpt2", keys, tensors | ({} if config.tied else {"output.weight": ("head.weight",)}), {})


_GPT2_PARTS = (("attn_norm", "attention_norm"), ("attn_output", "attention.output"), ("ffn_norm", "feed_forward_norm"),
               ("ffn_up", "feed_forward.up"), ("ffn_down", "feed_forward.down"))
_FORMS: dict[str, Callable[[Any, Mapping[str, Any]], GGUFForm]] = {
    "llama": _llama, "qwen3": _qwen3, "qwen3_moe": _qwen3_moe, "gpt2": _gpt2}


def _keys(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {"context_length": hf["max_position_embeddings"], "embedding_length": hf["hidden_size"],
            "block_count": hf["num_hidden_layers"], "feed_forward_length": hf["intermediate_size"],
            "attention.head_count": hf["num_attention_heads"], "attention.head_count_kv": hf["num_key_value_heads"],
            "attention.key_length": hf["head_dim"], "attention.value_length": hf["head_dim"],
            "rope.dimension_count": hf["head_dim"], "rope.freq_base": float(hf["rope_theta"]),
            "attention.layer_norm_rms_epsilon": float(hf["rms_norm_eps"]), "vocab_size": hf["vocab_size"]}


def _layers(config: Any, *, bias: bool = False, ffn_bias: bool = False, qk_norm: bool = False,
            experts: bool = False) -> dict[str, tuple[str, ...]]:
    """Llama's names and those of its relatives."""
    table: dict[str, tuple[str, ...]] = {"token_embd.weight": ("stem.tokens.weight",)}
    for i in range(config.num_layers):
        blk, ours = f"blk.{i}", f"stack.{i}"
        table |= {f"{blk}.attn_norm.weight": (f"{ours}.attention_norm.weight",),
                  f"{blk}.ffn_norm.weight": (f"{ours}.feed_forward_norm.weight",)}
        for short, name in (("q", "query"), ("k", "key"), ("v", "value"), ("output", "output")):
            for kind in ("weight", "bias") if bias else ("weight",):
                table[f"{blk}.attn_{short}.{kind}"] = (f"{ours}.attention.{name}.{kind}",)
        if qk_norm:
            table |= {f"{blk}.attn_{short}_norm.weight": (f"{ours}.attention.{name}_norm.weight",)
                      for short, name in (("q", "query"), ("k", "key"))}
        if experts:
            table[f"{blk}.ffn_gate_inp.weight"] = (f"{ours}.feed_forward.router.weight",)
        for name in ("gate", "up", "down"):
            if experts:
                table[f"{blk}.ffn_{name}_exps.weight"] = (f"{ours}.feed_forward.experts.{name}",)
                continue
            for kind in ("weight", "bias") if ffn_bias else ("weight",):
                table[f"{blk}.ffn_{name}.{kind}"] = (f"{ours}.feed_forward.{name}.{kind}",)
    table["output_norm.weight"] = ("norm.weight",)
    return table if config.tied else table | {"output.weight": ("head.weight",)}

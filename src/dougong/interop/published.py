"""Which published family a model is, and by name what a published form has no place for."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from dougong.core.config import difference, to_dict
from dougong.core.errors import ConfigError
from dougong.interop.maps import MAPS
from dougong.interop.maps.family_map import FamilyMap
from dougong.models.compose import DecoderConfig

_TRAINING_ONLY = ("dropout", "init_std", "embedding_std", "output_init", "head_std")


def published_form(config: Any) -> tuple[FamilyMap, Any]:
    """The map and the family config of a model: its own, or, for an open `decoder`, the family that it equals.

    Raises ConfigError naming each part that no published form can hold, and what to change.
    """
    kind = getattr(config, "kind", type(config).__name__)
    if kind in MAPS:
        return MAPS[kind], config
    if not hasattr(config, "decoder"):
        raise ConfigError(f"model.kind={kind} is no language model, so it has no form that other programs read. "
                          f"Those that have one: {', '.join(MAPS)}.")
    section = config.decoder()
    if problems := list(_without_place(section)):
        raise ConfigError(f"model.kind={kind} cannot be exported, as no published family has a place for:\n  "
                          + "\n  ".join(problems)
                          + "\nTrain with model.kind=qwen3 (or llama, gpt2), which leave home as they are.")
    return _equal_family(section)


def _without_place(section: DecoderConfig) -> Iterator[str]:
    """Parts that neither Qwen3 nor Llama nor GPT-2 has, each with what it would have to be."""
    checks = {
        f"soft_cap={section.soft_cap} (logits bounded by tanh): set soft_cap to null": section.soft_cap is not None,
        f"value_embeddings={section.value_embeddings}: set it to none": section.value_embeddings != "none",
        f"residual={section.residual.kind} (the embedded tokens added again in each layer): plain":
            section.residual.kind != "plain",
        f"position={section.position.kind}: rope or learned": section.position.kind not in ("rope", "learned"),
        f"window_pattern={section.window_pattern} (Qwen3's is L… then S…, model.kind=qwen3 with full_layers)":
            any(a is not None and b is None for a, b in pairwise(section.windows())),
        "embedding_norm=true: false": section.embedding_norm,
        f"norm_placement={section.norm_placement}: pre": section.norm_placement != "pre",
        f"norm={section.norm.kind} without parameters (learned: false): learned: true":
            not getattr(section.norm, "learned", True),
        f"attention.qk_norm={section.attention.qk_norm} (without parameters): none or learned":
            section.attention.qk_norm == "plain",
        f"feed_forward={section.feed_forward.kind}: swiglu or gelu (experts: model.kind=qwen3_moe)":
            section.feed_forward.kind not in ("swiglu", "gelu"),
    }
    return (text for text, wrong in checks.items() if wrong)


def _equal_family(section: DecoderConfig) -> tuple[FamilyMap, Any]:
    """The family whose arrangement is this one, whatever both do in training only."""
    candidates = {kind: build(section) for kind, build in (("qwen3", _qwen3), ("llama", _llama), ("gpt2", _gpt2))}
    wrong = {kind: difference(_computed(candidate.decoder()), _computed(section))
             for kind, candidate in candidates.items()}
    nearest = min(wrong, key=lambda kind: len(wrong[kind]))
    if wrong[nearest]:
        lines = [f"{key}={has!r} ({nearest} has {fits!r})" for key, (fits, has) in wrong[nearest].items()]
        raise ConfigError(f"model.kind=decoder equals no published family. Nearest is {nearest}, but for:\n  "
                          + "\n  ".join(lines) + f"\nTrain with model.kind={nearest}.")
    return MAPS[nearest], candidates[nearest]


def _computed(section: DecoderConfig) -> dict[str, Any]:
    """What decides the result of a forward, derived widths written out."""
    values = {key: value for key, value in to_dict(section).items()
              if not key.endswith(_TRAINING_ONLY) and key != "window_pattern"}
    values["attention"] = {key: value for key, value in values["attention"].items() if key != "dropout"}
    heads = section.attention.heads(section.dim)
    values["attention"] |= dict(zip(("num_heads", "num_kv_heads", "head_dim"), heads))
    if section.attention.qk_norm == "none":
        values["attention"].pop("qk_norm_eps", None)
    values["feed_forward"] = values["feed_forward"] | {"ffn_dim": section.feed_forward.width(section.dim)}
    values["windows"] = list(section.windows())
    return values


def _sizes(section: DecoderConfig) -> dict[str, Any]:
    sizes: dict[str, Any] = {"vocab_size": section.vocab_size, "context": section.context, "dim": section.dim,
                             "num_layers": section.num_layers, "tied": section.tied}
    if hasattr(section.norm, "eps"):
        sizes["norm_eps"] = section.norm.eps
    return sizes | {"num_heads": section.attention.heads(section.dim)[0],
                    "ffn_dim": section.feed_forward.width(section.dim)}


def _grouped(section: DecoderConfig) -> dict[str, Any]:
    _, num_kv_heads, head_dim = section.attention.heads(section.dim)
    return _sizes(section) | {"num_kv_heads": num_kv_heads, "head_dim": head_dim,
                              "attention_bias": section.attention.bias,
                              "rope_theta": getattr(section.position, "theta", 10_000.0)}


def _qwen3(section: DecoderConfig) -> Any:
    from dougong.models.families.qwen3 import Qwen3Config

    windows = section.windows()
    full = windows.count(None)
    return Qwen3Config(**_grouped(section), window=section.window, full_layers=full if section.window else None)


def _llama(section: DecoderConfig) -> Any:
    from dougong.models.families.llama import LlamaConfig

    return LlamaConfig(**_grouped(section), mlp_bias=getattr(section.feed_forward, "bias", False))


def _gpt2(section: DecoderConfig) -> Any:
    from dougong.models.families.gpt2 import GPT2Config

    exact = getattr(section.feed_forward, "approximate", "tanh") == "none"
    return GPT2Config(**_sizes(section), bias=section.attention.bias, activation="gelu" if exact else "gelu_new")

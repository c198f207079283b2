"""An adapter as PEFT keeps it: adapter_config.json and adapter_model.safetensors, to be laid over a Hugging Face model.

Where a stored matrix holds several of ours (GPT-2's queries, keys and values), their adapters become one of their
ranks' sum, and apart again on the way back:

    [Bq      ] [Aq]
    [   Bk   ] [Ak]
    [      Bv] [Av]
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from dougong.adapt.lora import LoRAConfig
from dougong.core.config import replace
from dougong.core.errors import CheckpointError, ConfigError, did_you_mean
from dougong.interop.maps.family_map import FamilyMap, Stored
from dougong.interop.tensor_files import read_header
from dougong.nn.init import FanIn
from dougong.nn.linear import Linear
from dougong.nn.lora import LowRank, LowRankRows
from dougong.runtime.seeds import derive

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?")
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "modules_to_save": (None, []), "lora_bias": (False, None),
    "trainable_token_indices": (None,), "target_parameters": (None, []), "use_qalora": (False, None),
    "layer_replication": (None,), "alora_invocation_tokens": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva")}
"""settings under which an adapter is `W + s B A` over the weights as they were published"""


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter in our words: what it adapts, and its tensors by our names."""

    adapt: LoRAConfig
    tensors: dict[str, Tensor]
    base: str | None
    """what its makers call the model it belongs to"""


def is_peft_directory(path: Path) -> bool:
    return (path / CONFIG).is_file()


def to_peft(model: nn.Module, family: FamilyMap, config: Any, adapt: LoRAConfig,
            base: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config.json, tensors) of a model with its adapters in place. Raises ConfigError for what PEFT's form has
    no place for."""
    if adapt.also:
        raise ConfigError(f"this run trained {', '.join(adapt.also)} beside the adapter (adapt.also), and an adapter's "
                          "file has no place for them. Export the whole model: --to hf.")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    transposed = False
    for name, stored in family.names(config).items():
        parts = [model.get_submodule(ours.removesuffix(".weight")) for ours in stored.ours] \
            if name.endswith(".weight") and stored.expert is None else []
        if any(isinstance(part, LowRank) for part in parts):
            module = name.removesuffix(".weight")
            found = _joined(parts)
            ranks[module] = len(found["lora_A.weight"])
            tensors |= {f"{_PREFIX}{module}.{key}": tensor.detach().cpu().contiguous() for key, tensor in found.items()}
            transposed |= stored.transposed
    assert adapt.rank
    factor = adapt.alpha / adapt.rank
    odd = _by_end({module: rank for module, rank in ranks.items() if rank != adapt.rank}, ranks)
    everything = [name.removesuffix(".weight") for name in family.names(config)]
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": adapt.rank,
            "lora_alpha": _plain(adapt.alpha), "lora_dropout": adapt.dropout, "use_dora": adapt.kind == "dora",
            "use_rslora": False, "bias": "none", "fan_in_fan_out": transposed, "inference_mode": True,
            "init_lora_weights": True, "modules_to_save": None,
            "target_modules": sorted(_by_end(ranks, dict.fromkeys(everything, 0) | ranks)),
            "rank_pattern": odd, "alpha_pattern": {key: _plain(factor * rank) for key, rank in odd.items()}}, tensors


def _joined(parts: list[Any]) -> dict[str, Tensor]:
    """The adapter of a stored matrix that holds these parts one after another; parts without one add zeros."""
    adapted = [part for part in parts if isinstance(part, LowRank)]
    rows, rank = [], 0
    for part in parts:
        if isinstance(part, LowRank):
            ahead, behind = rank, sum(len(other.lora_a) for other in adapted) - rank - len(part.lora_a)
            rows.append(nn.functional.pad(part.lora_b, (ahead, behind)))
            rank += len(part.lora_a)
        else:
            rows.append(adapted[0].lora_b.new_zeros(len(part.weight), sum(len(other.lora_a) for other in adapted)))
    found = {"lora_A.weight": torch.cat([part.lora_a for part in adapted]), "lora_B.weight": torch.cat(rows)}
    if isinstance(adapted[0], LowRankRows):
        found["lora_magnitude_vector"] = torch.cat(
            [part.magnitude if isinstance(part, LowRankRows) else
             torch.linalg.vector_norm(part.weight.detach(), dim=1) for part in parts])  # type: ignore[arg-type]
    return found


def _by_end(wanted: Mapping[str, int], among: Mapping[str, int]) -> dict[str, int]:
    """Modules by the last word of their names, where that names these and no others; else by their whole names."""
    found = {}
    for module, value in wanted.items():
        end = module.rpartition(".")[2]
        alike = [other for other in among if other.endswith(f".{end}") or other == end]
        found[end if all(wanted.get(other) == value for other in alike) else module] = value
    return found


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value


def read_peft(directory: Path, family: FamilyMap, config: Any) -> PeftAdapter:
    """An adapter for a model of this family. Raises ConfigError for kinds of adapter that are not known here,
    CheckpointError for files that are damaged or of another model."""
    given = _settings(directory)
    for key, fits in _PLAIN.items():
        if given.get(key, fits[0]) not in fits:
            raise ConfigError(f"{directory / CONFIG} has {key}={given[key]!r}; known here is {fits[0]!r}: plain LoRA "
                              "and DoRA. Merge it with PEFT (merge_and_unload) and import the whole model.")
    with torch.device("meta"):
        model = config.build()
    tensors: dict[str, Tensor] = {}
    factors: dict[str, float] = {}
    for module, (stored, parts) in _modules(directory, family, config).items():
        if (rank := len(parts.get("lora_A", ()))) == 0 or "lora_B" not in parts:
            raise CheckpointError(f"{directory / WEIGHTS}: {module} has {', '.join(parts)}; lora_A and lora_B are "
                                  "needed.")
        factor = _alpha(directory, given, module) / (rank ** 0.5 if given.get("use_rslora") else rank)
        for name, found in zip(stored.ours, _apart(parts, len(stored.ours))):
            name = name.removesuffix(".weight")
            _check_shapes(directory, module, found, model.get_submodule(name))
            factors[name] = factor
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in found.items()}
    return _alike(given, tensors, factors, model)


def _settings(directory: Path) -> dict[str, Any]:
    try:
        given = json.loads((directory / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG} cannot be read: {error}. Fetch it again.") from None
    if not isinstance(given, dict):
        raise CheckpointError(f"{directory / CONFIG} should hold keys and values. Fetch it again.")
    dropout = given.setdefault("lora_dropout", 0.0)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise CheckpointError(f"{directory / CONFIG} has lora_dropout={dropout!r}; a share from 0 up to 1 is needed.")
    return given


def _modules(directory: Path, family: FamilyMap, config: Any) -> dict[str, tuple[Stored, dict[str, Tensor]]]:
    """Stored module -> its place in ours, and its tensors by kind."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no {WEIGHTS}. Pickled adapters (.bin) are refused: save it again "
                              "with PEFT of today.")
    read_header(path)
    known = family.names(config)
    found: dict[str, tuple[Stored, dict[str, Tensor]]] = {}
    try:
        held = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Fetch it again.") from None
    for key, tensor in held.items():
        match = _KEY.fullmatch(key)
        module = match[1] if match else key
        if not module.startswith((family.base_prefix, "lm_head")):
            module = family.base_prefix + module
        stored = known.get(f"{module}.weight")
        if match is None or stored is None or not stored.ours[0].startswith("stack."):
            near = did_you_mean(module, [n.removesuffix(".weight") for n in known])
            raise CheckpointError(f"{path}: {key} is of no matrix that {family.architecture} with "
                                  f"{config.num_layers} layers has an adapter for.{near}")
        if tensor.dim() != (1 if match[2] == "lora_magnitude_vector" else 2):
            raise CheckpointError(f"{path}: {key} is of shape {tuple(tensor.shape)}, and no {match[2]} is. Fetch it "
                                  "again.")
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {key} holds values that are no numbers (NaN or infinity).")
        found.setdefault(module, (stored, {}))[1][match[2]] = tensor
    if not found:
        raise CheckpointError(f"{path} holds no tensors.")
    return found


def _alpha(directory: Path, given: Mapping[str, Any], module: str) -> float:
    """PEFT's own rule: of the first key of `alpha_pattern` that the name ends with, read as a regular expression."""
    pattern = given.get("alpha_pattern") or {}
    try:
        alpha = next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)),
                     given.get("lora_alpha", 8))
    except (AttributeError, re.error) as error:
        raise CheckpointError(f"{directory / CONFIG} has alpha_pattern={pattern!r}, which is no mapping of patterns: "
                              f"{error}. Fetch it again.") from None
    if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise CheckpointError(f"{directory / CONFIG} has lora_alpha={alpha!r} for {module}; a number above 0 is "
                              "needed.")
    return alpha


def _apart(parts: Mapping[str, Tensor], number: int) -> list[dict[str, Tensor]]:
    """The adapters of the matrices that a stored one holds: each its own ranks, where B is so; else all share A."""
    a, b = parts["lora_A"], parts["lora_B"].chunk(number)
    magnitude = parts["lora_magnitude_vector"].chunk(number) if "lora_magnitude_vector" in parts else ()
    own = len(a) // number
    used = [rows.any(0).nonzero().flatten().tolist() for rows in b]     # columns of B
    diagonal = number > 1 and len(a) % number == 0 and any(used) and all(
        i * own <= column < (i + 1) * own for i, columns in enumerate(used) for column in columns)
    found = []
    for i, rows in enumerate(b):
        mine = slice(i * own, (i + 1) * own) if diagonal else slice(None)
        found.append({"lora_a": a[mine].contiguous(), "lora_b": rows[:, mine].contiguous()}
                     | ({"magnitude": magnitude[i].contiguous()} if i < len(magnitude) else {}))
    return found


def _check_shapes(directory: Path, module: str, found: Mapping[str, Tensor], part: Any) -> None:
    rank = len(found["lora_a"])
    wanted = {"lora_a": (rank, part.in_features), "lora_b": (part.out_features, rank),
              "magnitude": (part.out_features,)}
    for leaf, tensor in found.items():
        if tensor.shape != wanted[leaf]:
            raise CheckpointError(f"{directory / WEIGHTS}: {module} has {leaf} of shape {tuple(tensor.shape)}, and "
                                  f"this model's matrix asks for {wanted[leaf]}: the adapter belongs to another model.")


def _alike(given: Mapping[str, Any], tensors: dict[str, Tensor], factors: Mapping[str, float],
           model: nn.Module) -> PeftAdapter:
    """One rank and one factor for all: B takes up the difference in factors; where there is less rank, the rest begins
    as a new adapter does, B at 0."""
    rank = max(len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_a"))
    factor = next(iter(factors.values()))
    for name, own in factors.items():
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        if own != factor:
            tensors[f"{name}.lora_b"] = b * (own / factor)
        if (more := rank - len(a)) > 0:
            fresh = torch.empty(more, a.shape[1])
            FanIn(3 ** -0.5)(fresh, Generator().manual_seed(derive(0, name)))
            tensors[f"{name}.lora_a"] = torch.cat([a, fresh])
            tensors[f"{name}.lora_b"] = nn.functional.pad(tensors[f"{name}.lora_b"], (0, more))
    adapt = LoRAConfig(kind="dora" if given.get("use_dora") else "lora", rank=rank, alpha=factor * rank,
                       dropout=given["lora_dropout"])
    linears = [name for name, part in model.named_modules() if type(part) is Linear]
    if set(factors) != set(linears):
        adapt = replace(adapt, targets=tuple(_patterns(list(factors), linears)))
    return PeftAdapter(adapt, tensors, given.get("base_model_name_or_path"))


def _patterns(names: list[str], among: list[str]) -> list[str]:
    """Names with a star for the layer, where all layers are meant."""
    found = {}
    for name in names:
        star = re.sub(r"^stack\.\d+\.", "stack.*.", name)
        alike = {other for other in among if re.sub(r"^stack\.\d+\.", "stack.*.", other) == star}
        found[star if alike <= set(names) else name] = None
    return list(found)

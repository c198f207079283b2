"""Which parameter gets which optimiser, rate and weight decay; decided by shape, place and name patterns."""

import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dougong.core.errors import ConfigError, did_you_mean
from dougong.models.heads import VALUE
from dougong.nn.moe import Experts

_TABLES = re.compile("Embedding|Position")
_HEADS = ("head", VALUE, "discriminator.head")


@dataclass(frozen=True)
class GroupRules:
    """Shell patterns over parameter names (`*.bias`, `stack.0.*`); each must match something."""

    no_decay: Sequence[str] = ()
    rates: Mapping[str, float] | None = None


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Named parameters that want a gradient, each once (a tied weight under its first name)."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def hidden_matrices(model: nn.Module, excluded: Sequence[str] = ()) -> set[str]:
    """Names of the matrices that Muon is for: 2-D weights that map activations to activations, and experts' stacks of
    such.

    Not so: tables of embeddings or positions (rows are looked up, not multiplied), heads (for tokens or classes, for
    values, a discriminator's), anything matching `excluded`.
    """
    names = trainable(model)
    tables = [module for module in model.modules() if _TABLES.search(type(module).__name__)]
    outside = {id(p) for module in tables for p in module.parameters(recurse=False)}
    heads = [module for name, module in model.named_modules() if name in _HEADS]
    outside |= {id(p) for module in heads for p in module.parameters()}
    taken = {name for pattern in excluded for name in _matching(pattern, _names_of_whole(model))}
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    stacks = {id(p) for module in experts for p in module.parameters(recurse=False)}
    return {name for name, p in names.items()
            if (p.ndim == 2 or id(p) in stacks) and id(p) not in outside and name not in taken}


def parameter_groups(parameters: Mapping[str, Tensor], rules: GroupRules, *, lr: float, weight_decay: float,
                     **options: Any) -> list[dict[str, Any]]:
    """torch parameter groups (named) for `parameters`, one for each distinct (rate, decay).

    Weight decay falls on weights of two axes or more; biases, norms and scalars are free of it. `initial_lr`
    is the base that a schedule's factor multiplies.
    """
    rates = rules.rates or {}
    free = {name for pattern in rules.no_decay for name in _matching(pattern, parameters, optional=True)}
    scale = {name: factor for pattern, factor in rates.items()
             for name in _matching(pattern, parameters, optional=True)}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        rate = lr * scale.get(name, 1.0)
        decay = 0.0 if parameter.ndim < 2 or name in free else weight_decay
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "initial_lr": rate,
                                                  "weight_decay": decay, **options})
        group["params"].append((name, parameter))
    return list(groups.values())


def check_patterns(model: nn.Module, rules: GroupRules) -> None:
    """Raises ConfigError for a pattern that matches no parameter: it would silently change nothing."""
    names = _names_of_whole(model)
    if not names:
        raise ConfigError("the model has no parameter that wants a gradient, so there is nothing to train.")
    for pattern in [*rules.no_decay, *(rules.rates or {})]:
        _matching(pattern, names)


def _names_of_whole(model: nn.Module) -> Collection[str]:
    """Names of all trainable parameters; a pipeline stage, which holds some of them, knows the others' too."""
    return getattr(model, "names_of_whole", None) or trainable(model)


def describe(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """One row for each group: optimizer, names, parameters (elements), lr, weight_decay. JSON values."""
    return [{"optimizer": group.get("algorithm", type(optimizer).__name__.lower()),
             "names": list(group["param_names"]),
             "parameters": sum(p.numel() for p in group["params"]),
             "lr": group["initial_lr"], "weight_decay": group["weight_decay"]}
            for group in optimizer.param_groups]


def table(optimizer: torch.optim.Optimizer) -> str:
    """The groups as aligned text, names that differ only in a layer's number folded into one."""
    lines = [f"{'optimizer':<10} {'parameters':>14} {'lr':>10} {'decay':>8}  names"]
    for row in describe(optimizer):
        lines.append(f"{row['optimizer']:<10} {row['parameters']:>14,} {row['lr']:>10.3g} "
                     f"{row['weight_decay']:>8.3g}  {', '.join(_fold(row['names']))}")
    return "\n".join(lines)


def _fold(names: Sequence[str]) -> list[str]:
    """`stack.0.w`, `stack.1.w` as `stack.*.w ×2`."""
    counts: dict[str, int] = {}
    for name in names:
        key = ".".join("*" if part.isdigit() else part for part in name.split("."))
        counts[key] = counts.get(key, 0) + 1
    return [key if count == 1 else f"{key} ×{count}" for key, count in counts.items()]


def _matching(pattern: str, names: Collection[str], *, optional: bool = False) -> list[str]:
    found = fnmatch.filter(names, pattern)
    if not found and not optional:
        raise ConfigError(f"the pattern {pattern!r} matches no "
                          f"parameter.{did_you_mean(pattern, _fold(list(names)))}")
    return found

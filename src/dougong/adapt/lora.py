"""Adapters of a model that exists: LoRA, DoRA, and both over integers (QLoRA). What they compute is in `nn/lora.py`.

    config.apply(model, seed=0)     adapters in place, everything else frozen
    …                               training as ever; what is frozen has no gradient, no moments, no place on disk
    config.merge(model)             plain matrices again, that compute the same
"""

import copy
import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from dougong.core.config import config
from dougong.core.errors import CheckpointError, ConfigError, did_you_mean
from dougong.nn.embedding import Embedding
from dougong.nn.init import initialise
from dougong.nn.linear import Linear
from dougong.nn.lora import (
    DoRALinear,
    LoRALinear,
    LowRank,
    LowRankRows,
    QuantizedDoRALinear,
    QuantizedLoRALinear,
    adapters,
    merge_adapters,
    replace_part,
)
from dougong.nn.moe import Experts, MoE
from dougong.nn.ranges import Count, Positive, Probability
from dougong.runtime.layout import LayoutConfig

ALPHA = 32.0
_TRIED, _SLACK, _FLOOR = 16, 8.0, 2e-6
TABLES = ("stem.tokens.weight", "head.weight")
"""what must be trained whole where the vocabulary has grown: rows of new tokens begin as noise"""
_LAYERS: dict[tuple[str, bool], Any] = {
    ("lora", False): LoRALinear, ("dora", False): DoRALinear,
    ("lora", True): QuantizedLoRALinear, ("dora", True): QuantizedDoRALinear}
_BITS = {"float": None, "int8": 8, "int4": 4}


@config
class LoRAConfig:
    """Matrices of low rank beside the frozen ones: `W + alpha / rank · B A` (arXiv:2106.09685)."""

    kind: Literal["lora", "dora"] = "lora"
    """dora learns the length of each row too (arXiv:2402.09353): nearer to full training at low ranks, and slower"""
    rank: Count | None = None
    """derived: from the tokens to learn from and the sizes of the matrices"""
    alpha: Positive = ALPHA
    """with a factor of alpha / rank the best rate hardly depends on the rank"""
    dropout: Probability = 0.0
    """of what enters the adapter while training"""
    targets: tuple[str, ...] = ()
    """matrices that are adapted: shell patterns over their names, such as `*.attention.*`; none: all but the head"""
    also: tuple[str, ...] = ()
    """parameters trained whole beside them: shell patterns over their names, such as `*norm.weight`"""
    base: Literal["float", "int8", "int4"] = "float"
    """how the frozen matrices are held: as they compute, or as integers (QLoRA, arXiv:2305.14314)"""

    @property
    def whole(self) -> bool:
        """A checkpoint holds the adapter alone: to open a run, its start is needed."""
        return False

    def apply(self, model: nn.Module, *, seed: int) -> nn.Module:
        """Adapters in place, filled (unless on the meta device); everything else is frozen.

        Raises ConfigError for patterns that match nothing or what cannot be adapted.
        """
        if self.rank is None:
            raise ConfigError("adapt.rank is not given: a recipe derives it. Outside one, give it, such as rank=16.")
        parts, also = self.chosen(model), self._also(model)
        if clash := [name for name in also if name.removesuffix(".weight") in parts]:
            raise ConfigError(f"adapt.also trains {clash[0]} whole, and adapt.targets adapts it: one of them is "
                              "enough. Take it out of one.")
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        bits = _BITS[self.base]
        layer = _LAYERS[self.kind, bits is not None]
        for name, part in parts.items():
            replace_part(model, name, layer.over(part, self.rank, factor=self.alpha / self.rank, dropout=self.dropout,
                                                 **({"bits": bits} if bits else {})))
        for name in also:
            model.get_parameter(name).requires_grad_(True)
        if not next(model.parameters()).is_meta:
            self.fill(model, seed=seed)
        return model

    def fill(self, model: nn.Module, *, seed: int) -> None:
        """First values of the adapters, whose frozen weights are in place: they change nothing yet."""
        names = {f"{name}.{leaf}" for name in adapters(model) for leaf in ("lora_a", "lora_b")}
        initialise(model, seed, only=names)
        for part in adapters(model).values():
            if isinstance(part, LowRankRows):
                part.reset_magnitude()

    def merge(self, model: nn.Module) -> "Merged":
        """Plain matrices in place of the adapted ones, each tried on random inputs first; all of the model may be
        trained again. Raises CheckpointError where one would compute something else."""
        found = check_merge(model)
        merge_adapters(model).requires_grad_(True)
        return found

    def chosen(self, model: nn.Module) -> dict[str, Linear]:
        """The matrices that are adapted, by name. Raises ConfigError for patterns that match none, and for those of a
        head or of experts."""
        assert not adapters(model), "a model is adapted once; merge it first"
        linears = {name: part for name, part in model.named_modules() if type(part) is Linear}
        experts = [name for name, part in model.named_modules() if isinstance(part, Experts)]
        others = [*experts, *(["head"] if isinstance(getattr(model, "head", None), nn.Module) else [])]
        for pattern in self.targets:
            if refused := [name for name in fnmatch.filter(others, pattern) if not fnmatch.filter(linears, pattern)]:
                raise ConfigError(f"adapt.targets={pattern!r} names {refused[0]}, which cannot be adapted: experts are "
                                  "stacks of matrices, and a head may be tied. adapt.also trains parameters whole.")
            if not fnmatch.filter(linears, pattern):
                raise ConfigError(f"adapt.targets={pattern!r} matches no matrix.{did_you_mean(pattern, linears)} They "
                                  f"are called such as {next(iter(linears), 'nothing: this model has none')}.")
        if not self.targets and experts:
            raise ConfigError(f"this model has experts ({experts[0]}), which have no adapters here. Name what is to be "
                              "adapted: \"adapt.targets=['*.attention.*']\"")
        if not self.targets and not linears:
            raise ConfigError("this model has no matrix (dougong.nn.Linear) that could be adapted.")
        return {name: part for name, part in linears.items()
                if not self.targets or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.targets)}

    def _also(self, model: nn.Module) -> list[str]:
        names = [name for name, _ in model.named_parameters()]
        for pattern in self.also:
            if not fnmatch.filter(names, pattern):
                raise ConfigError(f"adapt.also={pattern!r} matches no parameter.{did_you_mean(pattern, names)}")
        return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.also)]


@dataclass(frozen=True)
class Merged:
    """How far merged matrices stray from what they were merged of, computed in float64, as a share of the largest
    output; and the same of the adapters left apart."""

    matrices: int
    largest_difference: float
    allowed: float
    own_rounding: float


@torch.no_grad()
def check_merge(model: nn.Module) -> Merged:
    """Tries what merging will give, matrix by matrix. Raises CheckpointError naming one that strays further than eight
    times what its adapter does by itself, or 2e-6 (as exports are judged)."""
    worst = (0.0, _FLOOR, 0.0)
    draw = torch.Generator().manual_seed(0)
    for name, part in adapters(model).items():
        x = torch.randn(_TRIED, part.in_features, generator=draw, dtype=torch.float64)
        precise = copy.deepcopy(part).cpu() if part.lora_a.device.type == "mps" else part     # MPS has no float64
        exact = precise.exactly(x.to(precise.lora_a.device)).cpu()
        scale = exact.abs().max().clamp(min=1e-30)
        single = x.to(part.lora_a.device, part.lora_a.dtype)
        training = part.training
        merged, apart = (y.cpu().double() for y in (part.eval().merged()(single), part(single)))
        part.train(training)
        difference, rounding = (float((y - exact).abs().max() / scale) for y in (merged, apart))
        allowed = max(_SLACK * rounding, _FLOOR)
        if not difference <= allowed:       # also where it is NaN
            raise CheckpointError(f"{name} merged computes something else than with its adapter beside it: outputs "
                                  f"differ by {difference:.1e} of the largest, {allowed:.1e} allowed. Its numbers may "
                                  "be damaged, or its training may have diverged.")
        worst = max(worst, (difference, allowed, rounding))
    return Merged(len(adapters(model)), *worst)


def why_not_divided(adapt: Any, layout: LayoutConfig) -> str | None:
    """Why the processes of a layout cannot train so, and what they can; None if they can. Adapters know copies of a
    model and parts of each matrix that are gathered whole; what cuts matrices or layers apart would cut them too."""
    if layout.processes == 1:
        return None
    if adapt.whole:
        return f"adapt.kind={adapt.kind} trains in one process so far. Start it without torchrun."
    if layout.size("tensor", "pipeline", "context", "expert") > 1 or adapt.base != "float":
        return (f"in several processes adapters (adapt.kind={adapt.kind} adapt.base={adapt.base}) train over floating-"
                "point matrices, along replicate and shard alone. Try layout.replicate or layout.shard, and "
                "adapt.base=float.")
    return None


def hold_frozen(model: Any) -> nn.Module:
    """Keeps frozen matrices in the precision that they compute in, where they would be cast at each use: half the
    memory, and no cast. Everything that is trained, every vector, and routers (which choose in float32) stay as they
    are."""
    routers = {module.router for module in model.modules() if isinstance(module, MoE)}
    for module in model.modules():
        if isinstance(module, nn.Linear | Embedding | Experts) and module not in routers:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1 and not parameter.requires_grad:
                    module._parameters[name] = nn.Parameter(parameter.to(model.compute_dtype), requires_grad=False)
    return model


def trained(model: nn.Module) -> int:
    """Numbers that training moves."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def trained_matrices(model: Any) -> tuple[int, int]:
    """Of what is trained: numbers of low-rank factors, and of whole matrices that multiply a token. A table of which
    rows are looked up multiplies none, unless it is the head too."""
    factors = {id(factor) for part in adapters(model).values() for factor in (part.lora_a, part.lora_b)}
    tables = {id(p) for part in model.modules() if isinstance(part, Embedding) for p in part.parameters(recurse=False)}
    tables -= {id(getattr(getattr(model, "head", None), "weight", None))}
    moved = [p for p in model.parameters() if p.requires_grad and p.ndim > 1 and id(p) not in tables]
    low = sum(p.numel() for p in moved if id(p) in factors)
    return low, sum(p.numel() for p in moved) - low


def widths(parts: Iterable[Linear | LowRank]) -> int:
    """Parameters of the adapters for each unit of rank: inputs plus outputs of every matrix."""
    return sum(part.in_features + part.out_features for part in parts)


def adapted_on_meta(section: Any, adapt: LoRAConfig) -> nn.Module:
    """The model of a family config with its adapters, without memory."""
    with torch.device("meta"):
        return adapt.apply(section.build(), seed=0)

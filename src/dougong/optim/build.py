"""Optimiser choices of a recipe and what they build."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from dougong.core.config import config
from dougong.core.errors import ConfigError
from dougong.optim import divided
from dougong.optim.groups import GroupRules, check_patterns, hidden_matrices, parameter_groups, trainable
from dougong.optim.muon import Muon, Scale

Rate = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Average = Annotated[float, Field(ge=0, lt=1)]

USUAL_RATE = 1e-3           # of AdamW and Adam where no size says better
MUON_RATE = 0.02            # the post's; Muon's update has the same size at every width
MUON_ADAMW_RATE = 3e-3      # of what is no matrix, beside Muon


@config
class AdamWConfig:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    lr: Rate | None = None
    """derived: from the size dial; 0.001 where there is none"""
    betas: tuple[Average, Average] = (0.9, 0.95)
    eps: Rate = 1e-8
    weight_decay: NotNegative = 0.1
    """on weights of two axes or more"""
    no_decay: tuple[str, ...] = ()
    """further parameters without weight decay: shell patterns over their names"""
    rates: dict[str, Rate] = Field(default_factory=dict)
    """pattern over names -> factor on lr"""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        groups = _groups(self, model, betas=self.betas, eps=self.eps)
        kind = divided.AdamW if divided.in_parts(model) else torch.optim.AdamW
        return kind(groups, fused=_fused(model))


@config
class AdamConfig:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980); `weight_decay` is the coupled L2 penalty."""

    kind: Literal["adam"] = "adam"
    lr: Rate | None = None
    """derived: from the size dial; 0.001 where there is none"""
    betas: tuple[Average, Average] = (0.9, 0.999)
    eps: Rate = 1e-8
    weight_decay: NotNegative = 0.0
    """on weights of two axes or more"""
    no_decay: tuple[str, ...] = ()
    """further parameters without weight decay: shell patterns over their names"""
    rates: dict[str, Rate] = Field(default_factory=dict)
    """pattern over names -> factor on lr (a GAN's two players may learn at different rates)"""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        groups = _groups(self, model, betas=self.betas, eps=self.eps)
        kind = divided.Adam if divided.in_parts(model) else torch.optim.Adam
        return kind(groups, fused=_fused(model))


@config
class SGDConfig:
    """Gradient descent, with momentum if asked for; `weight_decay` is the L2 penalty."""

    kind: Literal["sgd"] = "sgd"
    lr: Rate = 1e-2
    momentum: Average = 0.0
    nesterov: bool = False
    weight_decay: NotNegative = 0.0
    """on weights of two axes or more"""
    no_decay: tuple[str, ...] = ()
    """further parameters without weight decay: shell patterns over their names"""
    rates: dict[str, Rate] = Field(default_factory=dict)
    """pattern over names -> factor on lr"""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.nesterov and not self.momentum:
            raise ConfigError("nesterov=true has no effect without momentum. Try momentum=0.9.")
        groups = _groups(self, model, momentum=self.momentum, nesterov=self.nesterov)
        return torch.optim.SGD(groups, fused=_fused(model) and not divided.in_parts(model))


@config
class RMSpropConfig:
    """Gradients divided by a running root mean square (Hinton 2012, lecture 6e)."""

    kind: Literal["rmsprop"] = "rmsprop"
    lr: Rate = 1e-3
    alpha: Average = 0.99
    momentum: Average = 0.0
    eps: Rate = 1e-8
    weight_decay: NotNegative = 0.0
    """on weights of two axes or more"""
    no_decay: tuple[str, ...] = ()
    """further parameters without weight decay: shell patterns over their names"""
    rates: dict[str, Rate] = Field(default_factory=dict)
    """pattern over names -> factor on lr"""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        groups = _groups(self, model, alpha=self.alpha, momentum=self.momentum, eps=self.eps)
        return torch.optim.RMSprop(groups)


@config
class MuonConfig:
    """Muon for the hidden matrices, AdamW for embeddings, head, convolutions, vectors and scalars."""

    kind: Literal["muon"] = "muon"
    lr: Rate | None = None
    """of the matrices; derived: 0.02 at every size"""
    momentum: Average = 0.95
    nesterov: bool = True
    steps: Annotated[int, Field(ge=1, le=20)] = 5
    """Newton–Schulz iterations"""
    scale: Scale = "original"
    """rate by shape: the post's √max(1, rows/columns), or 0.2 √max(rows, columns) to match AdamW's update
    size"""
    weight_decay: NotNegative = 0.0
    """of the matrices"""
    cautious: bool = False
    """decay only entries that the update shrinks too"""
    adamw_lr: Rate | None = None
    """of the rest; derived: from the size dial, at most 0.003"""
    betas: tuple[Average, Average] = (0.9, 0.95)
    eps: Rate = 1e-8
    adamw_weight_decay: NotNegative = 0.0
    """on AdamW's weights of two axes or more"""
    adamw: tuple[str, ...] = ()
    """matrices that take AdamW after all: shell patterns over their names"""
    no_decay: tuple[str, ...] = ()
    """further parameters without weight decay: shell patterns over their names"""
    rates: dict[str, Rate] = Field(default_factory=dict)
    """pattern over names -> factor on the rate"""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        rules = GroupRules(no_decay=self.no_decay, rates=self.rates)
        check_patterns(model, rules)
        names, matrices = trainable(model), hidden_matrices(model, self.adamw)
        if not matrices:
            raise ConfigError("optim.kind=muon found no hidden matrix in this model, so it would be AdamW "
                              "alone.\n"
                              "Try optim.kind=adamw.")
        muon = parameter_groups({n: p for n, p in names.items() if n in matrices}, rules,
                                lr=self.lr or MUON_RATE,
                                weight_decay=self.weight_decay, algorithm="muon", momentum=self.momentum,
                                nesterov=self.nesterov, steps=self.steps, scale=self.scale,
                                cautious=self.cautious)
        rest = parameter_groups({n: p for n, p in names.items() if n not in matrices}, rules,
                                lr=self.adamw_lr or MUON_ADAMW_RATE,
                                weight_decay=self.adamw_weight_decay, algorithm="adamw", betas=self.betas,
                                eps=self.eps)
        return Muon([*muon, *rest], dtype=getattr(model, "compute_dtype", torch.float32))


def _groups(section: Any, model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    rules = GroupRules(no_decay=section.no_decay, rates=section.rates)
    check_patterns(model, rules)
    return parameter_groups(trainable(model), rules, lr=section.lr or USUAL_RATE, weight_decay=section.weight_decay,
                            **options)


def _fused(model: nn.Module) -> bool:
    """One kernel for each parameter instead of a dozen; torch has it for these devices."""
    return all(p.device.type in ("cpu", "cuda", "mps") for p in trainable(model).values())

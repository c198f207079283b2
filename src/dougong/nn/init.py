"""How parameters get their first values: one generator per parameter, seeded by its name.

So a weight depends on the seed and on its own path alone: not on the order of layers, on the device, or on
what else the model contains. A module states its rules in `self.init`, a mapping from parameter name to one
of the values below. A parameter in parts on several processes gets the values that it would have as a whole: each
process draws all of it, one parameter at a time, and keeps its part.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from dougong.runtime.parts import local, part_of
from dougong.runtime.seeds import derive

Init = Callable[[Tensor, Generator], None]


@dataclass(frozen=True)
class Normal:
    """Independent normal values around 0. Sampled in float32 on the CPU, so every device gets the same."""

    std: float

    def __call__(self, parameter: Tensor, generator: Generator) -> None:
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, self.std, generator=generator))


@dataclass(frozen=True)
class FanIn:
    """Normal with std = scale / sqrt(inputs) for a weight of shape (outputs, inputs): unit inputs keep their
    variance."""

    scale: float = 1.0

    def __call__(self, parameter: Tensor, generator: Generator) -> None:
        Normal(self.scale / math.sqrt(parameter.shape[1]))(parameter, generator)


@dataclass(frozen=True)
class Constant:
    """One value everywhere."""

    value: float

    def __call__(self, parameter: Tensor, generator: Generator) -> None:
        parameter.fill_(self.value)


ZEROS, ONES = Constant(0.0), Constant(1.0)


def matrix(std: float | None, *, scale: float = 1.0) -> Init:
    """The rule of a weight matrix: `Normal(scale · std)`; `FanIn(scale)` where std is None; zeros where it is
    0."""
    if std is None:
        return FanIn(scale)
    return Normal(scale * std) if std > 0 else ZEROS


@torch.no_grad()
def initialise(model: nn.Module, seed: int, *, only: Collection[str] | None = None) -> None:
    """Fills every parameter by its module's rule, and every buffer by its module's `reset_buffers`; or `only` the
    parameters of these names.

    Two models that share a parameter's path, shape and rule share its values.
    """
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{path}.{name}" if path else name
            if only is not None and full_name not in only:
                continue
            rules = getattr(module, "init", {})
            assert name in rules, f"{type(module).__name__} gives no initial value for {full_name}"
            _fill(parameter, rules[name], Generator().manual_seed(derive(seed, full_name)))
        reset_buffers = getattr(module, "reset_buffers", None)
        if callable(reset_buffers) and only is None:
            reset_buffers()


def _fill(parameter: Tensor, rule: Init, generator: Generator) -> None:
    part = local(parameter)
    if part is parameter:
        rule(parameter, generator)
    elif isinstance(rule, Constant):
        rule(part, generator)
    else:
        whole = torch.empty(parameter.shape, dtype=parameter.dtype)
        rule(whole, generator)
        mine = whole[part_of(parameter)]
        assert mine.shape == part.shape, f"{tuple(part.shape)} here, {tuple(mine.shape)} by its placement"
        part.copy_(mine)


class Initialised(nn.Module):
    """A model that fills itself: `initialise(seed)` after a build, or after `to_empty` of a meta-device
    build."""

    def initialise(self, seed: int) -> None:
        initialise(self, seed)

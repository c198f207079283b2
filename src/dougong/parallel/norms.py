"""The gradient norm of a model that lies on many processes: every element counted once, one sum over all.

Each process adds up the squares that it holds, each divided by the number of processes that hold the same element:
those along axes over which its tensor is not divided. So copies need not be told apart, and a NaN in any of them is
seen by all.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dougong.runtime.collectives import all_sum
from dougong.runtime.layout import AXES
from dougong.runtime.mesh import Mesh
from dougong.runtime.parts import local


def copies(parameter: Tensor, mesh: Mesh) -> int:
    """Processes of one pipeline stage that hold the same elements of `parameter`."""
    assert AXES[0] == "pipeline"
    return mesh.size(*AXES[1:]) // parts(parameter)


def parts(parameter: Tensor) -> int:
    """Pieces in which a tensor lies on its mesh; 1 for a plain one."""
    if local(parameter) is parameter:
        return 1
    lying: Any = parameter
    return math.prod(size for size, placement in zip(lying.device_mesh.shape, lying.placements)
                     if not placement.is_replicate())


def squared_norm(model: nn.Module, mesh: Mesh) -> Tensor:
    """This process's share of the squared gradient norm (scalar, float64 where the device has it): the shares of all
    processes add up to it.

    `model.held_elsewhere` (parameter name -> stages that hold it), where a model has it, names what several pipeline
    stages hold, as a tied embedding.
    """
    stages: Mapping[str, int] = getattr(model, "held_elsewhere", {})
    by_copies: dict[int, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            held = copies(parameter, mesh) * stages.get(name, 1)
            by_copies.setdefault(held, []).append(local(parameter.grad))
    if not by_copies:
        return torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    shares = [torch.nn.utils.get_total_norm(gradients).double().square() / held
              for held, gradients in by_copies.items()]
    return torch.stack(shares).sum()


def gradient_norm(model: nn.Module, mesh: Mesh) -> Tensor:
    """The norm of the whole gradient, the same on every process; one sum over all of them."""
    return all_sum(squared_norm(model, mesh), mesh.group(*AXES)).sqrt()

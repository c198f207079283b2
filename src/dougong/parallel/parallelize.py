"""The one place that divides a model, in the one order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from dougong.core.errors import ConfigError
from dougong.data.batch import Batch
from dougong.objectives.losses import Losses
from dougong.objectives.objective import Objective
from dougong.parallel.context import context_slice
from dougong.parallel.data import CopiedGradients, GradientSums, divide, divided_gradients, put_back
from dougong.parallel.gradients import GradientFunction, plain_gradients, why_not_additive
from dougong.runtime.device import Runtime
from dougong.runtime.mesh import Mesh


@dataclass(frozen=True)
class Parallel:
    """`model` is this process's part, to be filled (`to_empty`, then `initialise`) if it was built on meta; `gradients`
    is what `take_step` calls; `losses` is this process's share of a batch's sums, forward only, for evaluation."""

    model: nn.Module
    gradients: GradientFunction
    losses: Callable[[Batch], Losses]


def parallelize(model: nn.Module, objective: Objective, runtime: Runtime, *, micro_batches: int = 1,
                compile: Callable[[nn.Module], object] | None = None) -> Parallel:
    """Divides `model` in place by the layout of `runtime.mesh`; in one process, nothing but `compile(model)`.

    Raises ConfigError, with the reason, for what cannot be divided so.
    """
    mesh = runtime.mesh
    if mesh.devices is None:
        if compile is not None:
            compile(model)
        return Parallel(model, plain_gradients, forward_only(model, objective, runtime))
    check_divisible(model, objective, mesh)
    sums: list[GradientSums] = []
    gradients: GradientFunction = divided_gradients
    losses = forward_only(model, objective, runtime)
    stages: list[Any] = []
    if mesh.size("pipeline") > 1:
        from dougong.parallel.pipeline import split

        stages = split(model, mesh, micro_batches=micro_batches, compile=compile is not None)
    if mesh.size("expert") > 1:
        from dougong.parallel.expert import divide_experts

        divide_experts(model, mesh)
    if mesh.size("tensor") > 1:
        from dougong.parallel.tensor import divide_matrices

        sums.append(GradientSums(divide_matrices(model, mesh), mesh.group("tensor")))
    if mesh.size("context") > 1:
        from dougong.parallel.context import divide_context

        divide_context(cast(Any, model), mesh)
    if compile is not None:
        compile(model)
    if stages:
        from dougong.parallel.pipeline import Pipeline

        pipeline = Pipeline(model, stages, runtime)
        gradients = pipeline.gradients
        losses = partial(pipeline.losses, objective)
    if mesh.layout.whole:
        return Parallel(model, CopiedGradients(), forward_only(model, objective, runtime))
    for axes, left in divide(model, mesh, runtime.dtype, roots=stages).items():
        apart = {id(p) for p in left}
        if apart and (group := mesh.group(*axes)):
            sums.append(GradientSums([name for name, p in model.named_parameters() if id(p) in apart], group))
    return Parallel(model, _then(gradients, sums) if sums else gradients, losses)


def forward_only(model: nn.Module, objective: Objective, runtime: Runtime) -> Callable[[Batch], Losses]:
    """The objective's sums of a batch, without gradients; weights lie as before."""

    @torch.no_grad()
    def losses(batch: Batch) -> Losses:
        found = objective.losses(model, context_slice(batch, runtime.mesh).to(runtime.device))
        if runtime.mesh.devices is not None:
            put_back(model)
        return found

    return losses


def check_divisible(model: nn.Module, objective: Objective, mesh: Mesh) -> None:
    """Raises ConfigError where the loss of a batch is not the sum over its rows, so that processes cannot share it."""
    if reason := why_not_additive(model, objective):
        raise ConfigError(f"the layout ({mesh.layout}) shares each batch between processes, but {reason}.\n"
                          "Train it in one process: launch without torchrun and leave the layout out.")


def _then(gradients: GradientFunction, sums: Sequence[GradientSums]) -> GradientFunction:
    def summed(model: nn.Module, objective: Objective, batches: Sequence[Batch], weight: float,
               runtime: Runtime) -> Losses:
        losses = gradients(model, objective, batches, weight, runtime)
        for add_up in sums:
            add_up(model)
        return losses

    return summed

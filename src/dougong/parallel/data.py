"""Processes that read different rows: whole copies of the model (DDP), or one copy in parts (FSDP2), or both (HSDP).

Every loss is divided by the weight of the whole step before it is differentiated, so gradients are summed, never
averaged. What PyTorch averages by itself is told not to.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dougong.data.batch import Batch
from dougong.objectives.losses import Losses
from dougong.objectives.objective import Objective
from dougong.parallel.gradients import plain_gradients
from dougong.runtime.device import Runtime
from dougong.runtime.layout import COPIES, Axis
from dougong.runtime.mesh import SHARDS, Mesh
from dougong.runtime.parts import local

_LARGE = 1 << 20      # numbers from which a gradient travels by itself, not in a copy beside others


class CopiedGradients:
    """Gradients of a model of which every process along `COPIES` holds all: DDP sums them while the backward runs.

    DDP is made at the first step, when the weights are in place. All micro-batches but the last keep what they have.
    """

    def __init__(self) -> None:
        self._ddp: DistributedDataParallel | None = None

    def __call__(self, model: nn.Module, objective: Objective, batches: Sequence[Batch], weight: float,
                 runtime: Runtime) -> Losses:
        if self._ddp is None:
            self._ddp = _ddp(_LossOf(model, objective), runtime.mesh.group(*COPIES))
        ddp = self._ddp

        def begin(last: bool) -> None:
            ddp.require_backward_grad_sync = last       # what DDP.no_sync sets, over forward and backward

        return plain_gradients(model, objective, batches, weight, runtime, losses_of=ddp, begin=begin)


class _LossOf(nn.Module):
    """An objective as a module's forward: DDP prepares its sums in a forward of its own."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> Losses:
        return self.objective.losses(self.model, batch)


def _ddp(module: nn.Module, group: Any) -> DistributedDataParallel:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):      # broadcast_buffers is being renamed
        ddp = DistributedDataParallel(module, process_group=group, init_sync=False, broadcast_buffers=False,
                                      gradient_as_bucket_view=True)
    ddp.register_comm_hook(group, _sum_bucket)
    return ddp


def _sum_bucket(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The sum, where DDP's own hook takes the mean."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None, "asynchronous"
    return work.get_future().then(lambda done: done.value()[0])


def divide(model: nn.Module, mesh: Mesh, dtype: torch.dtype, *,
           roots: Sequence[nn.Module] = ()) -> dict[tuple[Axis, ...], list[nn.Parameter]]:
    """Divides every parameter over the axes that hold the same weights: each block by itself, the rest with the root.

    Blocks travel in `dtype`, in which they compute anyway; their gradients are summed in float32. Stem and head stay
    in their own precision, as their gradients add up over many tokens. Experts, divided already along `expert`, lie
    over the other axes. `roots`: what is called from outside, where that is not the model itself but its pipeline
    stages; those hold their weights for the whole step, as a backward in two parts must find them in place.

    Returns what stays undivided, by the axes over which `GradientSums` is to sum its gradient: single numbers, which
    FSDP2 refuses, and experts that lie over no other axis.
    """
    low = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy() if dtype == torch.float32 else low
    again = {"reshard_after_forward": mesh.layout.gathered == "layer" and not roots}
    left: dict[tuple[Axis, ...], list[nn.Parameter]] = {
        COPIES: [p for p in model.parameters() if p.ndim == 0], ("replicate",): []}
    for experts in _divided_experts(model):
        if mesh.along("shard", "context") is not None:
            _wrap(experts, mesh, ("shard", "context"), mp_policy=policy, **again)
        else:
            left["replicate",] += experts.parameters()
    apart = {parameter for parameters in left.values() for parameter in parameters}
    for block in getattr(model, "stack", nn.ModuleDict()).values():
        _wrap(block, mesh, SHARDS, mp_policy=policy, ignored_params=apart, **again)
    for root in roots or [model]:
        _wrap(root, mesh, SHARDS, ignored_params=apart, reshard_after_forward=False)
    if isinstance(model, FSDPModule) and hasattr(model, "hidden"):
        register_fsdp_forward_method(model, "hidden")
    return left


def _wrap(module: nn.Module, mesh: Mesh, axes: tuple[Axis, ...], *, reshard_after_forward: bool,
          **options: Any) -> None:
    """FSDP2 where there are axes to divide over, its twin that only copies where there are replicas alone."""
    shards, replicas = mesh.along(*axes), mesh.along("replicate")
    if shards is not None:
        over = shards if replicas is None else DeviceMesh._concatenate([replicas, shards])
        fully_shard(module, mesh=over, reshard_after_forward=reshard_after_forward, **options)
    elif replicas is not None:
        from torch.distributed._composable.replicate_with_fsdp import replicate

        replicate(module, mesh=replicas, **options)
    if isinstance(module, FSDPModule):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)      # gloo has no scaled sum


def _divided_experts(model: nn.Module) -> list[nn.Module]:
    """Modules that own parameters divided along `expert`."""
    return [module for module in model.modules()
            if any(isinstance(p, DTensor) and "expert" in (p.device_mesh.mesh_dim_names or ())
                   for p in module.parameters(recurse=False))]


def divided_gradients(model: nn.Module, objective: Objective, batches: Sequence[Batch], weight: float,
                      runtime: Runtime) -> Losses:
    """Gradients of a model that `divide` divided."""
    return plain_gradients(model, objective, batches, weight, runtime,
                           begin=lambda last: exchange(model, runtime, last))


def exchange(model: nn.Module, runtime: Runtime, last: bool) -> None:
    """Says what the coming micro-batch exchanges.

    Weights gathered by layer: gradients leave for their owners with every micro-batch, as there is no room for all of
    them. Gathered for the step: weights and gradients stay until the last. Replicas always wait for the last.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_all_reduce(last)
    if runtime.mesh.layout.gathered == "step" or runtime.mesh.along(*SHARDS) is None:
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)


def put_back(model: nn.Module) -> None:
    """Frees what a forward has gathered: after a forward alone nothing else does, and the next step would compute with
    weights that are no more."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class GradientSums:
    """Sums that no wrapper takes: after the last micro-batch, the gradients of some parameters over one group; small
    ones in one message, each large one where it lies."""

    def __init__(self, names: Sequence[str], group: Any) -> None:
        self.names, self.group = list(names), group

    def __call__(self, model: nn.Module) -> None:
        wanted = [model.get_parameter(name) for name in self.names]
        gradients = [local(p.grad) for p in wanted if p.grad is not None]
        if not gradients or self.group is None:
            return
        small = []
        for gradient in gradients:
            if gradient.numel() >= _LARGE and gradient.is_contiguous():
                dist.all_reduce(gradient, group=self.group)
            else:
                small.append(gradient)
        if small:
            flat = torch.cat([gradient.flatten() for gradient in small])
            dist.all_reduce(flat, group=self.group)
            torch._foreach_copy_(small, [part.view_as(gradient) for part, gradient in
                                         zip(flat.split([g.numel() for g in small]), small)])

"""Optimisers over weights that lie in parts on several processes: each moves what it holds.

State keeps the placement of its weight (so a checkpoint knows how it lies), while the arithmetic runs over local parts:
one fused kernel for all of them, however differently they lie, and no DTensor dispatch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dougong.runtime.parts import local


def in_parts(model: nn.Module) -> bool:
    """Whether any weight lies in parts."""
    return any(local(p) is not p for p in model.parameters())


class _OnParts:
    """torch collects a group's weights, gradients and moments in lists before it moves them; here the lists get the
    local parts."""

    def _init_group(self, group: dict[str, Any], *lists: list[torch.Tensor]) -> Any:
        result = super()._init_group(group, *lists)  # type: ignore[misc]
        for tensors in lists:
            tensors[:] = [local(tensor) for tensor in tensors]
        return result


class AdamW(_OnParts, torch.optim.AdamW):
    """torch's, over local parts."""


class Adam(_OnParts, torch.optim.Adam):
    """torch's, over local parts."""


def whole_matrices(parts_Kmn: torch.Tensor, like: torch.Tensor,
                   compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`compute` of K matrices whose parts here (K m n) lie as the DTensor `like` does; returns the results' parts.

    The matrices are shared out between the processes that hold their parts, by one exchange there and one back.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, placements = like.device_mesh, [_behind_one_axis(p) for p in like.placements]  # type: ignore[attr-defined]
    shape = torch.Size((len(parts_Kmn), *like.shape))
    stride = (shape[1] * shape[2], shape[2], 1)
    parts = DTensor.from_local(parts_Kmn, mesh, placements, run_check=False, shape=shape, stride=stride)
    shared = [p if p.is_replicate() else Shard(0) for p in placements]
    if sum(not p.is_replicate() for p in placements) > 1:      # by way of the whole: DTensor has no direct way
        parts = parts.redistribute(mesh, [Replicate()] * len(placements))
    mine = parts.redistribute(mesh, shared)
    done = DTensor.from_local(compute(mine.to_local()), mesh, shared, run_check=False, shape=shape, stride=stride)
    if sum(not p.is_replicate() for p in placements) > 1:
        done = done.redistribute(mesh, [Replicate()] * len(placements))
    return done.redistribute(mesh, placements).to_local()


def _behind_one_axis(placement: Any) -> Any:
    """The placement of a stack of tensors that lie so."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if placement.is_replicate():
        return placement
    if isinstance(placement, _StridedShard):
        return _StridedShard(placement.dim + 1, split_factor=placement.split_factor)
    return Shard(placement.dim + 1)

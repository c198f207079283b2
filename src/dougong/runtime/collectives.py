"""Sums and decisions over processes; the identity where a group is None, so the one-process test runs the real path."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_sum(value: Tensor, group: Any) -> Tensor:
    """The sum of `value` over a group (`Mesh.group`), in place; `value` itself where the group is None."""
    if group is not None:
        dist.all_reduce(value, group=group)
    return value


def all_max(value: Tensor, group: Any) -> Tensor:
    if group is not None:
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return value


def agree(flag: int, group: Any) -> int:
    """The largest `flag` that any process of the group brings: what one asks for, all do."""
    return int(all_max(torch.tensor(flag), group)) if group is not None else flag

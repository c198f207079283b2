"""The processes of a run arranged by their layout, and the groups in which they talk; at size 1 there is nothing."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dougong.runtime.layout import AXES, COPIES, DATA, Axis, LayoutConfig

SHARDS: tuple[Axis, ...] = ("shard", "expert", "context")
"""axes over which a sharded weight lies: those that hold the same weight, `replicate` apart"""
LOSS: tuple[Axis, ...] = ("pipeline", *COPIES)
"""axes over which losses add up; along `tensor` each process knows the whole"""
_TOGETHER: tuple[tuple[Axis, ...], ...] = (
    AXES, DATA, COPIES, SHARDS, LOSS, ("shard", "context"), ("replicate", "context"), ("replicate", "shard", "context"))


@dataclass(frozen=True)
class Mesh:
    """Where this process stands. Axes of size 1 have no group, and a mesh of one process is empty."""

    layout: LayoutConfig = field(default_factory=lambda: LayoutConfig(replicate=1))
    devices: DeviceMesh | None = None
    """only the axes above 1, by name; None for one process"""
    _joined: dict[tuple[Axis, ...], DeviceMesh] = field(default_factory=dict, repr=False)

    @classmethod
    def start(cls, layout: LayoutConfig, device_type: str) -> "Mesh":
        """Arranges the processes of the default group; every process calls it alike, once."""
        layout = layout.on(dist.get_world_size() if dist.is_initialized() else 1)
        if layout.processes == 1:
            return cls(layout)
        wide: list[Axis] = [axis for axis in AXES if layout.size(axis) > 1]
        devices = init_device_mesh(device_type, tuple(layout.size(axis) for axis in wide), mesh_dim_names=tuple(wide))
        mesh = cls(layout, devices)
        for axes in _TOGETHER:      # groups are made by all processes together, in one order
            mesh.along(*axes)
        return mesh

    def size(self, *axes: Axis) -> int:
        return self.layout.size(*axes)

    def rank(self, *axes: Axis) -> int:
        """Place of this process along these axes taken together, the first named outermost."""
        place = 0
        for axis in axes:
            here = self.devices.get_local_rank(axis) if self.devices and self.size(axis) > 1 else 0
            place = place * self.size(axis) + here
        return place

    def along(self, *axes: Axis) -> DeviceMesh | None:
        """The one-dimensional mesh along these axes (several joined to one, in mesh order); None where it is of one."""
        wide: tuple[Axis, ...] = tuple(axis for axis in AXES if axis in axes and self.size(axis) > 1)
        if not wide or self.devices is None:
            return None
        if len(wide) == 1:
            return self.devices[wide[0]]
        if wide not in self._joined:
            self._joined[wide] = self.devices[wide]._flatten("_".join(wide))
        return self._joined[wide]

    def group(self, *axes: Axis) -> Any:
        """The process group along these axes; None where it is of one (collectives are then the identity)."""
        along = self.along(*axes)
        return None if along is None else along.get_group()

    @property
    def groups(self) -> set[Any]:
        """Every group of this mesh, but the empty one."""
        single: list[tuple[Axis, ...]] = [(axis,) for axis in AXES]
        return {self.group(*axes) for axes in (*single, *_TOGETHER)} - {None}

    @property
    def data_rank(self) -> int:
        """Which of the `data_size` slices of a global batch this process reads."""
        return self.rank(*DATA)

    @property
    def data_size(self) -> int:
        return math.prod(self.size(axis) for axis in DATA)

"""Layouts as they are read, refused and laid over processes."""

import pytest
import torch
from processes import run_processes

from dougong.core.errors import ConfigError
from dougong.runtime.collectives import agree, all_sum
from dougong.runtime.device import Runtime, RuntimeConfig
from dougong.runtime.layout import AXES, COPIES, DATA, LayoutConfig
from dougong.runtime.mesh import LOSS, SHARDS, Mesh

CPU = RuntimeConfig(device="cpu", precision="fp32", threads=1)


def test_replicas_are_derived_from_the_number_of_processes():
    assert LayoutConfig(shard=2, tensor=2).on(8).replicate == 2
    assert LayoutConfig().on(1).processes == 1


@pytest.mark.parametrize(("layout", "processes", "advice"), [
    (LayoutConfig(shard=4), 2, "layout.shard=2"),
    (LayoutConfig(tensor=3), 4, "layout.tensor=1"),
    (LayoutConfig(replicate=2), 1, "nproc-per-node 2"),
    (LayoutConfig(replicate=3, shard=2), 8, "layout.replicate=4"),
])
def test_a_layout_that_does_not_fit_is_refused_with_one_that_does(layout, processes, advice):
    with pytest.raises(ConfigError, match=advice):
        layout.on(processes)


def test_one_process_has_no_groups():
    mesh = Mesh.start(LayoutConfig(), "cpu")
    assert mesh.devices is None and mesh.group(*AXES) is None and mesh.data_rank == 0 and mesh.data_size == 1


def _look():
    mesh = Runtime.start(CPU, LayoutConfig(pipeline=2, shard=2, tensor=2)).mesh
    rank = torch.distributed.get_rank()
    sums = {name: float(all_sum(torch.tensor(float(rank)), mesh.group(*axes)))
            for name, axes in {"data": DATA, "copies": COPIES, "loss": LOSS, "shards": SHARDS,
                               "pipeline": ("pipeline",), "tensor": ("tensor",), "all": AXES}.items()}
    return {axis: mesh.rank(axis) for axis in AXES} | {"data_rank": mesh.data_rank, "sums": sums,
                                                       "asked": agree(int(rank == 3), mesh.group(*AXES))}


def test_every_process_knows_its_place_and_its_neighbours():
    seen = run_processes(8, _look)
    for rank, one in enumerate(seen):
        pipeline, shard, tensor = rank // 4, rank // 2 % 2, rank % 2
        assert (one["pipeline"], one["shard"], one["tensor"], one["data_rank"]) == (pipeline, shard, tensor, shard)
        assert one["sums"]["all"] == 28 and one["asked"] == 1
        assert one["sums"]["tensor"] == rank + (rank ^ 1)
        assert one["sums"]["data"] == one["sums"]["shards"] == rank + (rank ^ 2)
        assert one["sums"]["pipeline"] == rank + (rank ^ 4)
        assert one["sums"]["loss"] == sum(r for r in range(8) if r % 2 == tensor)

"""How often the elements of a tensor lie on many processes, so that a norm counts each once.

Each process adds up the squares that it holds, each divided by the number of processes that hold the same element:
those along axes over which its tensor is not divided. So copies need not be told apart, and a NaN in any of them is
seen by all (`train.layers` sums them).
"""

import math
from typing import Any

from torch import Tensor

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

"""How the work of one step is divided between processes: six axes whose product is their number. No torch here.

| axis | what a process has of its own | what it shares |
| --- | --- | --- |
| pipeline | some of the layers | activations, passed on |
| replicate | rows of the batch | gradients, summed |
| shard | rows of the batch, and a part of every weight, gradient and moment | weights, gathered layer by layer |
| expert | rows of the batch, and some of the experts | tokens, sent to their experts |
| context | a stretch of every row | keys and values (or heads) |
| tensor | a part of every matrix product | activations, summed |

The order is that of the mesh, outermost first: neighbours in rank talk most.
"""

import math
from typing import Annotated, Literal

from pydantic import Field

from dougong.core.config import config, replace
from dougong.core.errors import ConfigError
from dougong.core.table import Table

Axis = Literal["pipeline", "replicate", "shard", "expert", "context", "tensor"]
Count = Annotated[int, Field(ge=1)]

AXES: tuple[Axis, ...] = ("pipeline", "replicate", "shard", "expert", "context", "tensor")
DATA: tuple[Axis, ...] = ("replicate", "shard", "expert")
"""axes whose processes read different rows"""
COPIES: tuple[Axis, ...] = (*DATA, "context")
"""axes whose processes hold gradients of the same weights, to be summed"""


@config
class LayoutConfig:
    """Processes along each axis. Their product is the number of processes; an axis of 1 costs nothing."""

    kind: Literal["axes"] = "axes"
    replicate: Count | None = None
    """whole copies of the model, each with its rows; None: as many as the processes launched make"""
    shard: Count = 1
    """processes that share one copy: weights, gradients and optimiser state in parts (FSDP, ZeRO)"""
    gathered: Literal["layer", "step"] = "layer"
    """how long a gathered weight is kept: for its layer, twice a step (FSDP, ZeRO-3: least memory), or for the step
    (only gradients and optimiser state stay in parts, as in ZeRO-1 and 2: less traffic)"""
    tensor: Count = 1
    """processes that share each matrix product (Megatron: arXiv:1909.08053)"""
    sequence_parallel: bool = True
    """with tensor: norms and residuals in parts along the tokens too (arXiv:2205.05198)"""
    vocabulary_parallel: bool = True
    """with tensor: the head's logits and the loss in parts along the vocabulary"""
    pipeline: Count = 1
    """processes that each hold some of the layers"""
    schedule: Literal["gpipe", "1f1b", "interleaved", "looped_bfs", "interleaved_zb", "zbv", "dualpipev"] = "1f1b"
    """order of forwards and backwards in a pipeline"""
    context: Count = 1
    """processes that each hold a stretch of every row, for long contexts"""
    context_method: Literal["all_to_all", "gather"] = "all_to_all"
    """exchange heads for tokens around attention (Ulysses: arXiv:2309.14509), or gather keys and values"""
    expert: Count = 1
    """processes that each hold some of the experts of a mixture-of-experts layer"""

    def on(self, processes: int) -> "LayoutConfig":
        """This layout on so many processes, `replicate` filled in. Raises ConfigError with the nearest that fits."""
        others = math.prod(self.size(axis) for axis in AXES if axis != "replicate")
        copies = self.replicate or max(1, processes // others)
        if copies * others != processes:
            sizes = " x ".join(f"{axis} {self.size(axis)}" for axis in AXES
                               if self.size(axis) > 1 or (axis == "replicate" and self.replicate))
            raise ConfigError(f"the layout ({sizes or 'one process'}) needs {copies * others} processes, and there "
                              f"{'is 1' if processes == 1 else f'are {processes}'}.\n"
                              + _what_to_try(self, processes, others, copies * others))
        return replace(self, replicate=copies)

    def size(self, *axes: Axis) -> int:
        """Product of the sizes of these axes; an open `replicate` counts as 1."""
        return math.prod(getattr(self, axis) or 1 for axis in axes)

    @property
    def processes(self) -> int:
        return self.size(*AXES)

    @property
    def whole(self) -> bool:
        """Whether every process holds a whole model: rows alone are divided, or stretches of them."""
        return self.size("shard", "tensor", "pipeline", "expert") == 1

    def __str__(self) -> str:
        return " x ".join(f"{axis} {self.size(axis)}" for axis in AXES if self.size(axis) > 1) or "one process"


@config
class AutoLayoutConfig:
    """The best layout that the plan finds for the processes launched."""

    kind: Literal["auto"] = "auto"


LAYOUTS = Table("layout", {"axes": "dougong.runtime.layout:LayoutConfig",
                           "auto": "dougong.runtime.layout:AutoLayoutConfig"})


def _what_to_try(layout: LayoutConfig, processes: int, others: int, needed: int) -> str:
    launch = f"Launch {needed}: torchrun --standalone --nproc-per-node {needed} -m -- dougong train …"
    if processes % others == 0:
        return f"{launch}\nor set layout.replicate={processes // others} (or leave it out: it is derived)."
    changeable: list[Axis] = [axis for axis in AXES if axis != "replicate" and layout.size(axis) > 1]
    axis: Axis = changeable[0] if len(changeable) == 1 else "shard" if layout.shard > 1 else changeable[-1]
    size = math.gcd(layout.size(axis), max(1, processes // max(1, others // layout.size(axis))))
    return f"{launch}\nor set layout.{axis}={size}."

"""What a step's loss and gradient amount to over all processes: known to the device first, to the host if it asks."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dougong.objectives.losses import Losses
from dougong.parallel.gradients import group_parameters
from dougong.runtime.collectives import all_sum
from dougong.runtime.layout import AXES
from dougong.runtime.mesh import Mesh
from dougong.runtime.parts import local
from dougong.train.layers import Layers
from dougong.train.spikes import NO_LIMIT, Spikes


@dataclass(frozen=True)
class Found:
    """Means over the step's weight, and gradient norms by parameter group and by layer. `share`: this process's own
    part of the loss, before anything was added up."""

    metrics: dict[str, float]
    losses: dict[str, float]
    norms: dict[str, float]
    layers: dict[str, float]
    share: float

    @property
    def norm(self) -> float:
        return math.sqrt(sum(value**2 for value in self.norms.values()))


class Reading:
    """Sums on the device, joined over all processes in one message, on their way to the host in one transfer."""

    def __init__(self, sums: Losses, model: nn.Module, weight: float, mesh: Mesh, layers: Layers) -> None:
        self._metrics, self._groups, self._weight, self._layers = list(sums.metrics), list(sums.sums), weight, layers
        scalars = [*sums.metrics.values(), *sums.sums.values()]
        exact = torch.float32 if scalars[0].device.type == "mps" else torch.float64
        own = layers.norms()
        squares = layers.squares(own, exact)
        stacked = torch.stack([value.to(exact) for value in scalars])
        share = stacked[len(self._metrics):].sum(0, keepdim=True)
        if mesh.devices is not None:
            assert self._groups == ["model"], "parallelize refuses objectives with several parameter groups"
            stacked /= mesh.size("tensor")      # processes along it compute the same losses
            joined = all_sum(torch.cat([stacked, squares]), mesh.group(*AXES))
            stacked, squares = joined[:len(scalars)], joined[len(scalars):]
            norms = squares.sum().sqrt()[None]
        else:
            norms = torch.stack([layers.group_norm(own, group, partial(group_parameters, model, group)).to(exact)
                                 for group in self._groups])
        first_loss = len(self._metrics)
        self._judged = torch.cat([stacked[first_loss:] / weight, norms])
        everything = torch.cat([stacked, norms, squares, share])
        self._arrived = None
        if everything.device.type == "cuda":
            everything = everything.to("cpu", non_blocking=True)     # into pinned memory; the event says when
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        self._everything = everything

    def norms(self) -> dict[str, Tensor]:
        """Gradient norms by parameter group, still on the device."""
        return dict(zip(self._groups, self._judged[len(self._groups):]))

    def above(self, limits: tuple[float, float]) -> Tensor:
        """1 on the device where a loss or norm lies above its limit or is no number, else 0 (scalar, bool); the limits
        are for one loss, as in `why_not`."""
        groups = len(self._groups)
        if self._groups != ["model"]:
            limits = NO_LIMIT, NO_LIMIT
        bounds = torch.tensor([limits[0]] * groups + [limits[1]] * groups, dtype=self._judged.dtype)
        return (self._judged <= bounds.to(self._judged.device, non_blocking=True)).all().logical_not()

    def read(self) -> Found:
        """Waits for the numbers, not for what the device does after them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values = iter(self._everything.tolist())
        metrics = {name: next(values) / self._weight for name in self._metrics}
        losses = {group: next(values) / self._weight for group in self._groups}
        norms = {group: next(values) for group in self._groups}
        layers = self._layers.by_name([next(values) for _ in self._layers.names])
        return Found(metrics, losses, norms, layers, next(values))


def own_gradients(model: nn.Module, group: str) -> list[Tensor]:
    """This process's parts of a parameter group's gradients."""
    return [local(p.grad) for p in group_parameters(model, group) if p.grad is not None]


def why_not(found: Found, spikes: Spikes) -> str | None:
    """The reason not to take a step, or None: what is not finite never counts, leaps only where they are looked for."""
    for what, values in (("loss", found.losses), ("gradient norm", found.norms)):
        for group, value in values.items():
            if not math.isfinite(value):
                return f"the {what}{'' if group == 'model' else ' of ' + group} is {value}"
    return spikes.why(found.losses["model"], found.norms["model"]) if list(found.losses) == ["model"] else None

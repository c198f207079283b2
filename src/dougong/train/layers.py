"""Gradient norms by layer, from the same norms of single tensors that the whole gradient's norm is made of."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dougong.parallel.norms import copies
from dougong.runtime.mesh import Mesh
from dougong.runtime.parts import local


class Layers:
    """The layers of a model, those of all pipeline stages together; every process makes it at the same time."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        self.mesh = mesh
        names = list(dict.fromkeys(layer_of(name) for name, p in model.named_parameters() if p.requires_grad))
        if mesh.size("pipeline") > 1:
            gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(gathered, names)
            names = list(dict.fromkeys(name for part in gathered for name in part))
        self.names = names
        stages = getattr(model, "held_elsewhere", {})
        place = {name: slot for slot, name in enumerate(names)}
        self._parameters = [(p, place[layer_of(name)], 1 / (copies(p, mesh) * stages.get(name, 1)))
                            for name, p in model.named_parameters() if p.requires_grad]
        self._known: dict[Any, Tensor] = {}

    def norms(self) -> Tensor:
        """The norm of this process's part of each gradient (P), in the parameters' order."""
        gradients = [local(p.grad) for p, _, _ in self._parameters if p.grad is not None]
        if not gradients:
            return torch.zeros(0, device=self._parameters[0][0].device)
        return torch.stack(torch._foreach_norm(gradients))

    def squares(self, norms: Tensor, exact: torch.dtype) -> Tensor:
        """This process's share of each layer's squared norm (L): shares add up over all processes."""
        slots = self._column("slots", norms.device, lambda _, slot, __: slot)
        shares = self._column("shares", norms.device, lambda _, __, share: share).to(exact)
        found = torch.zeros(len(self.names), dtype=exact, device=norms.device)
        return found.index_add_(0, slots, norms.to(exact).square() * shares)

    def group_norm(self, norms: Tensor, group: str, parameters: Callable[[], list[nn.Parameter]]) -> Tensor:
        """The norm of one parameter group's gradient (scalar), where this process holds all of it."""
        if group != "model":
            def place(p: nn.Parameter, _slot: int, _share: float) -> bool:
                return any(p is member for member in parameters())

            norms = norms[self._column(group, norms.device, place)]
        return torch.linalg.vector_norm(norms)

    def _column(self, what: str, device: torch.device, value: Callable[..., Any]) -> Tensor:
        """A value for each parameter that has a gradient, on the device; the same at nearly every step."""
        having = tuple(p.grad is not None for p, _, _ in self._parameters)
        if (what, having) not in self._known:
            rows = [value(*one) for one, has in zip(self._parameters, having) if has]
            self._known[what, having] = torch.tensor(rows, device=device)
        return self._known[what, having]

    def by_name(self, squares: Sequence[float]) -> dict[str, float]:
        """Norms by layer; NaN where a square is not finite."""
        return {name: math.sqrt(value) if value >= 0 else math.nan for name, value in zip(self.names, squares)}


def layer_of(parameter: str) -> str:
    """`stack.3.attention.query.weight` lies in `stack.3`, `embedding.weight` in `embedding`."""
    parts = parameter.replace("_orig_mod.", "").split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[:number + 1])

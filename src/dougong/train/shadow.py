"""One lagged copy of a model: an average of its weights, a target network or a teacher, by two numbers."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dougong.runtime.parts import local
from dougong.train.parts import fill


class Shadow:
    """Weights that follow a model's: every `every` steps, `shadow += tau * (model - shadow)`.

    EMA: every=1, tau=1-decay. DQN's target: every=1000, tau=1. A self-supervised teacher: every=1, tau=0.004.
    With `debias` the k-th update moves by at least 1/(k+1), so the first weights are not remembered for ever
    (Tarvainen and Valpola 2017, arXiv:1703.01780). Floating buffers (batch statistics) follow likewise,
    others are copied. Of a sharded model each process follows its own part, without a message.
    """

    def __init__(self, model: nn.Module, *, every: int = 1, tau: float, debias: bool = True) -> None:
        self.every, self.tau, self.debias = every, tau, debias
        self.updates = 0
        self.tensors = {name: tensor.detach().clone() for name, tensor in moving(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Follows the model if `step` (steps done) is a multiple of `every`."""
        if step % self.every:
            return
        self.updates += 1
        tau = max(self.tau, 1 / (self.updates + 1)) if self.debias else self.tau
        source = moving(model)
        floating = [name for name, tensor in source.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([local(self.tensors[n]) for n in floating], [local(source[n]) for n in floating], tau)
        for name in source.keys() - set(floating):
            self.tensors[name].copy_(source[name])

    @contextlib.contextmanager
    def swapped(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the lagged weights inside the block, its own again after it (also after an
        error)."""
        self._exchange(model)
        try:
            yield model
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for name, tensor in moving(model).items():
            if local(tensor) is not tensor:     # FSDP keeps views of this memory: contents change places, not pointers
                mine, lagged = local(tensor), local(self.tensors[name])
                before = mine.clone()
                mine.copy_(lagged)
                lagged.copy_(before)
            else:
                tensor.data, self.tensors[name] = self.tensors[name], tensor.data

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """`model(*args)` computed with the lagged weights, the model itself untouched: a target's or
        teacher's answer."""
        with torch.no_grad():
            return torch.func.functional_call(model, self.tensors, args, kwargs)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "tensors": dict(self.tensors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        for name, tensor in self.tensors.items():
            fill(tensor, state["tensors"][name])


def tracked(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each once (a tied weight under its first name)."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name.replace("_orig_mod.", "")] = tensor
    return found


def moving(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, and so what a checkpoint holds: all that is tracked but for frozen weights, which belong
    to the model that the run began from."""
    return {name: tensor for name, tensor in tracked(model).items()
            if tensor.requires_grad or not isinstance(tensor, nn.Parameter)}

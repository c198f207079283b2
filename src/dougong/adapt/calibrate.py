"""What enters each linear map of a model while it reads calibration text, layer by layer.

Whoever quantises asks for the maps of a layer in the order in which they run, changes them, and goes on: what comes
later is computed with what was changed before, so that it can make up for it (the sequential order of GPTQ,
arXiv:2210.17323, section 3). One layer's inputs are held at a time, of all batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dougong.core.errors import DataError
from dougong.data.batch import Batch
from dougong.models.stack import Carry
from dougong.nn.linear import Linear

Linears = dict[str, Linear]


@dataclass
class Moments:
    """Sums over the vectors x that entered a map: `products` Σ x xᵀ, `magnitude` Σ |x|, and how many there were."""

    products: Float[Tensor, "I I"]
    magnitude: Float[Tensor, " I"]
    count: int = 0

    @classmethod
    def of(cls, inputs: int, device: torch.device) -> "Moments":
        return cls(torch.zeros(inputs, inputs, device=device), torch.zeros(inputs, device=device))

    def add(self, x: Float[Tensor, "*batch I"]) -> None:
        rows = x.detach().flatten(0, -2).float()
        self.products.addmm_(rows.T, rows)
        self.magnitude += rows.abs().sum(0)
        self.count += len(rows)


@dataclass
class Layer:
    """One layer of the walk. `maps()` yields the linear maps that read the same vectors, and the moments of these."""

    name: str
    model: Any
    batches: Sequence[Batch]
    carries: list[Carry]

    def maps(self) -> Iterator[tuple[Linears, Moments]]:
        for together in self._sharing():
            first = next(iter(together.values()))
            moments = Moments.of(first.in_features, first.weight.device)
            with _listening({"": first}, lambda _, x, moments=moments: moments.add(x)):
                self.run()
            yield together, moments

    @torch.no_grad()
    def run(self) -> list[Carry]:
        """What leaves the layer, of every batch."""
        return [self._forward(batch, carry) for batch, carry in zip(self.batches, self.carries)]

    def _forward(self, batch: Batch, carry: Carry) -> Carry:
        return self.model.stream(batch["tokens"], segment_BT=batch.get("segment"), carry=carry, layers=(self.name,))

    @torch.no_grad()
    def _sharing(self) -> list[Linears]:
        """The layer's maps in the order of their calls, those together that are given the very same tensor."""
        prefix = f"stack.{self.name}."
        linears = {prefix + name: part for name, part in self.model.stack[self.name].named_modules()
                   if isinstance(part, Linear)}
        calls: list[tuple[str, Tensor]] = []
        with _listening(linears, lambda name, x: calls.append((name, x))):
            self._forward(self.batches[0], self.carries[0])
        groups: list[tuple[Tensor, Linears]] = []
        for name, x in calls:
            if not groups or groups[-1][0] is not x:
                groups.append((x, {}))
            groups[-1][1][name] = linears[name]
        return [together for _, together in groups]


@torch.no_grad()
def layers(model: Any, batches: Sequence[Batch]) -> Iterator[Layer]:
    """The layers in order; each is given what the ones before it, as they are by then, make of the batches."""
    check_enough(model, batches)
    carries = [model.stream(batch["tokens"], segment_BT=batch.get("segment"), layers=()) for batch in batches]
    for name in model.stack:
        layer = Layer(name, model, batches, carries)
        yield layer
        carries = layer.run()


@torch.no_grad()
def head_moments(model: Any, batches: Sequence[Batch]) -> Moments:
    """What enters the head of the model as it is."""
    moments = Moments.of(model.head.weight.shape[1], model.head.weight.device)
    for batch in batches:
        moments.add(model.hidden(batch["tokens"], segment_BT=batch.get("segment")))
    return moments


def check_enough(model: Any, batches: Sequence[Batch]) -> None:
    """Raises DataError where there are fewer tokens than a map has inputs: how those go together is then unknown."""
    widest = max(part.in_features for part in model.stack.modules() if isinstance(part, Linear))
    tokens = sum(batch["tokens"].numel() for batch in batches)
    if tokens < widest:
        raise DataError(f"{tokens:,} tokens to calibrate on are fewer than the {widest:,} inputs of the widest matrix: "
                        "of most directions they say nothing.\nGive more text, or use --method rtn, which needs none.")


class _listening:
    """While it lasts, `hear(name, x)` is called with what enters each map."""

    def __init__(self, linears: Linears, hear: Any) -> None:
        self.handles = [linear.register_forward_pre_hook(lambda _, inputs, name=name: hear(name, inputs[0]))
                        for name, linear in linears.items()]

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

"""What to think of a step that leaps or is not finite: the same computation again, and the rows one by one.

Run again from the same weights, batch and random numbers, a fault of the data or the optimisation comes back, one of
the hardware or of an operation that is not deterministic does not (the idea of Megatron-LM's rerun state machine).
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dougong.data.batch import Batch
from dougong.objectives.objective import Objective
from dougong.runtime.device import Runtime
from dougong.train.reading import Found

_SAME = 1e-2
"""relative difference of two runs of one step that is still the noise of unordered sums in bf16"""
_SHOWN = 3


@dataclass(frozen=True)
class Before:
    """What a forward changes besides gradients: random numbers, and running statistics where a model has them."""

    numbers: list[tuple[Any, Tensor]]
    """modules of torch that draw, each with the state of its generator"""
    statistics: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, model: nn.Module, device: torch.device) -> "Before":
        drawing: list[Any] = {"cuda": [torch, torch.cuda], "mps": [torch, torch.mps]}.get(device.type, [torch])
        return cls([(module, module.get_rng_state()) for module in drawing], [
            (buffer, buffer.clone()) for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) for buffer in module.buffers()])

    def put_back(self, *, random_numbers: bool = True) -> None:
        for buffer, before in self.statistics:
            buffer.copy_(before)
        if random_numbers:
            for module, state in self.numbers:
                module.set_rng_state(state)


def compare(first: Found, second: Found, first_reason: str,
            second_reason: str | None) -> tuple[str, dict[str, Any] | None]:
    """("persistent", None), or ("transient", what happened): `here` says that it was in this process's own loss."""
    pairs = [*zip(first.losses.values(), second.losses.values()), *zip(first.norms.values(), second.norms.values())]
    if second_reason and all(_same(a, b) for a, b in pairs):
        return "persistent", None
    return "transient", {
        "reason": first_reason, "here": not _same(first.share, second.share), "taken": second_reason is None,
        "first": {"loss": sum(first.losses.values()), "grad_norm": first.norm},
        "second": {"loss": sum(second.losses.values()), "grad_norm": second.norm}}


def _same(a: float, b: float) -> bool:
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.isfinite(a) == math.isfinite(b)
    return abs(a - b) <= _SAME * max(abs(a), abs(b))


def name_suspects(result: Any, objective: Objective, runtime: Runtime) -> list[dict[str, Any]]:
    """`worst_rows` of a step's batch, named where the loader can; random numbers stay as they were."""
    state, documents = result.state, None
    before = Before.of(state.model, runtime.device)
    if result.number is not None and hasattr(state.loader, "documents"):
        documents = state.loader.documents(result.number)
    rows = worst_rows(state.model, objective, result.batch, runtime, documents)
    before.put_back()
    return rows


@torch.no_grad()
def worst_rows(model: nn.Module, objective: Objective, batch: Batch, runtime: Runtime,
               documents: list[list[str]] | None) -> list[dict[str, Any]]:
    """The rows of this process's batch with the largest losses, those that are no number first, with their documents.

    Each is a forward of one row, uncompiled: one row, without dropout and gradient, is another graph, and compiling it
    would take longer than all rows do. Nothing where rows cannot be told apart: an objective over the whole batch, or a
    model of which a process holds a stage or a part of the context.
    """
    if objective.not_additive or runtime.mesh.size("pipeline", "context") > 1:
        return []
    training = model.training
    model.eval()
    eager = torch.compiler.set_stance("force_eager") if runtime.compile else contextlib.nullcontext()
    try:
        with eager:
            losses = [_row_loss(model, objective, row, runtime) for row in batch.split(1)]
    finally:
        model.train(training)
    finite = sorted(loss for loss in losses if math.isfinite(loss))
    worst = sorted(range(len(losses)), key=lambda row: (math.isfinite(losses[row]), -losses[row]))[:_SHOWN]
    return [{"row": row, "loss": losses[row], "median": finite[len(finite) // 2] if finite else None,
             "documents": documents[row] if documents else []} for row in worst]


def _row_loss(model: nn.Module, objective: Objective, row: Batch, runtime: Runtime) -> float:
    losses = objective.losses(model, row.to(runtime.device))
    return float(sum(losses.sums.values())) / (objective.weight(row) or 1.0)

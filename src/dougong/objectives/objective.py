"""The face every objective shows the training loop."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dougong.data.batch import Batch
from dougong.objectives.losses import Losses


class Objective(Protocol):
    """Turns a model and a batch into summed losses.

    `not_additive` says why the loss of a batch is not the sum over its micro-batches (in-batch negatives,
    noise drawn for the whole batch); None where it is. Gradient accumulation is refused with that reason.
    """

    not_additive: str | None

    def weight(self, batch: Batch) -> float:
        """What the summed losses are divided by; known from the batch alone, before any forward."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> Losses: ...


Fields = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""name -> shape and type of a batch's tensors"""


def batch_fields(section: Any, rows: int, T: int) -> Fields:
    """The batch that the objective of a recipe's section reads, of rows of T tokens: what its `fields` say, or else
    tokens with a target each. Plans are made from it."""
    return section.fields(rows, T) if hasattr(section, "fields") else token_fields(rows, T)


def token_fields(*shape: int) -> Fields:
    """Tokens, their targets, and what each counts."""
    return {"tokens": (shape, torch.long), "targets": (shape, torch.long), "weight": (shape, torch.float32)}


def row_weight(batch: Batch) -> Tensor:
    """The weight of each row (B, float): the field `weight` where the source gives one, else ones."""
    if "weight" in batch:
        return batch["weight"]
    return torch.ones(batch.rows, device=next(iter(batch.values())).device)


def at_least_fp32(value: Tensor) -> Tensor:
    """`value`, raised to fp32 if it came in a 16-bit type: losses are summed in fp32 or better."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()

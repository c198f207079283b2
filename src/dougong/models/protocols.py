"""What the rooms above may expect of a model."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dougong.nn.attention import Cache


@runtime_checkable
class Model(Protocol):
    """Any model: its call is what its objective asks for.

    `regression` calls `model(features) -> prediction`, `classify` calls `model(pixels) -> logits`, `gan`
    calls `model.generator(noise)` and `model.discriminator(pixels)`, token objectives use `LanguageModel`. A
    model whose loss does not add over micro-batches says why in `not_additive`; where the attribute is None
    or absent, it adds.
    """

    config: Any
    """the frozen family config it was built from"""
    compute_dtype: torch.dtype
    """precision of the computation, set by the assembly; parameters stay float32"""

    def initialise(self, seed: int) -> None:
        """Fills every parameter and buffer, each parameter from the seed and its own name alone."""
        ...


@runtime_checkable
class LanguageModel(Model, Protocol):
    """A causal model over token ids."""

    head: nn.Module
    """x_…D -> logits_…V in the precision of x, scale and soft-cap included"""

    def hidden(self, tokens_BT: Tensor, *, segment_BT: Tensor | None = None,
               cache: Cache | None = None) -> Tensor:
        """The stream after the final norm, B T D."""
        ...

    def head_parameters(self) -> list[Tensor]:
        """Those that the head computes with, a tied embedding included."""
        ...

    def __call__(self, tokens_BT: Tensor, *, segment_BT: Tensor | None = None,
                 cache: Cache | None = None) -> Tensor:
        """Logits, B T V: `head(hidden(…))`."""
        ...

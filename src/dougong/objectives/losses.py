"""What an objective returns."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Losses:
    """Summed losses and statistics of one micro-batch; the loop divides both once, by the step's whole
    weight.

    `sums` maps a parameter group ("model", or a top-level child of the model such as "generator") to its
    summed, differentiable loss. `metrics` are summed, detached statistics.
    """

    sums: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)

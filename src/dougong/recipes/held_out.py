"""How well an objective is met on held-out rows: its own metrics, by their own weight, over all of them."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from dougong.data.batch import Batch
from dougong.objectives.objective import Objective
from dougong.runtime.device import Runtime


@torch.no_grad()
def held_out(objective: Objective, model: nn.Module, batches: Iterable[Batch], runtime: Runtime, *,
             most_tokens: int | None = None, poll: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Means of the objective's metrics over the batches, in evaluation mode; `loss` is what is minimised where no
    metric has that name, and `weight` what they are means over. Stops after `most_tokens` tokens."""
    was_training = model.training
    model.eval()
    sums: Counter[str] = Counter()
    weight, tokens = 0.0, 0
    try:
        for batch in batches:
            poll()
            found = objective.losses(model, batch.to(runtime.device))
            sums.update({"loss": float(sum(loss.double() for loss in found.sums.values()))}
                        | {name: float(value) for name, value in found.metrics.items()})
            weight += objective.weight(batch)
            tokens += batch["tokens"].numel() if "tokens" in batch else 0
            if most_tokens and tokens >= most_tokens:
                break
    finally:
        model.train(was_training)
    return {name: value / weight for name, value in sums.items()} | {"weight": weight} if weight else {}

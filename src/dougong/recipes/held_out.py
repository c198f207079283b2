"""How well an objective is met on held-out rows: its own metrics, by their own weight, over all of them; by one
process, or by those that share a model."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn

from dougong.data.batch import Batch
from dougong.objectives.losses import Losses
from dougong.objectives.objective import Objective
from dougong.runtime.collectives import all_sum
from dougong.runtime.device import Runtime
from dougong.runtime.mesh import LOSS


@torch.no_grad()
def held_out(objective: Objective, model: nn.Module, batches: Iterable[Batch], runtime: Runtime, *,
             most_tokens: int | None = None, poll: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Means of the objective's metrics over the batches, in evaluation mode; `loss` is what is minimised where no
    metric has that name, and `weight` what they are means over. Stops after `most_tokens` tokens."""
    was_training = model.training
    model.eval()
    sums: Counter[str] = Counter()
    weight = 0.0
    try:
        for batch in _up_to(batches, most_tokens):
            poll()
            sums.update(_sums(objective.losses(model, batch.to(runtime.device))))
            weight += objective.weight(batch)
    finally:
        model.train(was_training)
    return _means(sums, weight)


def held_out_together(losses: Callable[[Batch], Losses], objective: Objective, batches: Iterable[Batch],
                      runtime: Runtime, *, rows: int, most_tokens: int | None = None,
                      poll: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """`held_out` by many processes, which take the batches, of at most `rows` rows each, in turn.

    `losses` gives this process's share of the sums of a batch (`parallel.Parallel.losses`) and is called equally often
    everywhere: who has no batch left computes the last one again and counts nothing, as others may need its part of
    the model.
    """
    mesh = runtime.mesh
    sums: Counter[str] = Counter()
    weight, left = 0.0, _up_to(batches, most_tokens)
    while each := list(islice(left, mesh.data_size)):
        poll()
        mine = each[min(mesh.data_rank, len(each) - 1)]
        found = _sums(losses(_filled(mine, rows) if mesh.size("pipeline") > 1 else mine.to(runtime.device)))
        sums.update({name: value * (mesh.data_rank < len(each)) for name, value in found.items()})
        weight += sum(map(objective.weight, each))
    names = sorted(sums)
    totals = all_sum(torch.tensor([sums[name] for name in names], dtype=torch.float64), mesh.group(*LOSS))
    return _means(dict(zip(names, totals.tolist(), strict=True)), weight)


def _filled(batch: Batch, rows: int) -> Batch:
    """With rows of no weight up to `rows`: a pipeline's buffers have one size."""
    fields = {name: torch.cat([values, values[:1].expand(rows - batch.rows, *values.shape[1:])])
              for name, values in batch.items()}
    fields["weight"][batch.rows:] = 0
    return Batch(**fields)


def _up_to(batches: Iterable[Batch], most_tokens: int | None) -> Iterator[Batch]:
    tokens = 0
    for batch in batches:
        yield batch
        tokens += batch["tokens"].numel() if "tokens" in batch else 0
        if most_tokens and tokens >= most_tokens:
            return


def _sums(found: Losses) -> dict[str, float]:
    return {"loss": float(sum(loss.cpu().double() for loss in found.sums.values()))} | {
        name: float(value) for name, value in found.metrics.items()}


def _means(sums: Mapping[str, float], weight: float) -> dict[str, Any]:
    return {name: value / weight for name, value in sums.items()} | {"weight": weight} if weight else {}

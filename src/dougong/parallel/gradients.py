"""From a batch to gradients: micro-batches one after another, their losses summed.

Every way to divide a model keeps this one loop; what differs is what happens before each micro-batch (who exchanges
gradients, and when), where the loss is computed, and what is left to be summed at the end.
"""

from collections.abc import Callable, Sequence

from torch import nn

from dougong.data.batch import Batch
from dougong.objectives.losses import Losses
from dougong.objectives.objective import Objective
from dougong.parallel.context import context_slice
from dougong.runtime.device import Runtime

GradientFunction = Callable[[nn.Module, Objective, Sequence[Batch], float, Runtime], Losses]
"""(model, objective, micro-batches, weight of the whole step over all processes, runtime) -> this process's sums over
all micro-batches, detached; leaves the gradient of the mean loss over the global batch in `.grad`. A private one
clips each row's gradient and adds noise."""


def plain_gradients(model: nn.Module, objective: Objective, batches: Sequence[Batch], weight: float,
                    runtime: Runtime, *, losses_of: Callable[[Batch], Losses] | None = None,
                    begin: Callable[[bool], None] | None = None) -> Losses:
    """Accumulates the gradient of the mean loss over the micro-batches; each parameter group gets its own loss only.

    `losses_of` computes a micro-batch's losses where it is not the objective itself; `begin(last)` is told before each
    micro-batch whether it is the last.
    """
    totals = Losses({}, {})
    for number, batch in enumerate(batches):
        if begin is not None:
            begin(number == len(batches) - 1)
        batch = context_slice(batch, runtime.mesh).to(runtime.device)
        losses = objective.losses(model, batch) if losses_of is None else losses_of(batch)
        last = len(losses.sums) - 1
        for index, (group, loss) in enumerate(losses.sums.items()):
            inputs = None if group == "model" else group_parameters(model, group)
            (loss / weight).backward(inputs=inputs, retain_graph=index < last)
        for total, new in ((totals.sums, losses.sums), (totals.metrics, losses.metrics)):
            for name, value in new.items():
                total[name] = total[name] + value.detach() if name in total else value.detach()
    return totals


def group_parameters(model: nn.Module, group: str) -> list[nn.Parameter]:
    """Parameters of a group: "model" is all, another name a top-level child."""
    owner = model if group == "model" else model.get_submodule(group)
    return [p for p in owner.parameters() if p.requires_grad]


def why_not_additive(model: nn.Module, objective: Objective) -> str | None:
    """Why the loss of a batch is not the sum over its parts: the objective's reason, the model's own
    (`model.not_additive`), or batch normalisation's."""
    norm = next((name for name, module in model.named_modules()
                 if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training), None)
    batch_norm = f"the model normalises over the batch ({norm})" if norm is not None else None
    return objective.not_additive or getattr(model, "not_additive", None) or batch_norm

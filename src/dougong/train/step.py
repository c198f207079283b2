"""One optimiser step: gradients of a whole batch in micro-batches, checked, clipped, applied."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dougong.core.errors import ConfigError
from dougong.data.batch import Batch
from dougong.objectives.losses import Losses
from dougong.objectives.objective import Objective
from dougong.runtime.device import Runtime
from dougong.train.state import TrainState

GradientFunction = Callable[[nn.Module, Objective, Sequence[Batch], float, Runtime], Losses]
"""(model, objective, micro-batches, weight of the whole step, runtime) -> sums over all micro-batches,
detached; leaves the gradient of the mean loss in `.grad`. A private one clips each row's gradient and adds
noise."""


@dataclass
class StepResult:
    """What one step did. `metrics` are means over the step's weight; `skipped` is the reason, or None."""

    state: TrainState
    step: int
    metrics: dict[str, float]
    lr: float
    grad_norm: float
    weight: float
    tokens: int
    seconds: float = 0.0
    skipped: str | None = None
    batch: Batch = field(repr=False, default_factory=Batch)


def plain_gradients(model: nn.Module, objective: Objective, batches: Sequence[Batch], weight: float,
                    runtime: Runtime) -> Losses:
    """Accumulates the gradient of the mean loss over the micro-batches; each parameter group gets its own
    loss only."""
    totals = Losses({}, {})
    for batch in batches:
        losses = objective.losses(model, batch.to(runtime.device))
        last = len(losses.sums) - 1
        for index, (group, loss) in enumerate(losses.sums.items()):
            inputs = None if group == "model" else group_parameters(model, group)
            (loss / weight).backward(inputs=inputs, retain_graph=index < last)
        for total, new in ((totals.sums, losses.sums), (totals.metrics, losses.metrics)):
            for name, value in new.items():
                total[name] = total[name] + value.detach() if name in total else value.detach()
    return totals


def take_step(state: TrainState, objective: Objective, batch: Batch, runtime: Runtime, *, weight: float,
              micro_rows: int | None, clip_norm: float,
              gradients: GradientFunction = plain_gradients) -> StepResult:
    """Moves the weights by one step on `batch`, or skips it if the loss or the gradient is not finite.

    `weight` is the step's whole loss weight, over all processes. The device is waited for once, when the loss
    and the gradient norm are read.
    """
    factor = state.schedule(state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    statistics = _batch_statistics(state.model)
    metrics, norm, skipped = {}, math.nan, "the batch has no weight"
    if weight:
        sums = gradients(state.model, objective, batch.split(micro_rows or batch.rows), weight, runtime)
        metrics, losses, norms = _read(sums, state.model, weight)
        norm, skipped = math.sqrt(sum(value**2 for value in norms.values())), _not_finite(losses, norms)
    if skipped is None:
        for group, group_norm in norms.items():
            _clip(state.model, group, group_norm, clip_norm)
        state.optimizer.step()
    else:       # the weights do not move; neither may running statistics, which a NaN would poison for ever
        for buffer, before in statistics:
            buffer.copy_(before)
    state.optimizer.zero_grad(set_to_none=True)
    return StepResult(state=state, step=state.step + 1, metrics=metrics, grad_norm=norm, weight=weight,
                      lr=state.optimizer.param_groups[0]["lr"], tokens=items(batch), skipped=skipped,
                      batch=batch)


def check_additive(model: nn.Module, objective: Objective, rows: int, micro_rows: int | None) -> None:
    """Raises ConfigError, with the reason, if micro-batches are asked for that do not add up to the batch."""
    if micro_rows is None or micro_rows >= rows:
        return
    if reason := why_not_additive(model, objective):
        raise ConfigError(f"train.micro_rows={micro_rows} would split a batch of {rows} rows, but {reason}.\n"
                          "Leave train.micro_rows out, or lower train.rows to what fits in memory.")


def why_not_additive(model: nn.Module, objective: Objective) -> str | None:
    """The objective's reason, the model's own (`model.not_additive`), or batch normalisation's."""
    norm = next((name for name, module in model.named_modules()
                 if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training), None)
    batch_norm = f"the model normalises over the batch ({norm})" if norm is not None else None
    return objective.not_additive or getattr(model, "not_additive", None) or batch_norm


def group_parameters(model: nn.Module, group: str) -> list[nn.Parameter]:
    """Parameters of a group: "model" is all, another name a top-level child."""
    owner = model if group == "model" else model.get_submodule(group)
    return [p for p in owner.parameters() if p.requires_grad]


def items(batch: Batch) -> int:
    """What throughput counts: tokens where the batch has them, else rows."""
    return batch["tokens"].numel() if "tokens" in batch else batch.rows


def _read(sums: Losses, model: nn.Module, weight: float) -> tuple[dict[str, float], ...]:
    """Mean metrics, mean losses and gradient norms by group, brought from the device in one transfer."""
    norms = {group: torch.nn.utils.get_total_norm(_gradients(model, group)) for group in sums.sums}
    tensors = [*sums.metrics.values(), *sums.sums.values(), *norms.values()]
    exact = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    values = iter(torch.stack([value.to(exact) for value in tensors]).tolist())
    metrics = {name: next(values) / weight for name in sums.metrics}
    losses = {group: next(values) / weight for group in sums.sums}
    return metrics, losses, {group: next(values) for group in norms}


def _gradients(model: nn.Module, group: str) -> list[Tensor]:
    return [p.grad for p in group_parameters(model, group) if p.grad is not None]


def _not_finite(losses: dict[str, float], norms: dict[str, float]) -> str | None:
    for what, values in (("loss", losses), ("gradient norm", norms)):
        for group, value in values.items():
            if not math.isfinite(value):
                return f"the {what}{'' if group == 'model' else ' of ' + group} is {value}"
    return None


def _clip(model: nn.Module, group: str, norm: float, limit: float) -> None:
    """Scales the group's gradient to at most `limit`; the norm is known, so a smaller one costs nothing."""
    if limit and norm > limit:
        torch._foreach_mul_(_gradients(model, group), limit / norm)


def _batch_statistics(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Running statistics with copies of them, for models that have any."""
    return [(buffer, buffer.clone()) for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) for buffer in module.buffers()]

"""One optimiser step: gradients of a whole batch in micro-batches, checked, clipped, applied."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dougong.core.errors import ConfigError
from dougong.data.batch import Batch
from dougong.objectives.losses import Losses
from dougong.objectives.objective import Objective
from dougong.parallel.gradients import GradientFunction, group_parameters, plain_gradients, why_not_additive
from dougong.parallel.norms import local, squared_norm
from dougong.runtime.collectives import all_sum
from dougong.runtime.device import Runtime
from dougong.runtime.layout import AXES
from dougong.runtime.mesh import Mesh
from dougong.train.state import TrainState

__all__ = ["GradientFunction", "StepResult", "check_additive", "group_parameters", "items", "plain_gradients",
           "take_step", "why_not_additive"]


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


def take_step(state: TrainState, objective: Objective, batch: Batch, runtime: Runtime, *, weight: float,
              micro_rows: int | None, clip_norm: float,
              gradients: GradientFunction = plain_gradients) -> StepResult:
    """Moves the weights by one step on `batch`, or skips it if the loss or the gradient is not finite.

    `weight` is the step's whole loss weight, over all processes, which all move or all skip. The device is waited for
    once, when the loss and the gradient norm are read.
    """
    factor = state.schedule(state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    statistics = _batch_statistics(state.model)
    metrics, norm, skipped = {}, math.nan, "the batch has no weight"
    if weight:
        sums = gradients(state.model, objective, batch.split(micro_rows or batch.rows), weight, runtime)
        metrics, losses, norms = _read(sums, state.model, weight, runtime.mesh)
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


def items(batch: Batch) -> int:
    """What throughput counts: tokens where the batch has them, else rows."""
    return batch["tokens"].numel() if "tokens" in batch else batch.rows


def _read(sums: Losses, model: nn.Module, weight: float, mesh: Mesh) -> tuple[dict[str, float], ...]:
    """Mean metrics, mean losses and gradient norms by group, brought from the device in one transfer."""
    if mesh.devices is None:
        norms = {group: torch.nn.utils.get_total_norm(_gradients(model, group)) for group in sums.sums}
    else:
        assert list(sums.sums) == ["model"], "parallelize refuses objectives with several parameter groups"
        norms = {"model": squared_norm(model, mesh)}
    tensors = [*sums.metrics.values(), *sums.sums.values(), *norms.values()]
    exact = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    stacked = torch.stack([value.to(exact) for value in tensors])
    if mesh.devices is not None:
        stacked = _over_processes(stacked, mesh)
    values = iter(stacked.tolist())
    metrics = {name: next(values) / weight for name in sums.metrics}
    losses = {group: next(values) / weight for group in sums.sums}
    return metrics, losses, {group: next(values) for group in norms}


def _over_processes(values: Tensor, mesh: Mesh) -> Tensor:
    """Sums of losses over all processes, and the norm from the shares of its square: one message.

    Processes along `tensor` compute the same losses, so each brings a part of them.
    """
    values[:-1] /= mesh.size("tensor")
    all_sum(values, mesh.group(*AXES))
    values[-1].sqrt_()
    return values


def _gradients(model: nn.Module, group: str) -> list[Tensor]:
    """This process's parts of them."""
    return [local(p.grad) for p in group_parameters(model, group) if p.grad is not None]


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

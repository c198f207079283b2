"""One optimiser step: gradients of a whole batch in micro-batches, checked, clipped, applied."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from dougong.core.errors import ConfigError
from dougong.data.batch import Batch
from dougong.objectives.objective import Objective
from dougong.parallel.gradients import GradientFunction, group_parameters, plain_gradients, why_not_additive
from dougong.runtime.device import Runtime
from dougong.runtime.layout import COPIES
from dougong.train.layers import Layers
from dougong.train.phases import Clock
from dougong.train.reading import Reading, own_gradients, why_not
from dougong.train.state import TrainState
from dougong.train.suspects import Before, compare

__all__ = ["GradientFunction", "StepResult", "check_additive", "group_parameters", "items", "plain_gradients",
           "take_step", "why_not_additive"]


NO_WEIGHT = "the batch has no weight"


@dataclass
class StepResult:
    """What one step did. `metrics` are means over the step's weight; `skipped` is the reason, or None.

    `loss` is what was minimised, `layers` are gradient norms by layer, `phases` seconds, `number` is the batch's in the
    loader's order. `verdict` is what computing a suspicious step again has shown: "persistent" (the data or the weights
    are at fault) or "transient" (the machine is; `fault` says what it had given, and the step is taken if the second
    time was good). `suspects` are the rows of a skipped batch with the largest losses.
    """

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
    layers: dict[str, float] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    number: int | None = None
    verdict: str | None = None
    fault: dict[str, Any] | None = None
    suspects: list[dict[str, Any]] = field(default_factory=list)
    loss: float = math.nan


def take_step(state: TrainState, objective: Objective, batch: Batch, runtime: Runtime, *, weight: float,
              micro_rows: int | None, clip_norm: float, gradients: GradientFunction = plain_gradients,
              clock: Clock | None = None, layers: Layers | None = None, rerun: bool = False) -> StepResult:
    """Moves the weights by one step on `batch`, or skips it if the loss or the gradient is not finite or leaps.

    `weight` is the step's whole loss weight, over all processes, which all move or all skip. The device decides by
    itself where its optimiser can; the host waits only for the loss and the norm, while the device moves the weights.
    With `rerun` a suspicious step is computed once more from the same weights and random numbers.
    """
    clock, layers = clock or Clock(runtime.device), layers or Layers(state.model, runtime.mesh)
    _set_rates(state)
    result = StepResult(state=state, step=state.step + 1, metrics={}, grad_norm=math.nan, weight=weight,
                        lr=state.optimizer.param_groups[0]["lr"], tokens=items(batch) * runtime.mesh.data_size,
                        batch=batch, skipped=NO_WEIGHT)
    before = Before.of(state.model, runtime.device)
    if weight:
        compute = partial(_compute, state, objective, batch.split(micro_rows or batch.rows), weight, runtime, gradients,
                          clock, layers)
        reading = compute()
        on_device = decides_on_device(state.optimizer, runtime.device)
        if on_device:
            with clock("optimizer"):
                _move_on_device(state, reading, clip_norm)
        with clock.at("read"):      # here the host waits for its device, and so for all other processes
            found = reading.read()
        suspicious = reason = why_not(found, state.spikes)
        if suspicious and rerun:
            with clock("rerun"):
                before.put_back()
                _after_step(state.model, runtime, applied=False)    # experts have counted the tokens
                state.optimizer.zero_grad(set_to_none=True)
                again = compute()
                with clock.at("read"):
                    first, found = found, again.read()
                reason = why_not(found, state.spikes)
                result.verdict, result.fault = compare(first, found, suspicious, reason)
        result.metrics, result.grad_norm, result.layers = found.metrics, found.norm, found.layers
        result.loss = sum(found.losses.values())
        result.skipped = reason
        if not reason and (suspicious or not on_device):
            with clock("optimizer"):
                _move(state, found.norms, clip_norm)
    if result.skipped:      # the weights do not move; neither may running statistics, which a NaN would poison for ever
        before.put_back(random_numbers=False)
    _after_step(state.model, runtime, applied=not result.skipped)
    state.optimizer.zero_grad(set_to_none=True)
    return result


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


def _after_step(model: nn.Module, runtime: Runtime, *, applied: bool) -> None:
    """Tells modules that move something themselves, as a router its balance: `after_step(processes that read other
    tokens, applied=)`."""
    for module in model.modules():
        if hasattr(type(module), "after_step"):
            cast(Any, module).after_step(runtime.mesh.group(*COPIES), applied=applied)


def _set_rates(state: TrainState) -> None:
    factor = state.schedule(state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def _compute(state: TrainState, objective: Objective, batches: list[Batch], weight: float, runtime: Runtime,
             gradients: GradientFunction, clock: Clock, layers: Layers) -> Reading:
    """The gradient into `.grad`, and what it and the loss amount to over all processes, not yet waited for."""
    with clock("backward"):
        sums = gradients(state.model, clock.timing(objective), batches, weight, runtime)
    with clock("norm"):
        return Reading(sums, state.model, weight, runtime.mesh, layers)


def decides_on_device(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether the device can leave a step out by itself. Not at an optimiser's first step: torch's fused SGD would take
    its momentum from memory that nobody wrote."""
    return (device.type == "cuda" and getattr(optimizer, "_step_supports_amp_scaling", False)
            and bool(optimizer.state))


def _move_on_device(state: TrainState, reading: Reading, clip_norm: float) -> None:
    """Clips and moves, unless a number lies above its limit or is not finite: known to the device alone."""
    for group, norm in reading.norms().items():
        if clip_norm:
            torch._foreach_mul_(own_gradients(state.model, group), (clip_norm / norm).clamp(max=1.0).float())
    optimizer: Any = state.optimizer
    optimizer.grad_scale, optimizer.found_inf = None, reading.above(state.spikes.limits()).float()
    optimizer.step()
    optimizer.found_inf = None


def _move(state: TrainState, norms: dict[str, float], clip_norm: float) -> None:
    """Clips and moves; the norms are known, so a smaller one costs nothing."""
    for group, norm in norms.items():
        if clip_norm and norm > clip_norm:
            torch._foreach_mul_(own_gradients(state.model, group), clip_norm / norm)
    state.optimizer.step()

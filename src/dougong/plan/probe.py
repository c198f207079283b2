"""A few real steps on random tokens: how fast this machine trains this model, without its data."""

import math
import statistics
import time
from dataclasses import replace

import torch

from dougong.adapt.lora import hold_frozen
from dougong.data.batch import Batch
from dougong.plan.machine import Machine
from dougong.plan.option import Option
from dougong.plan.work import Work
from dougong.runtime.device import Runtime

STEPS, WARM = 20, 3
BUDGET_S = 40.0


def measured(work: Work, option: Option, machine: Machine, *, steps: int = STEPS,
             budget_s: float = BUDGET_S) -> Machine | None:
    """The machine with the efficiency that `steps` real steps of the option reach, in one process; None where they
    would take longer than `budget_s` or do not fit. The median counts, after a few steps to warm up."""
    if not option.fits or option.step_seconds * WARM > budget_s:
        return None
    work = replace(work, checkpoint=option.checkpoint)
    seconds = step_times(work, option.micro_rows, steps=steps, budget_s=budget_s)
    if len(seconds) < WARM:
        return None
    typical = statistics.median(seconds)
    rest = sum(value for kind, value in option.seconds.items() if kind not in ("compute", "recompute"))
    busy = max(typical - rest, 0.05 * typical)
    before = option.seconds["compute"] + option.seconds["recompute"]
    efficiency = machine.efficiency * before / busy
    source = f"{len(seconds)} real steps on random tokens measured here: {typical * 1000:,.0f} ms each (median)"
    if efficiency > 1:      # the peak was measured on a busier machine, or on other shapes
        machine = replace(machine, peak_bf16_flops=machine.peak_bf16_flops * efficiency,
                          peak_fp32_flops=machine.peak_fp32_flops * efficiency)
        efficiency = 1.0
    return replace(machine, efficiency=efficiency, efficiency_source=source)


def step_times(work: Work, micro_rows: int, *, steps: int = STEPS, budget_s: float = math.inf) -> list[float]:
    """Seconds of each step after warming up: the recipe's own step with its optimiser."""
    from dougong.train.state import TrainState
    from dougong.train.step import take_step

    torch.manual_seed(0)
    device = torch.device(work.device)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[work.precision]
    with torch.device("meta"):
        model = work.model.build()
    model = model.to_empty(device=device).train()
    model.initialise(0)
    model.compute_dtype = dtype
    if work.adapt is not None:
        hold_frozen(work.adapt.apply(model, seed=0))
    if work.checkpoint != "none":
        model.stack.checkpoint_activations = work.checkpoint
    state = TrainState(model, work.optim.build(model), lambda step: 1.0, loader=None)   # type: ignore[arg-type]
    objective, runtime = work.objective.build(), Runtime(device=device, dtype=dtype)
    seconds: list[float] = []
    begin = time.perf_counter()
    for step in range(-WARM, steps):
        tokens = torch.randint(work.model.vocab_size, (work.rows, work.context + 1))
        batch = Batch(tokens=tokens[:, :-1].contiguous(), targets=tokens[:, 1:].contiguous(),
                      weight=torch.ones(work.rows, work.context))
        start = time.perf_counter()
        take_step(state, objective, batch, runtime, weight=float(work.rows * work.context), micro_rows=micro_rows,
                  clip_norm=1.0)
        if step >= 0:
            seconds.append(time.perf_counter() - start)
        if time.perf_counter() - begin > budget_s:
            break
    return seconds

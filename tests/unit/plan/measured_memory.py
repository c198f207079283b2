"""What real training steps hold, by torch's own profiler of its allocator: nothing of the plan is in here."""

import torch
from torch.profiler import ProfilerActivity, profile

from dougong.adapt.lora import hold_frozen
from dougong.data.batch import Batch
from dougong.runtime.device import Runtime
from dougong.train.state import TrainState
from dougong.train.step import take_step


def measured_peak(step) -> int:
    """Most bytes that the CPU allocator had given out during two real steps (the model's own making included)."""
    return most_given_out(lambda: _two_steps(step))


def most_given_out(work) -> int:
    """Most bytes that the CPU allocator had given out while `work()` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def _two_steps(step) -> None:
    rows, context = step.shape()
    rows *= step.micro_batches
    model = step.model.build().train()
    model.initialise(0)
    model.compute_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[step.precision]
    if step.adapt is not None:
        hold_frozen(step.adapt.apply(model, seed=0))
    if step.checkpoint != "none":
        model.stack.checkpoint_activations = step.checkpoint
    state = TrainState(model, step.optim.build(model), lambda at: 1.0, loader=None)
    tokens = torch.randint(step.model.vocab_size, (rows, context + 1), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens=tokens[:, :-1].contiguous(), targets=tokens[:, 1:].contiguous(),
                  weight=torch.ones(rows, context))
    for _ in range(2):
        take_step(state, step.objective.build(), batch, Runtime(dtype=model.compute_dtype), micro_rows=step.micro_rows,
                  weight=float(rows * context), clip_norm=1.0)

"""The training loop."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from dougong.core.errors import DougongError
from dougong.objectives.objective import Objective
from dougong.runtime.collectives import all_sum
from dougong.runtime.device import Runtime
from dougong.runtime.layout import AXES
from dougong.runtime.mesh import Mesh
from dougong.runtime.processes import launched, process_rank
from dougong.train.config import TrainConfig
from dougong.train.garbage import Garbage
from dougong.train.layers import Layers
from dougong.train.phases import Clock
from dougong.train.safetensors_file import write_tensors
from dougong.train.state import TrainState
from dougong.train.step import NO_WEIGHT, GradientFunction, StepResult, check_additive, plain_gradients, take_step
from dougong.train.suspects import name_suspects


def fit(state: TrainState, objective: Objective, runtime: Runtime, config: TrainConfig, *,
        gradients: GradientFunction = plain_gradients, directory: Path | None = None,
        clock: Clock | None = None) -> Iterator[StepResult]:
    """Trains from `state.step` to `config.steps`, yielding after every step; the reader's loop watches and
    saves.

    Stops early when a reader sets `state.stop`, and when leaps persist, with what is to be done in `state.rewind`
    (train/rewind.py). After more than `config.max_skips` skipped steps in a row the offending batch is written to
    `directory`, by each process the rows it read, and DougongError is raised. The time readers take is not counted as
    training. `clock` is for those who watch from outside.
    """
    assert config.steps is not None, "the recipe derives the number of steps before training"
    clock, layers = clock or Clock(runtime.device), Layers(state.model, runtime.mesh)
    state.spikes.config = config.spikes
    batches = iter(state.loader)
    with Garbage(config.gc_every) as garbage:
        while state.step < config.steps and not state.stop and not state.rewind:
            begin = time.perf_counter()
            clock.begin_step(state.step)
            state.model.train()
            with clock("data"):
                number = state.spikes.next_allowed(state.loader)
                batch = next(batches)
                own = objective.weight(batch)
            check_additive(state.model, objective, batch.rows, config.micro_rows)
            with clock("wait"):
                weight, asked = _together(own, state.asked_to_stop, runtime.mesh)

            result = take_step(state, objective, batch, runtime, micro_rows=config.micro_rows,
                               clip_norm=config.clip_norm, weight=weight, gradients=gradients, clock=clock,
                               layers=layers, rerun=config.rerun)

            _count(state, result, number)
            state.stop = state.stop or ("interrupted" if asked else None)
            if state.shadow and not result.skipped:
                with clock("optimizer"):
                    state.shadow.update(state.model, state.step)
            if result.verdict == "persistent":
                with clock("rerun"):
                    result.suspects = name_suspects(result, objective, runtime)
            with clock("gc"):
                garbage.collect(state.step)
            result.seconds = time.perf_counter() - begin
            state.elapsed_s += result.seconds
            result.phases = clock.end_step(result.seconds)
            yield result
            if state.skips > config.max_skips:
                raise _diverged(result, directory)
    clock.step_seconds.clear()      # no measure of what comes now: a way back, or the last save


def _together(weight: float, asked_to_stop: bool, mesh: Mesh) -> tuple[float, bool]:
    """The weight of the whole step, and whether any process is asked to stop, in one message."""
    counts = mesh.rank("pipeline", "context", "tensor") == 0     # those beside it read the same rows
    sums = torch.tensor([weight if counts else 0.0, float(asked_to_stop)], dtype=torch.float64)
    total, asked = all_sum(sums, mesh.group(*AXES)).tolist()
    return total, asked > 0


def _count(state: TrainState, result: StepResult, number: int | None) -> None:
    state.step += 1
    state.tokens += result.tokens
    state.skips = state.skips + 1 if result.skipped else 0
    result.number = number
    leapt = result.skipped not in (None, NO_WEIGHT)
    state.spikes.add(result.loss, result.grad_norm, step=state.step, batch=number, skipped=leapt)
    state.rewind = state.spikes.persistent() if leapt else None


def _diverged(result: StepResult, directory: Path | None) -> DougongError:
    saved = ""
    if directory is not None:
        rank, what = process_rank(), "The batch of this step is"
        if launched() > 1:
            what = f"The rows of this step's batch that process {rank} of {launched()} read are"
        path = directory / f"offending-batch-{result.step:06d}{f'-rank-{rank:05d}' if rank else ''}.safetensors"
        write_tensors(path, {name: tensor.cpu() for name, tensor in result.batch.items()})
        saved = f"\n{what} in {path}."
    advice = ("Nothing in these rows is learned. Look at what the loss counts with `dougong data inspect`, and at the "
              "objective's own reasons for leaving rows out.") if result.skipped == NO_WEIGHT else (
        "Try a lower learning rate (optim.lr), a longer warm-up (schedule.warmup), a smaller train.clip_norm or "
        "runtime.precision=fp32, and look at the data.")
    return DougongError(
        f"training stopped at step {result.step}: {result.state.skips} steps in a row were skipped, at last "
        f"because {result.skipped}.{saved}\n{advice}")

"""What happens between steps: evaluation, samples, checkpoints, early stopping, signals.

    with stop_on_signals(state):
        for result in fit(state, objective, runtime, config):
            hooks.run(result)
    hooks.finish(state)
"""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from dougong.runtime import seeds
from dougong.runtime.collectives import agree
from dougong.runtime.layout import AXES
from dougong.runtime.mesh import Mesh
from dougong.runtime.processes import process_rank
from dougong.train.checkpoint import Checkpointer, Saved
from dougong.train.metrics import Reporter
from dougong.train.phases import Clock
from dougong.train.state import TrainState
from dougong.train.step import StepResult

Evaluator = Callable[[TrainState], dict[str, Any]]
"""Returns at least `loss` (nats), and whatever else an `evaluation` event should say."""
Sampler = Callable[[TrainState], Sequence[tuple[str, str]]]
"""Returns (prompt, text) pairs."""


class Hook(Protocol):
    """Called after every step. `start` and `finish` are called if there are such methods; `phase` is what its time
    counts as."""

    def __call__(self, result: StepResult) -> None: ...


class Hooks:
    """Runs hooks in order: those that measure first, the one that saves last, so that a checkpoint holds it
    all."""

    def __init__(self, state: TrainState, hooks: Sequence[Hook], clock: Clock | None = None) -> None:
        self.hooks, self.clock = list(hooks), clock or Clock()
        self._each("start", state)

    def run(self, result: StepResult) -> None:
        for hook in self.hooks:
            with self.clock(getattr(hook, "phase", "other")):
                hook(result)

    def finish(self, state: TrainState) -> None:
        """To be called when the loop has ended, for whatever reason."""
        self._each("finish", state)

    def _each(self, method: str, state: TrainState) -> None:
        for hook in self.hooks:
            with self.clock(getattr(hook, "phase", "other")):
                getattr(hook, method, lambda _: None)(state)


class Evaluate:
    """Evaluates every `every` steps and at the end, with the averaged weights where there are any.

    Keeps `state.best`; with `patience`, sets `state.stop` after that many evaluations without a better loss.
    Random numbers and the model's mode are put back, so training goes on as if it had not been interrupted. An
    evaluation that is stopped halfway (the evaluator raises Interrupted) is made up for when the run is resumed.
    """

    phase = "evaluation"

    def __init__(self, reporter: Reporter, evaluator: Evaluator, *, every: int, total_steps: int,
                 patience: int | None = None, split: str = "validation") -> None:
        self.reporter, self.evaluator = reporter, evaluator
        self.every, self.total_steps, self.patience, self.split = every, total_steps, patience, split

    def start(self, state: TrainState) -> None:
        if state.step and state.evaluated < state.step and _due(state.step, self.every, self.total_steps):
            self._evaluate(state)
        self._stop_if_patience_is_over(state)

    def __call__(self, result: StepResult) -> None:
        if _due(result.step, self.every, self.total_steps):
            self._evaluate(result.state)

    def _evaluate(self, state: TrainState) -> None:
        begin = time.perf_counter()
        try:
            with aside(state):
                found = self.evaluator(state)
        except Interrupted:
            state.stop = "interrupted"
            return
        state.evaluated = state.step
        best = math.isfinite(found["loss"]) and (state.best is None or found["loss"] < state.best["loss"])
        if best:
            state.best = {"loss": float(found["loss"]), "step": state.step, "waited": 0}
        elif state.best is not None:
            state.best = {**state.best, "waited": state.best["waited"] + 1}
        self.reporter.write("evaluation", **{
            "step": state.step, "split": self.split, "bits_per_byte": None, **found,
            "seconds": time.perf_counter() - begin, "elapsed_s": state.elapsed_s, "best": best,
            "weights": "ema" if state.shadow else "raw"})
        self._stop_if_patience_is_over(state)

    def _stop_if_patience_is_over(self, state: TrainState) -> None:
        if self.patience and state.best and state.best["waited"] >= self.patience:
            state.stop = state.stop or "early stop"


class Sample:
    """Lets the model write every `every` steps and at the end."""

    phase = "sample"

    def __init__(self, reporter: Reporter, sampler: Sampler, *, every: int, total_steps: int) -> None:
        self.reporter, self.sampler, self.every, self.total_steps = reporter, sampler, every, total_steps

    def __call__(self, result: StepResult) -> None:
        if not _due(result.step, self.every, self.total_steps):
            return
        with aside(result.state):
            samples = list(self.sampler(result.state))
        for prompt, text in samples:
            self.reporter.write("sample", step=result.step, prompt=prompt, text=text,
                                elapsed_s=result.state.elapsed_s)


class SaveCheckpoints:
    """Saves every `every` steps, at every new best evaluation, and at the end or when training is stopped."""

    phase = "checkpoint"

    def __init__(self, reporter: Reporter, checkpointer: Checkpointer, *, every: int,
                 total_steps: int) -> None:
        self.reporter, self.checkpointer = reporter, checkpointer
        self.every, self.total_steps = every, total_steps

    def start(self, state: TrainState) -> None:
        """An evaluation that was made up for may have found the best: it was saved before anyone knew."""
        if self._is_best(state) and not self.checkpointer.has_loss(state.step):
            self._tell(self.checkpointer.save(state, "best"))

    def __call__(self, result: StepResult) -> None:
        state = result.state
        self._tell(self.checkpointer.poll())
        best = self._is_best(state)
        if best or result.step % self.every == 0 or self.checkpointer.keeps(result.step):
            self._tell(self.checkpointer.save(state, "best" if best else "interval"))

    def finish(self, state: TrainState) -> None:
        self._tell(self.checkpointer.wait())
        if state.step and self.checkpointer.last_step != state.step:
            self._tell(self.checkpointer.save(state, "interrupt" if state.stop == "interrupted" else "last"))
            self._tell(self.checkpointer.wait())

    def _is_best(self, state: TrainState) -> bool:
        return self.checkpointer.keep_best and state.best is not None and state.best["step"] == state.step

    def _tell(self, saved: Sequence[Saved]) -> None:
        for one in saved:
            path = one.path.relative_to(self.checkpointer.run.path)
            self.reporter.write("checkpoint", step=one.step, path=str(path), bytes=one.bytes,
                                seconds=one.seconds,
                                reason=one.reason)


@contextlib.contextmanager
def aside(state: TrainState) -> Iterator[None]:
    """Evaluation mode and averaged weights inside the block; mode, weights and random numbers as before after
    it."""
    rng, training = seeds.rng_state(), state.model.training
    weights = state.shadow.swapped(state.model) if state.shadow else contextlib.nullcontext()
    state.model.eval()
    try:
        with weights:
            yield
    finally:
        state.model.train(training)
        seeds.set_rng_state(rng)


class Interrupted(Exception):
    """Someone asked for the run to stop while it was busy between two steps."""


def refuse_to_linger(state: TrainState, mesh: Mesh | None = None) -> None:
    """Raises Interrupted if any process was asked to stop; for long work between steps, called equally often by all."""
    if agree(int(state.asked_to_stop), mesh.group(*AXES) if mesh else None):
        raise Interrupted


@contextlib.contextmanager
def stop_on_signals(state: TrainState, mesh: Mesh | None = None) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM lets the step finish and sets `state.stop`; a second Ctrl-C leaves at
    once. Of several processes each only notes that it was asked: the loop agrees on the step after which all stop."""
    alone = mesh is None or mesh.devices is None

    def ask_to_stop(number: int, _frame: Any) -> None:
        if state.asked_to_stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        state.asked_to_stop = True
        state.stop = "interrupted" if alone else state.stop
        if process_rank() == 0:
            print("\nFinishing this step and saving; press Ctrl-C again to leave without saving.", file=sys.stderr)

    before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _due(step: int, every: int, total_steps: int) -> bool:
    return step % every == 0 or step == total_steps

"""From steps to events, and from events to everyone who watches."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dougong.core.events import EventLog
from dougong.runtime.device import peak_memory_bytes
from dougong.train.step import StepResult

Listener = Callable[[dict[str, Any]], None]
"""Receives every event as it was written; so views and trackers show what the file says and nothing else."""


class Reporter:
    """Writes events to the run's log and passes each on to the listeners."""

    def __init__(self, log: EventLog, listeners: Sequence[Listener] = ()) -> None:
        self.log, self.listeners = log, list(listeners)

    def write(self, event: str, **fields: Any) -> dict[str, Any]:
        record = self.log.write(event, **fields)
        for listener in self.listeners:
            listener(record)
        return record

    def close(self) -> None:
        """Closes the listeners that can be closed, then the log."""
        for listener in self.listeners:
            getattr(listener, "close", lambda: None)()
        self.log.close()


class StepMeter:
    """Turns steps into `step` and `skip` events; one `step` event sums up `every` steps.

    Loss and metrics are means over the weight of the steps summed up (skipped ones excluded), `grad_norm` is
    the mean of theirs. MFU = flops_per_token × tokens/s ÷ the measured peak; null where either is unknown.
    """

    def __init__(self, reporter: Reporter, *, every: int = 1, total_steps: int, device: torch.device,
                 flops_per_token: float | None = None, peak_flops_per_s: float | None = None) -> None:
        self.reporter, self.every, self.total_steps, self.device = reporter, every, total_steps, device
        self.flops_per_token, self.peak = flops_per_token, peak_flops_per_s

    def __call__(self, result: StepResult) -> None:
        if result.skipped:
            self.reporter.write("skip", step=result.step, reason=result.skipped, count=result.state.skips)
        self._add(result)
        if result.step % self.every == 0 or result.step == self.total_steps:
            self._write(result)

    def _add(self, result: StepResult) -> None:
        window = result.state.window
        sums = {"tokens": result.tokens, "seconds": result.seconds}
        if not result.skipped:
            sums |= {"steps": 1, "weight": result.weight, "grad_norm": result.grad_norm}
            sums |= {f"metric.{name}": value * result.weight for name, value in result.metrics.items()}
        for name, value in sums.items():
            window[name] = window.get(name, 0) + value

    def _write(self, result: StepResult) -> None:
        state, window = result.state, result.state.window
        state.window = {}
        if not window.get("steps"):
            return
        speed = window["tokens"] / window["seconds"]
        mfu = speed * self.flops_per_token / self.peak if self.flops_per_token and self.peak else None
        metrics = {name.removeprefix("metric."): value / window["weight"]
                   for name, value in window.items() if name.startswith("metric.")}
        epoch = getattr(state.loader, "epoch", None)
        self.reporter.write("step", step=result.step, **metrics, lr=result.lr,
                            grad_norm=window["grad_norm"] / window["steps"],
                            weight=window["weight"] / window["steps"],
                            tokens=state.tokens, tokens_per_s=speed, mfu=mfu, elapsed_s=state.elapsed_s,
                            memory_bytes=peak_memory_bytes(self.device), epoch=epoch)

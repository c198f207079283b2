"""From steps to events, and from events to everyone who watches."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from dougong.core.events import EventLog
from dougong.runtime.device import peak_memory_bytes
from dougong.train.step import StepResult

Listener = Callable[[dict[str, Any]], None]
"""Receives every event as it was written; so views and trackers show what the file says and nothing else."""

_HISTORY = 16
"""steps whose gradient norms by layer are kept for the case of a leap"""


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
    """Turns steps into `step`, `skip`, `fault` and `spike` events; one `step` event sums up `every` steps.

    Loss and metrics are means over the weight of the steps summed up (skipped ones excluded), `grad_norm` is
    the mean of theirs, `phases` the seconds of all. Where all were skipped no event is written, and their time comes
    with the next. MFU = flops_per_token × tokens/s ÷ the measured peak; null where either is unknown. `layers` come
    every `layers_every` steps, and with a leap those of the steps before.
    """

    def __init__(self, reporter: Reporter, *, every: int = 1, total_steps: int, device: torch.device,
                 flops_per_token: float | None = None, peak_flops_per_s: float | None = None,
                 layers_every: int = 50) -> None:
        self.reporter, self.every, self.total_steps, self.device = reporter, every, total_steps, device
        self.flops_per_token, self.peak, self.layers_every = flops_per_token, peak_flops_per_s, layers_every
        self._history: deque[tuple[int, dict[str, float]]] = deque(maxlen=_HISTORY)
        self._phases: Counter[str] = Counter()

    def __call__(self, result: StepResult) -> None:
        self._history.append((result.step, result.layers))
        self._phases.update(result.phases)
        if result.skipped:
            self.reporter.write("skip", step=result.step, reason=result.skipped, count=result.state.skips,
                                **suspicion(result))
            self.reporter.write("spike", step=result.step, **history(self._history))
        elif result.fault:
            self.reporter.write("fault", step=result.step, **suspicion(result))
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
        phases = _seconds(self._phases)
        self._phases.clear()
        speed = window["tokens"] / window["seconds"]
        mfu = speed * self.flops_per_token / self.peak if self.flops_per_token and self.peak else None
        metrics = {name.removeprefix("metric."): value / window["weight"]
                   for name, value in window.items() if name.startswith("metric.")}
        layers = {"layers": _rounded(result.layers)} if result.step % self.layers_every == 0 and result.layers else {}
        epoch = getattr(state.loader, "epoch", None)
        self.reporter.write("step", step=result.step, **metrics, lr=result.lr,
                            grad_norm=window["grad_norm"] / window["steps"],
                            weight=window["weight"] / window["steps"],
                            tokens=state.tokens, tokens_per_s=speed, mfu=mfu, elapsed_s=state.elapsed_s,
                            memory_bytes=peak_memory_bytes(self.device), epoch=epoch, phases=phases, **layers)


class RankMeter:
    """What every process but the first writes of its steps, into its own log: where its time goes, and what went wrong
    on it alone. `state.window` is left alone: it belongs to what all share."""

    def __init__(self, reporter: Reporter, *, every: int = 1, total_steps: int) -> None:
        self.reporter, self.every, self.total_steps = reporter, every, total_steps
        self._phases: Counter[str] = Counter()

    def __call__(self, result: StepResult) -> None:
        if result.skipped or result.fault:
            self.reporter.write("skip" if result.skipped else "fault", step=result.step, **suspicion(result))
        self._phases.update(result.phases)
        if result.step % self.every == 0 or result.step == self.total_steps:
            self.reporter.write("step", step=result.step, phases=_seconds(self._phases))
            self._phases.clear()


def suspicion(result: StepResult) -> dict[str, Any]:
    """Which batch it was, what computing it again showed, and whose rows stand out. Absent fields are left out."""
    fields = {"batch": result.number, "verdict": result.verdict, "fault": result.fault, "rows": result.suspects}
    return {name: value for name, value in fields.items() if value not in (None, [])}


def history(steps: Iterable[tuple[int, dict[str, float]]]) -> dict[str, Any]:
    """`steps`, and for each layer its gradient norms at those steps, the last being the one that leapt."""
    known = [(step, layers) for step, layers in steps if layers]
    names = known[-1][1] if known else {}
    return {"steps": [step for step, _ in known],
            "layers": {name: [_rounded(layers).get(name) for _, layers in known] for name in names}}


def _seconds(phases: Mapping[str, float]) -> dict[str, float]:
    return {name: round(seconds, 6) for name, seconds in phases.items()}


def _rounded(layers: dict[str, float]) -> dict[str, float]:
    """Four digits are enough to compare layers by."""
    return {name: float(f"{value:.4g}") for name, value in layers.items()}

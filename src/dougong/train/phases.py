"""Where a process's time goes: what it is doing now, and the seconds of each phase of a step.

On a CPU the clock is read when a phase ends. On a GPU the phases of a step are marked on the device by events, which
are read one step later, so that measuring never waits for it: a `step` event then shows the device's phases of the step
before. What lies between two steps is the host's time on either.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from dougong.core.events import BETWEEN_STEPS
from dougong.data.batch import Batch
from dougong.objectives.losses import Losses
from dougong.objectives.objective import Objective

_ON_DEVICE = ("forward", "backward", "norm", "optimizer", "rerun")
_REMEMBERED = 64


class Clock:
    """Measures phases, and lets another thread see where the process stands (`step`, `phase`, `moves`, `since`).

    `moves` counts the phases of this step that were begun or ended, the forwards of a gradient aside: all processes do
    them in one order, so of two in one step the one with fewer is behind. What lies between steps is not counted: there
    each does what is its own.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device_time = device is not None and device.type == "cuda"
        self.step, self.phase, self.moves, self.since = 0, "other", 0, time.monotonic()
        self.step_seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self.longest: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._marks: list[tuple[str, str, Any, Any]] = []
        self._earlier: list[tuple[str, str, Any, Any]] = []
        self._between: float | None = None

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """The time of the block counts as `phase`; of nested phases each counts its own time."""
        outer, inside_before = self.phase, sum(self._seconds.values())
        with self.at(phase):
            mark, begin = self._event(phase), time.perf_counter()
            try:
                yield
            finally:
                seconds = time.perf_counter() - begin
                self.longest[phase] = max(seconds, self.longest.get(phase, 0.0))
                if mark is not None:
                    self._marks.append((phase, outer, mark, self._event(phase)))
                else:
                    self._add(phase, seconds - (sum(self._seconds.values()) - inside_before))

    @contextlib.contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Shows that the process is at `place`; the time counts as what is around it. For waiting for the device, whose
        own time is counted already."""
        outer = self.phase
        counted = place not in BETWEEN_STEPS and outer != "backward"
        self.moves += counted
        self._enter(place)
        try:
            yield
        finally:
            self.moves += counted
            self._enter(outer)

    def begin_step(self, step: int) -> None:
        """What came before was between the steps; its rest is the time that no phase has claimed."""
        if self._between is not None:
            claimed = sum(self._seconds.get(phase, 0.0) for phase in BETWEEN_STEPS)
            self._add("other", max(0.0, time.perf_counter() - self._between - claimed))
        self.step = step
        self._enter("other")

    def end_step(self, seconds: float) -> dict[str, float]:
        """Seconds by phase since the last call. The device's are those of the step before."""
        for phase, outer, begin, end in self._earlier:
            end.synchronize()       # long past, unless the step before read nothing from the device
            seconds_on_device = begin.elapsed_time(end) / 1000
            self._add(phase, seconds_on_device)
            if outer in _ON_DEVICE:
                self._add(outer, -seconds_on_device)
        self._earlier, self._marks = self._marks, []
        found, self._seconds = {name: value for name, value in self._seconds.items() if value > 0}, {}
        self.step_seconds.append(seconds)
        self.step, self.moves = self.step + 1, 0
        self._enter("other")
        self._between = time.perf_counter()
        return found

    def timing(self, objective: Objective) -> Objective:
        """The objective with its forward told apart from the rest of the gradient."""
        return _Timed(objective, self)  # type: ignore[return-value]

    def _enter(self, phase: str) -> None:
        self.phase, self.since = phase, time.monotonic()

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def _event(self, phase: str) -> Any:
        """A mark on the device's own time line; None where the host's clock says it as well."""
        if not self.device_time or phase not in _ON_DEVICE:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Timed:
    def __init__(self, objective: Objective, clock: Clock) -> None:
        self._objective, self._clock = objective, clock

    def losses(self, model: Any, batch: Batch) -> Losses:
        with self._clock("forward"):
            return self._objective.losses(model, batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

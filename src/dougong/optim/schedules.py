"""Learning-rate schedules: a factor for each step, the same for every parameter group.

`config.build(total_steps)` returns a pure function of the step (0 is the first), so a resumed run needs no
state. All of them rise linearly over the warm-up, `(step + 1) / warmup`, so the first step already moves.
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from dougong.core.config import config
from dougong.core.errors import ConfigError

Schedule = Callable[[int], float]
Span = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)]
"""A number of steps (an integer), or a fraction of the whole run (a float)."""
Factor = Annotated[float, Field(ge=0, le=1)]


@config
class LinearConfig:
    """Warm-up, then a straight line to the floor; to zero it beats cosine (Bergsma et al. 2025,
    arXiv:2502.15938)."""

    kind: Literal["linear"] = "linear"
    warmup: Span = 0.02
    """steps (integer) or fraction of the run (float)"""
    floor: Factor = 0.0
    """factor reached at the end"""

    def build(self, total_steps: int) -> Schedule:
        warmup = _steps(self.warmup, total_steps, "warmup")
        return lambda step: _warm(step, warmup) or _blend(self.floor,
                                                          1 - _progress(step, warmup, total_steps))


@config
class CosineConfig:
    """Warm-up, then half a cosine to the floor (Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5)."""

    kind: Literal["cosine"] = "cosine"
    warmup: Span = 0.02
    """steps (integer) or fraction of the run (float)"""
    floor: Factor = 0.1
    """factor reached at the end"""

    def build(self, total_steps: int) -> Schedule:
        warmup = _steps(self.warmup, total_steps, "warmup")
        return lambda step: _warm(step, warmup) or _blend(
            self.floor, (1 + math.cos(math.pi * _progress(step, warmup, total_steps))) / 2)


@config
class WSDConfig:
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395): the long middle can be continued or
    branched."""

    kind: Literal["wsd"] = "wsd"
    warmup: Span = 0.02
    """steps (integer) or fraction of the run (float)"""
    decay: Span = 0.3
    """length of the last part: steps (integer) or fraction of the run (float)"""
    floor: Factor = 0.0
    """factor reached at the end"""
    shape: Literal["linear", "sqrt"] = "linear"
    """of the decay; sqrt is 1 - √progress (Hägele et al. 2024, arXiv:2405.18392)"""

    def build(self, total_steps: int) -> Schedule:
        warmup, decay = _steps(self.warmup, total_steps, "warmup"), _steps(self.decay, total_steps, "decay")
        if self.warmup + self.decay <= 1:       # fractions that fit; both may have been rounded up
            decay = min(decay, total_steps - warmup)
        if warmup + decay > total_steps:
            raise ConfigError(f"warmup={warmup} and decay={decay} steps do not fit into {total_steps} "
                              f"steps.\n"
                              "Shorten one of them; a fraction (decay=0.3) fits any run.")
        power = {"linear": 1.0, "sqrt": 0.5}[self.shape]
        return lambda step: _warm(step, warmup) or _blend(
            self.floor, 1 - _progress(step, total_steps - decay, total_steps) ** power)


@config
class ConstantConfig:
    """Warm-up, then the full rate to the end."""

    kind: Literal["constant"] = "constant"
    warmup: Span = 0
    """steps (integer) or fraction of the run (float)"""

    def build(self, total_steps: int) -> Schedule:
        warmup = _steps(self.warmup, total_steps, "warmup")
        return lambda step: _warm(step, warmup) or 1.0


def _steps(span: int | float, total_steps: int, name: str) -> int:
    steps = span if isinstance(span, int) else round(span * total_steps)
    if steps > total_steps:
        raise ConfigError(f"{name}={span} is longer than the run of {total_steps} steps.\n"
                          f"Give at most {total_steps}, or a fraction such as {name}=0.1.")
    return steps


def _warm(step: int, warmup: int) -> float:
    """The factor inside the warm-up, 0 after it."""
    return (step + 1) / warmup if step < warmup else 0.0


def _progress(step: int, start: int, end: int) -> float:
    """0 up to `start`, rising to 1 at `end`."""
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))


def _blend(floor: float, height: float) -> float:
    return floor + (1 - floor) * height

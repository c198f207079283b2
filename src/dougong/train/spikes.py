"""Loss spikes: from where on a loss or gradient norm leaps, by running statistics.

The limits of a step come from the steps before, so the device only has to compare two numbers with two others: a leap
is skipped there, without waiting for the host. A value above its limit enters the statistics as the limit itself: one
leap hardly widens them, while a lasting change of level is accepted after some steps.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dougong.train.config import SpikeConfig

NO_LIMIT = sys.float_info.max
"""finite, so that an infinite value lies above it"""


class Spikes:
    """Remembers losses and gradient norms of the last steps. Plain numbers; no device; saved with the state.

    `config` (set by the loop) None: only what is not finite is above a limit. `banned` are the ranges [first, last) of
    batches that are passed over since training went back, `rewinds` how often it did.
    """

    def __init__(self, config: SpikeConfig | None = None) -> None:
        self.config = config
        self.rewinds = 0
        self.banned: list[list[int]] = []
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._leaps: list[list[int]] = []

    def limits(self) -> tuple[float, float]:
        """The largest loss and the largest gradient norm of a step that is taken."""
        if self.config is None or len(self._losses) < self.config.window // 2:
            return NO_LIMIT, NO_LIMIT
        mean, deviation = _statistics(self._norms)
        norm = max(mean + self.config.sigmas * deviation, self.config.times * mean)
        mean, deviation = _statistics(self._losses)
        return mean + self.config.sigmas * deviation, norm

    def why(self, loss: float, norm: float) -> str | None:
        """The reason to skip a step with these finite values, or None."""
        for what, value, limit, known in zip(("loss", "gradient norm"), (loss, norm), self.limits(),
                                             (self._losses, self._norms)):
            if value > limit:
                return (f"the {what} leapt to {value:.4g} (mean of the last {len(known)} steps "
                        f"{_statistics(known)[0]:.4g}, limit {limit:.4g})")
        return None

    def add(self, loss: float, norm: float, *, step: int, batch: int | None, skipped: bool) -> None:
        """Takes in a step that has been judged, and `skipped` for its loss or gradient or not; `batch` is its number in
        the loader's order."""
        if self.config is None:
            return
        self._leaps = [leap for leap in self._leaps if leap[0] > step - self.config.rewind_within]
        if skipped and batch is not None and self.config.rewind_after is not None:
            self._leaps.append([step, batch])
        if math.isfinite(loss) and math.isfinite(norm):
            values = [min(value, limit) for value, limit in zip((loss, norm), self.limits())]
            self._losses = [*self._losses, values[0]][-self.config.window:]
            self._norms = [*self._norms, values[1]][-self.config.window:]

    @property
    def leaps(self) -> list[int]:
        """The steps (counted from 1) before any of which training may have to go back."""
        return [step for step, _ in self._leaps]

    def persistent(self) -> "Rewind | None":
        """The way back, if there are too many leaps of late."""
        if self.config is None or self.config.rewind_after is None or len(self._leaps) < self.config.rewind_after:
            return None
        batches = [batch for _, batch in self._leaps]
        return Rewind(step=self.leaps[0], first=min(batches), last=max(batches) + 1, leaps=len(batches))

    def next_allowed(self, loader: Any) -> int | None:
        """Moves a loader behind banned batches; the number of the batch that comes next, where its batches have one."""
        number = getattr(loader, "number", None)
        for first, last in sorted(self.banned):
            if number is not None and first <= number < last:
                number = last
                loader.seek(number)
        return number

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self._losses, "norms": self._norms, "leaps": self._leaps, "rewinds": self.rewinds,
                "banned": self.banned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses, self._norms = list(state["losses"]), list(state["norms"])
        self._leaps, self.banned = [list(leap) for leap in state["leaps"]], [list(one) for one in state["banned"]]
        self.rewinds = int(state["rewinds"])


@dataclass(frozen=True)
class Rewind:
    """What the loop leaves in `state.rewind` when leaps persist: the step of the first of them (counted from 1), how
    many there were, and the batches first … last-1 that are to be passed over from now on."""

    step: int
    first: int
    last: int
    leaps: int


def _statistics(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1)."""
    count = len(values)
    mean = math.fsum(values) / count
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, count - 1))

"""How long a step takes here: a few real steps on the real data, thrown away."""

import statistics
from typing import Any

from dougong.train import fit

_WARM_STEPS = 3
_TIMED_STEPS = 8


def measure_step(built: Any, *, steps: int = _TIMED_STEPS) -> float:
    """Seconds of one training step: the median of a few after warming up.

    Uses up the given assembly: training assembles afresh, so a run that was measured equals one that was not.
    """
    from dougong.recipes.train import with_steps

    config = with_steps(built.recipe, _WARM_STEPS + steps).train
    seconds = [result.seconds for result
               in fit(built.state, built.objective, built.runtime, config, gradients=built.gradients)]
    return statistics.median(seconds[_WARM_STEPS:])

"""Before the first step: memory, time, traffic and layout of a run, from counts alone."""

from dougong.plan.choose import choose_layout
from dougong.plan.estimate import Estimate, estimate

__all__ = ["Estimate", "choose_layout", "estimate"]

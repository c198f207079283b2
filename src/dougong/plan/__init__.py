"""Before the first step: memory, disk and compute from counts alone."""

from dougong.plan.estimate import Estimate, estimate

__all__ = ["Estimate", "estimate"]

"""What a model is trained for: each objective turns a model and a batch into summed losses."""

from dougong.core.table import Table
from dougong.objectives.losses import Losses
from dougong.objectives.objective import Objective

OBJECTIVES = Table("objective", {
    "causal_lm": "dougong.objectives.causal_lm:CausalLMConfig",
    "distil": "dougong.objectives.distil:DistilConfig",
    "classify": "dougong.objectives.classify:ClassifyConfig",
    "regression": "dougong.objectives.regression:RegressionConfig",
    "gan": "dougong.objectives.gan:GANObjectiveConfig",
})

__all__ = ["OBJECTIVES", "Losses", "Objective"]

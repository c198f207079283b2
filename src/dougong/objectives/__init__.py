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
    "dpo": "dougong.objectives.preference:DPOConfig",
    "ipo": "dougong.objectives.preference:IPOConfig",
    "orpo": "dougong.objectives.preference:ORPOConfig",
    "kto": "dougong.objectives.kto:KTOConfig",
    "reward": "dougong.objectives.reward:RewardConfig",
    "classify_text": "dougong.objectives.classify_text:ClassifyTextConfig",
    "grpo": "dougong.objectives.policy:GRPOConfig",
    "rejection": "dougong.objectives.policy:RejectionConfig",
})

__all__ = ["OBJECTIVES", "Losses", "Objective"]

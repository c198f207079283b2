"""Learning from judgements: `dpo` from pairs of replies, `grpo` from rewards of what the model writes itself.

Both begin from a model that exists: `dougong train dpo --model RUN data.path=pairs.jsonl`.
"""

from dougong.data.chats import ChatData
from dougong.data.preferences import PreferenceData
from dougong.objectives.policy import GRPOConfig
from dougong.objectives.preference import DPOConfig
from dougong.optim.build import AdamWConfig
from dougong.optim.schedules import ConstantConfig, CosineConfig
from dougong.recipes.recipe import Recipe
from dougong.train import TrainConfig


def dpo() -> Recipe:
    """One pass over the pairs at a hundredth of the usual rate: a preference is learned long before a text is."""
    return Recipe(
        name="dpo",
        about="a model that exists learns from pairs of a preferred and a rejected reply (--model RUN data.path=FILE)",
        data=PreferenceData(),
        objective=DPOConfig(),
        optim=AdamWConfig(lr=2e-5, betas=(0.9, 0.99), weight_decay=0.0),
        schedule=CosineConfig(warmup=0.1, floor=0.1),
        train=TrainConfig(epochs=1, rows=32),
    )


def grpo() -> Recipe:
    """Samples of the current model, rewarded by a function that can be checked; one step for each rollout."""
    return Recipe(
        name="grpo",
        about="a model that exists learns from rewards of its own samples (--model RUN; tasks with answers)",
        data=ChatData(),
        objective=GRPOConfig(),
        optim=AdamWConfig(lr=2e-5, betas=(0.9, 0.99), weight_decay=0.0),
        schedule=ConstantConfig(warmup=0.02),
        train=TrainConfig(steps=200, rows=128),
    )

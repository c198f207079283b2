"""Optimisers, the parameter groups they act on, and learning-rate schedules."""

from dougong.core.table import Table

OPTIMIZERS = Table("optimizer", {
    "adamw": "dougong.optim.build:AdamWConfig",
    "adam": "dougong.optim.build:AdamConfig",
    "sgd": "dougong.optim.build:SGDConfig",
    "rmsprop": "dougong.optim.build:RMSpropConfig",
    "muon": "dougong.optim.build:MuonConfig",
})
SCHEDULES = Table("schedule", {
    "linear": "dougong.optim.schedules:LinearConfig",
    "cosine": "dougong.optim.schedules:CosineConfig",
    "wsd": "dougong.optim.schedules:WSDConfig",
    "constant": "dougong.optim.schedules:ConstantConfig",
})

__all__ = ["OPTIMIZERS", "SCHEDULES"]

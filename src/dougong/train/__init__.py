"""The training loop, its state on disk, and what watches it. Names are imported on first use (torch is slow
to load)."""

from typing import Any

from dougong.core.table import Table
from dougong.train.config import EMAConfig, TrainConfig

_LAZY = Table("name in dougong.train", {
    "Checkpointer": "dougong.train.checkpoint:Checkpointer",
    "Shadow": "dougong.train.shadow:Shadow",
    "StepResult": "dougong.train.step:StepResult",
    "TrainState": "dougong.train.state:TrainState",
    "best_valid": "dougong.train.checkpoint:best_valid",
    "fit": "dougong.train.loop:fit",
    "latest_valid": "dougong.train.checkpoint:latest_valid",
    "load_checkpoint": "dougong.train.checkpoint:load_checkpoint",
    "save_checkpoint": "dougong.train.checkpoint:save_checkpoint",
})

__all__ = ["Checkpointer", "EMAConfig", "Shadow", "StepResult", "TrainConfig", "TrainState", "best_valid", "fit",
           "latest_valid", "load_checkpoint", "save_checkpoint"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return _LAZY[name]
    raise AttributeError(f"module 'dougong.train' has no attribute {name!r}")

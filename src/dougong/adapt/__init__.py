"""What is done to a model that exists: adapters, distillation, experience for rewards, compression."""

from dougong.core.table import Table

ADAPTERS = Table("adapter", {
    "lora": "dougong.adapt.lora:LoRAConfig",
    "qat": "dougong.adapt.qat:QATConfig",
})

__all__ = ["ADAPTERS"]

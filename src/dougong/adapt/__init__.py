"""What is done to a model that exists: small parts to learn with, distillation, experience for rewards, compression."""

from dougong.core.table import Table

ADAPTERS = Table("adapter", {
    "lora": "dougong.adapt.lora:LoRAConfig",
    "dora": "dougong.adapt.lora:LoRAConfig",
    "qat": "dougong.adapt.qat:QATConfig",
})
METHODS = Table("compression method", {
    "rtn": "dougong.adapt.quantize:round_to_nearest",
    "gptq": "dougong.adapt.gptq:gptq",
    "awq": "dougong.adapt.awq:awq",
})
"""how integers are found for a model's weights; a `Method` each"""

__all__ = ["ADAPTERS", "METHODS"]

"""What is done to a model that has been trained: its weights rounded, shrunk, or given small parts to learn with."""

from dougong.core.table import Table

METHODS = Table("compression method", {
    "rtn": "dougong.adapt.quantize:round_to_nearest",
})
"""how integers are found for a model's weights; a `Method` each"""

__all__ = ["METHODS"]

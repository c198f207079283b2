"""One file per family: how its config and its tensors are called in Hugging Face's transformers."""

from dougong.core.table import Table

MAPS = Table("family with a Hugging Face form", {
    "gpt2": "dougong.interop.maps.gpt2:MAP",
    "llama": "dougong.interop.maps.llama:MAP",
    "qwen3": "dougong.interop.maps.qwen3:MAP",
    "qwen3_moe": "dougong.interop.maps.qwen3_moe:MAP",
})

__all__ = ["MAPS"]

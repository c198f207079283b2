"""Architectures: stacks, stems and heads arranged into families."""

from dougong.core.table import Table

FAMILIES = Table("model family", {
    "decoder": "dougong.models.compose:DecoderConfig",
    "gpt2": "dougong.models.families.gpt2:GPT2Config",
    "llama": "dougong.models.families.llama:LlamaConfig",
    "qwen3": "dougong.models.families.qwen3:Qwen3Config",
    "qwen3_moe": "dougong.models.families.qwen3_moe:Qwen3MoEConfig",
    "nano": "dougong.models.families.nano:NanoConfig",
    "linear": "dougong.models.families.linear:LinearConfig",
    "cnn": "dougong.models.families.cnn:CNNConfig",
    "gan": "dougong.models.families.gan:GANConfig",
})

__all__ = ["FAMILIES"]

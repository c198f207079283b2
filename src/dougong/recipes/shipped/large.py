"""Models for one GPU and more: GPT-2's smallest and a Qwen3-shaped billion."""

from dougong.data.prepare import TextData
from dougong.data.tokenizer import BpeConfig
from dougong.models.families.gpt2 import GPT2Config
from dougong.models.families.qwen3 import Qwen3Config
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.optim.build import AdamWConfig, MuonConfig
from dougong.optim.schedules import CosineConfig, WSDConfig
from dougong.recipes.recipe import Recipe, SampleConfig
from dougong.train import TrainConfig
from dougong.train.config import SpikeConfig

PROMPTS = ("The ", "In this chapter, ")


def gpt2_124m() -> Recipe:
    """GPT-2 small (Radford et al. 2019) in nanoGPT's published setting; give `data.path`."""
    return Recipe(
        name="gpt2_124m",
        about="GPT-2 small, 124M parameters, context 1024 (one GPU; give data.path)",
        size="124M",
        data=TextData(own=True),
        tokenizer=BpeConfig(vocab_size=50_257),
        model=GPT2Config(dim=768, num_layers=12, num_heads=12, ffn_dim=3072, context=1024),
        objective=CausalLMConfig(),
        optim=AdamWConfig(lr=6e-4),
        schedule=CosineConfig(warmup=2000),
        train=TrainConfig(rows=480, spikes=SpikeConfig()),
        sample=SampleConfig(prompts=PROMPTS),
    )


def qwen3_1b() -> Recipe:
    """A billion parameters in Qwen3's layout, exportable without custom code; give `data.path`."""
    return Recipe(
        name="qwen3_1b",
        about="a Qwen3-shaped model of 1B parameters, context 2048 (a large GPU; give data.path)",
        size="1B",
        data=TextData(own=True),
        tokenizer=BpeConfig(vocab_size=65_536),
        model=Qwen3Config(dim=2048, num_layers=18, num_heads=16, num_kv_heads=8, head_dim=128, ffn_dim=6144,
                          context=2048, rope_theta=1_000_000.0),
        objective=CausalLMConfig(z_loss=1e-4),
        optim=MuonConfig(),
        schedule=WSDConfig(),
        train=TrainConfig(spikes=SpikeConfig()),
        sample=SampleConfig(prompts=PROMPTS),
    )

"""Supervised fine-tuning: a model learns to reply, from conversations. And the same from nothing, on sums."""

from dougong.data.chats import ChatData
from dougong.data.tasks import Tasks
from dougong.data.tokenizer import BpeConfig
from dougong.models.families.qwen3 import Qwen3Config
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.optim.build import AdamWConfig, MuonConfig
from dougong.optim.schedules import CosineConfig, LinearConfig
from dougong.recipes.recipe import EvaluateConfig, Recipe
from dougong.train import TrainConfig


def sft() -> Recipe:
    """Begins from the model that `--model` names. The data are questions about Python's own functions and made tasks
    unless `data.path` names conversations of yours."""
    return Recipe(
        name="sft",
        about="a model that exists learns to reply: --model NAME data.path=chats.jsonl (three epochs)",
        data=ChatData(),
        objective=CausalLMConfig(),
        optim=AdamWConfig(betas=(0.9, 0.95), weight_decay=0.01),
        schedule=CosineConfig(warmup=0.05, floor=0.0),
        train=TrainConfig(epochs=3),
        evaluate=EvaluateConfig(baselines=False),
    )


def reversed_addition() -> Recipe:
    """Sums of two numbers of three digits, their last digit first, as conversations; `benchmarks/adaptation.py`
    measures how many held-out sums it gets right."""
    return Recipe(
        name="reversed_addition",
        about="a model of 0.46M parameters learns to add three-digit numbers, from nothing (three to four minutes on "
              "one thread)",
        data=ChatData(sources=(Tasks(skills=("reversed_addition",), items=30_000, levels=(3, 3)),), row_tokens=256),
        tokenizer=BpeConfig(vocab_size=272),
        model=Qwen3Config(dim=128, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32, ffn_dim=384, context=256),
        objective=CausalLMConfig(),
        optim=MuonConfig(),
        schedule=LinearConfig(warmup=0.05),
        train=TrainConfig(steps=400, rows=16),
        evaluate=EvaluateConfig(baselines=False),
    )

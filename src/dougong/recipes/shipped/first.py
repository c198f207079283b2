"""`first`: a language model from a folder of files, in minutes, exportable as Qwen3 without custom code."""

from dougong.data.prepare import TextData
from dougong.data.tokenizer import BpeConfig
from dougong.models.families.qwen3 import Qwen3Config
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.optim.build import MuonConfig
from dougong.optim.schedules import WSDConfig
from dougong.recipes.recipe import Recipe, SampleConfig
from dougong.train import TrainConfig

PROMPTS = (
    "def read_lines(path):\n    \"\"\"",
    "import os\nimport sys\n\n",
    "class Queue:\n    \"\"\"A first-in, first-out queue.\"\"\"\n\n    def __init__(self",
    "    if not isinstance(value, ",
)


def first() -> Recipe:
    """The data are this Python installation's own sources unless `data.path` names a folder of yours."""
    return Recipe(
        name="first",
        about="a first language model of ~2M parameters on your files, or on Python's own library (5 minutes)",
        size="2M",
        data=TextData(),
        tokenizer=BpeConfig(),
        model=Qwen3Config(previous_token_head=True),
        objective=CausalLMConfig(),
        optim=MuonConfig(),
        schedule=WSDConfig(warmup=0.02, decay=0.65),
        train=TrainConfig(minutes=5),
        sample=SampleConfig(prompts=PROMPTS),
    )

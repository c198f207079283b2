"""`distil`: a small model taught by a larger one that exists."""

from dougong.data.prepare import TextData
from dougong.models.families.qwen3 import Qwen3Config
from dougong.objectives.distil import DistilConfig
from dougong.optim.build import MuonConfig
from dougong.optim.schedules import WSDConfig
from dougong.recipes.recipe import Recipe, SampleConfig
from dougong.recipes.shipped.first import PROMPTS
from dougong.train import TrainConfig


def distil() -> Recipe:
    """Of another size than its teacher, with the same tokenizer. `first` beside it: the same data, nobody to ask."""
    return Recipe(
        name="distil",
        about="a small model taught by a larger one: give objective.teacher=RUN (5 minutes)",
        size="500K",
        data=TextData(),
        model=Qwen3Config(previous_token_head=True),
        objective=DistilConfig(),
        optim=MuonConfig(),
        schedule=WSDConfig(warmup=0.02, decay=0.65),
        train=TrainConfig(minutes=5),
        sample=SampleConfig(prompts=PROMPTS),
    )

"""Characters of Shakespeare: the field's yardstick (nanoGPT's), in ten seconds and in minutes.

Both want `data.path` to name the text (1,115,394 characters; nanoGPT's `data/shakespeare_char` says where it is had)
and divide it as nanoGPT does: the first 90 % of characters for training, the rest for validation.
"""

from dougong.data.dedup import DedupConfig
from dougong.data.prepare import TextData
from dougong.data.split import SplitConfig
from dougong.data.tokenizer import CharactersConfig
from dougong.models.families.nano import NanoConfig
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.optim.build import MuonConfig
from dougong.optim.schedules import WSDConfig
from dougong.recipes.recipe import EvaluateConfig, Recipe, SampleConfig
from dougong.train import TrainConfig

_SAMPLE = SampleConfig(prompts=("ROMEO:\n", "First Citizen:\n"), tokens=300)
_EVALUATE = EvaluateConfig(split="validation", tokens=200_000, baselines=False)


def _text(path: str | None = None) -> TextData:
    return TextData(path=path, own=True, dedup=DedupConfig(exact=False, near=False),
                    split=SplitConfig(fractions=(0.9, 0.1, 0.0), rule="tail", gap_bytes=0), pack="windows")


def shakespeare_char_cpu() -> Recipe:
    """Passes nanoGPT's published CPU setting's final loss (1.9 nats after 2,000 steps) within seconds."""
    return Recipe(
        name="shakespeare_char_cpu",
        about="characters of Shakespeare to nanoGPT's CPU loss in seconds (give data.path)",
        data=_text(),
        tokenizer=CharactersConfig(unknown="refuse", separator=False),
        model=NanoConfig(dim=128, num_layers=3, num_heads=4, context=128, norm="layer_norm", position="rope_alibi",
                         rope_theta=1024.0),
        objective=CausalLMConfig(),
        optim=MuonConfig(lr=0.04, momentum=0.9, adamw_lr=0.015, betas=(0.9, 0.99)),
        schedule=WSDConfig(warmup=0, decay=0.65),
        train=TrainConfig(steps=160, rows=8, clip_norm=0.0),
        evaluate=_EVALUATE,
        sample=_SAMPLE,
    )


def shakespeare_char() -> Recipe:
    """nanoGPT's GPU result on this text, 1.4697 nats, on two CPU cores."""
    return Recipe(
        name="shakespeare_char",
        about="characters of Shakespeare to nanoGPT's GPU loss, 1.4697, in minutes (give data.path)",
        data=_text(),
        tokenizer=CharactersConfig(unknown="refuse", separator=False),
        model=NanoConfig(dim=192, num_layers=5, num_heads=6, context=256, dropout=0.1, embedding_dropout=0.1,
                         norm="layer_norm", position="rope_alibi", rope_theta=1024.0),
        objective=CausalLMConfig(),
        optim=MuonConfig(lr=0.03, momentum=0.95, weight_decay=0.05, adamw_lr=0.01, betas=(0.9, 0.99)),
        schedule=WSDConfig(warmup=0, decay=0.65),
        train=TrainConfig(steps=2400, rows=8, clip_norm=0.0),
        evaluate=_EVALUATE,
        sample=_SAMPLE,
    )

"""A Hugging Face directory as a run: the recipe it might have come from, its tokenizer, one checkpoint, its story."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dougong.core.run import RunDirectory
from dougong.data.prepare import TextData
from dougong.data.tokenizer import FileConfig
from dougong.interop.import_hf import HuggingFaceModel
from dougong.models import count
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.optim.build import AdamWConfig
from dougong.optim.schedules import CosineConfig
from dougong.recipes.made_run import fill, made_run, name_for, refuse_existing
from dougong.recipes.recipe import Recipe, SampleConfig
from dougong.runtime.device import RuntimeConfig
from dougong.train import TrainConfig


@dataclass(frozen=True)
class Imported:
    """The run that was made, and what is worth knowing of it."""

    directory: RunDirectory
    family: str
    parameters: int
    dtype: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"run": str(self.directory.path), "family": self.family, "parameters": self.parameters,
                "dtype": self.dtype, "notes": list(self.notes)}


def imported_recipe(read: HuggingFaceModel, *, name: str, data: str | None, tokenizer: Path) -> Recipe:
    """A whole recipe around a model that no recipe made; everything but model and tokenizer is a default."""
    return Recipe(
        name=name, data=TextData(path=data), tokenizer=FileConfig(path=str(tokenizer)), model=read.config,
        about=f"imported from {read.directory.name}", objective=CausalLMConfig(), optim=AdamWConfig(),
        schedule=CosineConfig(), train=TrainConfig(steps=1, rows=1, micro_rows=1), sample=SampleConfig(),
        runtime=RuntimeConfig(compile=False))      # the rest is that of whichever machine opens it


def recorded_facts(read: HuggingFaceModel, source: str, data: str | None) -> dict[str, Any]:
    """What stands beside the recipe as `resolved`: where the model is from, and which data it may be scored on."""
    return {"tokenizer_fingerprint": read.tokenizer.fingerprint,
            "imported": {"from": source, "dtype": read.dtype, "data": data}}


def import_run(read: HuggingFaceModel, path: Path, *, source: str, data: str | None = None) -> Imported:
    """Writes the run, whole or not at all. Raises ConfigError where something is at `path` already."""
    refuse_existing(path, option="--run")
    recipe = imported_recipe(read, name=name_for(path), data=data, tokenizer=RunDirectory(path).tokenizer)
    with made_run(path) as run:
        fill(run, recipe, recorded_facts(read, source, data), {name: t.float() for name, t in read.tensors.items()},
             reason="import", tokenizer=read.tokenizer)
    parameters = count.parameters(read.config)["total"]
    return Imported(RunDirectory(path), read.config.kind, parameters, read.dtype, read.notes)

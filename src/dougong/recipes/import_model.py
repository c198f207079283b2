"""A Hugging Face directory as a run: the recipe it might have come from, its tokenizer, one checkpoint, its story."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dougong import __version__
from dougong.core.config import dump_yaml
from dougong.core.errors import ConfigError
from dougong.core.events import EventLog
from dougong.core.files import explained_disk_errors, sha256, write_text
from dougong.core.run import RunDirectory
from dougong.data.prepare import TextData
from dougong.data.tokenizer import FileConfig
from dougong.interop.import_hf import HuggingFaceModel
from dougong.models import count
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.optim.build import AdamWConfig
from dougong.optim.schedules import CosineConfig
from dougong.recipes.recipe import Recipe, SampleConfig
from dougong.runtime.device import RuntimeConfig, machine_facts
from dougong.train import TrainConfig
from dougong.train.manifest import publish, temporary
from dougong.train.safetensors_file import write_tensors


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
    return {"dougong": __version__, "torch": torch.__version__,
            "tokenizer_fingerprint": read.tokenizer.fingerprint,
            "imported": {"from": source, "dtype": read.dtype, "data": data}}


def import_run(read: HuggingFaceModel, path: Path, *, source: str, data: str | None = None) -> Imported:
    """Writes the run, whole or not at all. Raises ConfigError where something is at `path` already."""
    if path.exists():
        raise ConfigError(f"{path} exists already, and an import overwrites nothing. Choose another --run.")
    place = path.with_name(f".{path.name}-importing")
    with explained_disk_errors(f"the run {path}"):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            _write(RunDirectory(place), read, path, source, data)
            place.rename(path)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
    parameters = count.parameters(read.config)["total"]
    return Imported(RunDirectory(path), read.config.kind, parameters, read.dtype, read.notes)


def _write(run: RunDirectory, read: HuggingFaceModel, path: Path, source: str, data: str | None) -> None:
    name = "".join(c if c.isalnum() or c in "_.-" else "-" for c in path.name)
    recipe = imported_recipe(read, name=name, data=data, tokenizer=RunDirectory(path).tokenizer)
    read.tokenizer.save(run.tokenizer)
    write_text(run.recipe, dump_yaml(recipe) + dump_yaml({"resolved": recorded_facts(read, source, data)}))
    place = temporary(run, 0)
    place.mkdir(parents=True)
    written = {"model.safetensors": write_tensors(
        place / "model.safetensors", {name: tensor.float().contiguous() for name, tensor in read.tensors.items()})}
    publish(run, {"step": 0, "best": None}, written, recipe_hash=sha256(run.recipe), reason="import")
    log = EventLog(run.events)
    log.write("start", step=0, command=["dougong", *sys.argv[1:]],
              versions={"dougong": __version__, "torch": torch.__version__}, machine=machine_facts(torch.device("cpu")),
              precision=recipe.runtime.precision, threads=recipe.runtime.threads, compile=False, processes=1,
              resumed_from=None)
    log.write("model", parameters=count.parameters(read.config), groups=[],
              flops_per_token=count.flops_per_token(read.config, read.config.context))
    log.write("end", step=0, reason="done", elapsed_s=0.0)
    log.close()

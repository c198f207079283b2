"""A run that no training wrote: a model read from elsewhere, or made of another run's, with all that a run has."""

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dougong import __version__
from dougong.core.config import dump_yaml
from dougong.core.errors import ConfigError
from dougong.core.events import EventLog
from dougong.core.files import explained_disk_errors, sha256, write_text
from dougong.core.run import RunDirectory
from dougong.data.tokenizer import Tokenizer
from dougong.models import count
from dougong.recipes.recipe import Recipe
from dougong.runtime.device import machine_facts
from dougong.train.manifest import publish, temporary
from dougong.train.safetensors_file import write_tensors


def refuse_existing(path: Path, *, option: str) -> None:
    """Raises ConfigError where something is at `path` already; `option` is the one that names it."""
    if path.exists():
        raise ConfigError(f"{path} exists already, and this overwrites nothing. Choose another {option}.")


def name_for(path: Path) -> str:
    """The recipe's name of a run that will lie at `path`."""
    return "".join(c if c.isalnum() or c in "_.-" else "-" for c in path.name)


@contextlib.contextmanager
def made_run(path: Path) -> Iterator[RunDirectory]:
    """A run to be filled, whole or not at all: hidden beside `path`, whose name it takes when the block ends."""
    place = path.with_name(f".{path.name}-writing")
    with explained_disk_errors(f"the run {path}"):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            yield RunDirectory(place)
            place.rename(path)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise


def fill(run: RunDirectory, recipe: Recipe, resolved: Mapping[str, Any], tensors: Mapping[str, Tensor], *, reason: str,
         tokenizer: Tokenizer | None, step: int = 0, adapter: int | None = None,
         beside: Callable[[Path], dict[str, Any]] | None = None) -> int:
    """Tokenizer, recipe, one checkpoint of `tensors` and the story that reports begin from; returns the bytes of the
    weights.

    `resolved` stands beside the recipe; `adapter` counts the numbers of one, where the tensors are no more. `beside`
    writes further files into the checkpoint and returns their size and checksum by name.
    """
    if tokenizer is not None:
        tokenizer.save(run.tokenizer)
    versions = {"dougong": __version__, "torch": torch.__version__}
    write_text(run.recipe, dump_yaml(recipe) + dump_yaml({"resolved": {**resolved, **versions}}))
    place = temporary(run, step)
    place.mkdir(parents=True)
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    written = {"model.safetensors": write_tensors(place / "model.safetensors", held)}
    written |= beside(place) if beside else {}
    publish(run, {"step": step, "best": None}, written, recipe_hash=sha256(run.recipe), reason=reason)
    counted = count.parameters(recipe.model)
    flops = (count.flops_per_token(recipe.model, recipe.row_tokens, adapter=adapter)
             if recipe.is_language_model else None)
    log = EventLog(run.events)
    log.write("start", step=step, command=["dougong", *sys.argv[1:]], versions=versions,
              machine=machine_facts(torch.device("cpu")), precision=recipe.runtime.precision,
              threads=recipe.runtime.threads, compile=False, processes=1, resumed_from=None)
    log.write("model", parameters=counted if adapter is None else {**counted, "trained": adapter}, groups=[],
              flops_per_token=flops)
    log.write("end", step=step, reason="done", elapsed_s=0.0)
    log.close()
    return written["model.safetensors"]["bytes"]

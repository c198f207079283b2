"""Beginning from a model that exists: its shape and tokenizer before anything is built, then its weights.

A run that trains every weight is whole without its start. One that trains an adapter keeps only that, so it names its
start, which must lie where it lay, unchanged: `fingerprint` is compared whenever it is opened.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dougong.core.config import from_dict, replace, to_dict
from dougong.core.errors import CheckpointError, ConfigError
from dougong.core.run import RunDirectory
from dougong.data.tokenizer import FileConfig
from dougong.interop.hub import at_revision, is_hub_name, local_directory
from dougong.interop.import_hf import family_of, is_hf_directory, read_config, read_hf
from dougong.models.heads import VALUE
from dougong.nn.lora import is_adapter
from dougong.recipes.derive import Derived
from dougong.recipes.recipe import Recipe, StartConfig, recipe_from_run
from dougong.runtime import seeds
from dougong.runtime.device import be_deterministic
from dougong.train.shadow import tracked
from dougong.train.state import load_weights

_TABLES = ("stem.tokens.weight", "head.weight")
_NEW_ROWS = 0.1
"""standard deviation of new rows around the mean row, relative to that of the rows there are: near the mean a new token
is as likely as the average one, and apart they can be told from each other (Hewitt 2021, "Initializing New Word
Embeddings for Pretrained Language Models")"""


def with_start(recipe: Recipe) -> tuple[Recipe, list[Derived]]:
    """Fills in model and tokenizer from the model that the recipe begins from, where it names none of its own, and says
    exactly where that is: a path whole, a hub's name with its revision. Reads no weights. Raises ConfigError where
    there is neither a model nor a start."""
    if recipe.start is None:
        if recipe.model is None:
            raise ConfigError(f"recipe {recipe.name} begins from a model that exists. Name one: --model RUN, "
                              "--model FOLDER, or --model hf:OWNER/NAME.")
        return recipe, []
    begun, derived, where = recipe, [], recipe.start.path
    if not is_hub_name(where):
        where = str(Path(where).expanduser().absolute())
    if recipe.model is None or recipe.tokenizer is None:
        model, tokenizer = shape_of_start(recipe.start)
        where = at_revision(where, Path(tokenizer.path))
        if recipe.model is None:
            begun = replace(begun, model=model)
            derived.append(Derived("model", model.kind, f"that of {where}"))
        if recipe.tokenizer is None:
            begun = replace(begun, tokenizer=tokenizer)
            derived.append(Derived("tokenizer", tokenizer.path, f"that of {where}"))
    return replace(begun, start=replace(recipe.start, path=where)), derived


def shape_of_start(start: StartConfig) -> tuple[Any, FileConfig]:
    """The family config and the tokenizer of a model that exists, whose weights are not fetched. Raises ConfigError for
    one without language."""
    if is_hub_name(start.path) or is_hf_directory(Path(start.path).expanduser()):
        directory = local_directory(start.path, weights=False)
        return family_of(directory, read_config(directory))[1], FileConfig(path=str(directory))
    from dougong.recipes.journey import last_run

    directory = RunDirectory.open(_run_of(last_run(Path(start.path).expanduser())))
    recipe, _ = recipe_from_run(directory.recipe)
    if not recipe.is_language_model:
        raise ConfigError(f"{start.path} holds no language model (model.kind={recipe.model.kind}), and only one can be "
                          "begun from.")
    return recipe.model, FileConfig(path=str(directory.tokenizer))


def _run_of(path: Path) -> Path:
    return path.parent.parent if path.parent.name == "checkpoints" else path


@dataclass(frozen=True)
class Weights:
    """The tensors of a model by our names, and a hash of them all."""

    tensors: dict[str, Tensor]
    fingerprint: str


def read_weights(start: StartConfig) -> Weights:
    """The weights to begin from. Of a run with an adapter, those of the merged model."""
    if is_hub_name(start.path) or is_hf_directory(Path(start.path).expanduser()):
        tensors = read_hf(local_directory(start.path)).tensors
    else:
        from dougong.recipes.open_run import open_run

        with as_it_was():
            tensors = tracked(open_run(start.path, checkpoint=start.checkpoint).model)
    return Weights(tensors, fingerprint(tensors))


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """Opening a model applies its own recipe's threads and determinism and draws weights: all are put back."""
    threads, strict, random = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), seeds.rng_state()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        be_deterministic(strict)
        seeds.set_rng_state(random)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types and bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def begin(model: nn.Module, weights: Weights, *, seed: int) -> None:
    """Puts the weights into a freshly built model, whole or this process's part of it.

    Where the vocabulary has grown, new rows are drawn around the mean row. A value head keeps its first weights, and
    that of a start is left behind. Raises CheckpointError where the shapes are not the same otherwise.
    """
    own = {name: tensor for name, tensor in tracked(model).items() if not is_adapter(name)}
    tensors = {name: _grown(name, tensor, own[name].shape, seed) if name in own else tensor
               for name, tensor in weights.tensors.items() if not name.startswith(f"{VALUE}.")}
    tensors |= {name: tensor.detach().clone() for name, tensor in own.items() if name.startswith(f"{VALUE}.")}
    here = getattr(model, "names_of_whole", None)       # a pipeline stage holds some of them
    load_weights(model, tensors if here is None else {name: t for name, t in tensors.items() if name in own}, own)


def _grown(name: str, tensor: Tensor, wanted: torch.Size, seed: int) -> Tensor:
    if name not in _TABLES or tensor.shape[1:] != wanted[1:] or len(tensor) >= wanted[0]:
        return tensor
    rows = tensor.float().cpu()     # where the new rows are drawn: the same on every device
    generator = torch.Generator().manual_seed(seeds.derive(seed, "new rows", name))
    new = torch.randn(wanted[0] - len(rows), rows.shape[1], generator=generator)
    return torch.cat([rows, rows.mean(0) + _NEW_ROWS * rows.std(0) * new])


def check_start(recorded: Mapping[str, Any], weights: Weights, path: Path) -> None:
    """Raises CheckpointError where the model that a run began from is no longer the one it recorded."""
    expected = recorded.get("start_fingerprint")
    if expected and expected != weights.fingerprint:
        raise CheckpointError(f"{path} holds an adapter, and the model it belongs to has changed since (fingerprint "
                              f"{expected[:12]}, now {weights.fingerprint[:12]}).\nPut that model back as it was.")


def as_it_lies(recipe: Recipe, recorded: Mapping[str, Any], directory: RunDirectory) -> Recipe:
    """The recipe of a run with what it stands on where that lies now. Its tokenizer is in its own directory, unless the
    data decide it; and a start that is gone from where it lay may have moved with the run, as the stages of a journey
    do: it lies beside it then."""
    if recipe.start is not None and (moved := _beside(recipe.start.path, directory)) is not None:
        recipe = replace(recipe, start=replace(recipe.start, path=str(moved)))
    own_file = recipe.tokenizer is not None and recipe.tokenizer.kind == "file"
    if "imported" not in recorded and recipe.start is None and not own_file:
        return recipe
    values = {**to_dict(recipe.tokenizer), "kind": "file", "path": str(directory.tokenizer)}
    return replace(recipe, tokenizer=from_dict(FileConfig, {k: v for k, v in values.items()
                                                            if k in ("kind", "path", "document_token")}))


def _beside(start: str, directory: RunDirectory) -> Path | None:
    """The run or checkpoint of that name in the folder of this run, where none is at `start` any more."""
    there = Path(start).expanduser()
    if is_hub_name(start) or there.exists():
        return None
    run = _run_of(there)
    here = directory.path.absolute().parent / run.name / there.relative_to(run)
    return here if here.exists() else None

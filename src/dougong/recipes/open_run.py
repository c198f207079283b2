"""`open_run`: the one way to open a run, whatever asks for it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import nn

from dougong.adapt.compression import Compression, read_compression
from dougong.adapt.lora import hold_frozen
from dougong.core.config import config, replace
from dougong.core.errors import CheckpointError, ConfigError
from dougong.core.run import RunDirectory
from dougong.data.prepare import TextData
from dougong.data.split import SplitConfig
from dougong.interop.hub import is_hub_name, local_directory, model_name
from dougong.interop.import_hf import is_hf_directory, read_hf
from dougong.objectives.distil import COMPANION
from dougong.recipes.assemble import build_model, prepare_data
from dougong.recipes.recipe import Recipe, recipe_from_run
from dougong.recipes.start import as_it_lies, begin, check_start, read_weights
from dougong.runtime.device import Runtime, RuntimeConfig, best_device, usable_cores
from dougong.runtime.processes import launched_here

_ROW_TOKENS = 1024     # of text to look at: a long context would ask for books


@config
class OtherText(TextData):
    """Text that a model was not trained on. Its rows are short, and no part of it has to be far from the others, so a
    few pages are enough."""

    split: SplitConfig = SplitConfig(gap_bytes=0)
    row_tokens: int


@dataclass
class OpenRun:
    """A run with its model loaded. `weights` says whether they are the averaged ones ("ema") or not ("raw")."""

    directory: RunDirectory
    recipe: Recipe
    runtime: Runtime
    model: nn.Module
    tokenizer: Any
    step: int
    weights: str
    recorded: dict[str, Any]
    passed_over: list[str]
    """what was wrong with newer or better checkpoints than the one loaded"""
    compression: Compression | None = None
    """how the weights were made smaller; None: they are floats"""
    merged: Any = None
    """of a run with an adapter: how near its merged matrices are to what was trained (`adapt.lora.Merged`)"""
    hub: str | None = None
    """the name by which a hub's client fetched it, into a folder of its own that is named by a hash"""

    @property
    def name(self) -> str:
        """What it is called: its folder's name, or the model's on a hub."""
        return self.directory.path.resolve().name if self.hub is None else model_name(self.hub)

    def beside(self, what: str) -> Path:
        """Where something that is made of it goes: beside it, or here where a hub's client keeps it."""
        path = self.directory.path
        if self.hub is not None:
            return Path(f"{self.name}-{what}")
        return (path if path.name not in ("", "..") else path.resolve()).with_name(f"{self.name}-{what}")

    @cached_property
    def corpus(self) -> Any:
        """What `corpus_of` finds."""
        return corpus_of(self.recipe, self.recorded, self.directory.path)

    def on_data(self, path: str, **settings: Any) -> "OpenRun":
        """The same model with other data: a folder, file or glob of text; `settings` are those of `OtherText`. Raises
        ConfigError where it reads no text."""
        if self.tokenizer is None:
            raise ConfigError(f"{self.directory.path} holds no language model, and other data are read for one only.")
        from dougong.data.tokenizer import FileConfig

        recipe = replace(_on_text(self.recipe, path, **settings), tokenizer=FileConfig(path=self.tokenizer_path))
        recorded = {key: value for key, value in self.recorded.items() if key not in ("data_fingerprint", "imported")}
        return OpenRun(self.directory, recipe, self.runtime, self.model, self.tokenizer, self.step, self.weights,
                       recorded, self.passed_over, self.compression, hub=self.hub)

    @property
    def tokenizer_path(self) -> str:
        """The directory that holds the tokenizer: the run's, or that of the model that is opened as it is."""
        own = self.directory.tokenizer
        return str(own if own.is_dir() else self.directory.path)

    def generate(self, prompts: list[str], sampling: Any = None, *,
                 stream: Callable[[int, str], None] | None = None, draft: "OpenRun | None" = None,
                 speculate: int | None = None) -> list:
        """Continues each prompt; `sampling` is a `dougong.generate.SamplingConfig`. `draft` guesses ahead."""
        from dougong.generate import generate

        if self.tokenizer is None:
            raise ConfigError(f"{self.directory.path} holds no language model (model.kind={self.recipe.model.kind}), "
                              "so it cannot write.")
        return generate(self.model, self.tokenizer, prompts, sampling, runtime=self.runtime, stream=stream,
                        draft=None if draft is None else draft.drafting_for(self), speculate=speculate)

    def drafting_for(self, other: "OpenRun") -> Any:
        """This run as an engine that guesses for another. Raises ConfigError where their tokenizers differ."""
        from dougong.generate import Engine

        own, its = (None if run.tokenizer is None else run.tokenizer.fingerprint for run in (self, other))
        if own is None or own != its:
            raise ConfigError(f"{self.directory.path} cannot draft for {other.directory.path}: their tokenizers differ "
                              f"({'none' if own is None else own[:12]}, {'none' if its is None else its[:12]}). Train "
                              f"the draft with the other's: tokenizer=file tokenizer.path={other.tokenizer_path}")
        return Engine(self.model, self.runtime)


def open_run(path: Path | str, *, checkpoint: str = "best", merge: bool = True, to_read: bool = False) -> OpenRun:
    """Opens a run, or one checkpoint inside it.

    `checkpoint` is "best" (lowest validation loss), "last", or a step. Damaged checkpoints are passed over. Where the
    run holds an adapter, it is merged into the model that it began from, unless `merge` is false. `to_read`: for
    reading and writing text alone, so that on a GPU weights lie as they compute and are never there in fp32. Raises
    CheckpointError where there is nothing to open.
    """
    from dougong.train.checkpoint import load_model_tensors
    from dougong.train.state import load_weights

    if is_hub_name(str(path)) or is_hf_directory(Path(path)):
        return _open_hf(str(path), checkpoint, to_read)
    from dougong.recipes.journey import last_run

    path = last_run(Path(path))
    if path.parent.name == "checkpoints" and path.name.startswith("step-"):
        checkpoint, path = path.name.removeprefix("step-").lstrip("0") or "0", path.parent.parent
    directory = RunDirectory.open(path)
    recipe, recorded = recipe_from_run(directory.recipe)
    recipe = as_it_lies(recipe, recorded, directory)
    found, passed_over = _find(directory, checkpoint)
    runtime = Runtime.start(runtime_here(recipe.runtime))
    compression = read_compression(found)     # its integers were made of one or the other, and are all there is
    weights = compression.source["weights"] if compression else "ema" if recipe.train.ema else "raw"
    model = build_model(recipe, _place(runtime, to_read), integers=compression.parts if compression else None)
    adapt = recipe.adapt if compression is None else None      # integers were made of what was merged
    if adapt is not None and recipe.start is not None and not adapt.whole:
        start = read_weights(recipe.start)
        check_start(recorded, start, directory.path)
        begin(model, start, seed=recipe.seed)
        adapt.apply(model, seed=0)
    held = load_model_tensors(found, weights="raw" if compression else weights, checked=True)
    load_weights(model, {name: tensor for name, tensor in held.items() if not name.startswith(f"{COMPANION}.")})
    merged = adapt.merge(model) if adapt is not None and merge else None
    return OpenRun(directory, recipe, runtime, _brought(model, runtime, to_read), load_tokenizer(directory),
                   int(found.name[5:]), weights, recorded, passed_over, compression, merged)


def _place(runtime: Runtime, to_read: bool) -> Runtime:
    """Where a model is brought together: where it computes, or on the CPU before it is cast for a GPU."""
    return dataclasses.replace(runtime, device=torch.device("cpu")) if to_read else runtime


def _brought(model: nn.Module, runtime: Runtime, to_read: bool) -> nn.Module:
    """The model where it computes, in evaluation."""
    if to_read and runtime.device.type != "cpu":
        model = hold_frozen(model.requires_grad_(False)).to(runtime.device)
    return model.eval()


def _open_hf(name: str, checkpoint: str, to_read: bool) -> OpenRun:
    """A Hugging Face directory as it lies there, without a run around it."""
    from dougong.recipes.import_model import imported_recipe, recorded_facts
    from dougong.train.state import load_weights

    if checkpoint not in ("best", "last"):
        raise ConfigError(f"{name} is a model, not a run, so it has no checkpoint {checkpoint!r}. Leave --checkpoint "
                          "out.")
    read = read_hf(local_directory(name))
    recipe = imported_recipe(read, name="imported", data=None, tokenizer=read.directory)
    runtime = Runtime.start(runtime_here(recipe.runtime))
    model = build_model(recipe, _place(runtime, to_read))
    load_weights(model, read.tensors)
    return OpenRun(RunDirectory(read.directory), recipe, runtime, _brought(model, runtime, to_read), read.tokenizer, 0,
                   "raw", recorded_facts(read, name, None), [], hub=name if is_hub_name(name) else None)


def runtime_here(section: RuntimeConfig) -> RuntimeConfig:
    """The run's precision on this machine's device and cores: a run made elsewhere opens here. What no recipe decided
    (an imported model's) is decided now: the best device, and on a GPU bf16."""
    device = section.device if section.device in ("cpu", best_device()) else best_device()
    mine = max(1, usable_cores() // launched_here())
    threads = min(section.threads or 1, mine) if section.device == device else mine
    low = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return replace(section, device=device, threads=threads, precision=section.precision or ("bf16" if low else "fp32"))


def load_tokenizer(directory: RunDirectory) -> Any:
    """The run's tokenizer, or None where it has none."""
    if not directory.tokenizer.is_dir():
        return None
    from dougong.data.tokenizer import Tokenizer

    return Tokenizer.load(directory.tokenizer)


def corpus_of(recipe: Recipe, recorded: dict[str, Any], path: Path, *, progress: Any = None) -> Any:
    """The data a run was trained on, prepared again or taken from the cache; of an imported one, the text it was given.

    Raises CheckpointError where they are no longer the same: a score on other data would mislead.
    """
    if imported := recorded.get("imported"):
        if imported.get("data") is None:
            raise ConfigError(f"{path} was imported, so it has no data of its own. Name some to score it on: dougong "
                              "eval --data FOLDER, or dougong import --data FOLDER.")
        recipe = _on_text(recipe, imported["data"])
    corpus = prepare_data(recipe, progress=progress)
    check_same_data(recorded, corpus, path)
    return corpus


def _on_text(recipe: Recipe, path: str, **settings: Any) -> Recipe:
    rows = {"row_tokens": min(_ROW_TOKENS, recipe.model.context)}
    return replace(recipe, data=OtherText(path=path, **{**rows, **settings}))


def check_same_data(recorded: dict[str, Any], corpus: Any, path: Path) -> None:
    """Raises CheckpointError where the data are not those the run recorded."""
    expected = recorded.get("data_fingerprint")
    if expected and expected != corpus.fingerprint:
        raise CheckpointError(f"the data of {path} have changed since it was made (fingerprint {expected[:12]}, now "
                              f"{corpus.fingerprint[:12]}).\nPut the files back as they were, or start a new run.")


def _find(directory: RunDirectory, checkpoint: str) -> tuple[Path, list[str]]:
    """The checkpoint asked for, and what was wrong with those passed over."""
    from dougong.train.checkpoint import best_valid, latest_valid, problems

    if checkpoint in ("best", "last"):
        found = (best_valid if checkpoint == "best" else latest_valid)(directory, weights_only=True)
        if found.path is None and checkpoint == "best":
            found = latest_valid(directory, weights_only=True)
        if found.path is None:
            wrong = "\n  ".join(found.problems)
            raise CheckpointError(f"{directory.path} has no valid checkpoint." + (f"\n  {wrong}" if wrong else "")
                                  + "\nTraining may not have reached its first one: "
                                  f"dougong train --resume --run {quote(str(directory.path))}")
        return found.path, found.problems
    steps = directory.checkpoint_steps()
    if not checkpoint.isdigit() or int(checkpoint) not in steps:
        raise CheckpointError(f"{directory.path} has no checkpoint {checkpoint!r}. There are: best, last, "
                              f"{', '.join(map(str, steps)) or 'and no steps yet'}.")
    wrong = problems(directory.checkpoint(int(checkpoint)), weights_only=True)
    if wrong:
        raise CheckpointError(f"checkpoint {checkpoint} is damaged: {'; '.join(wrong)}.\nTry --checkpoint last.")
    return directory.checkpoint(int(checkpoint)), []

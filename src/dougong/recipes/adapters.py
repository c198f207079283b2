"""Adapters that come and go by themselves: to PEFT's form and back, and laid over a model that is open."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dougong.core.config import replace
from dougong.core.errors import CheckpointError, ConfigError, MissingExtraError
from dougong.core.files import write_json
from dougong.core.run import RunDirectory
from dougong.data.prepare import TextData
from dougong.data.tokenizer import FileConfig
from dougong.interop.export_hf import context_of, transformers_package, without_special_tokens
from dougong.interop.hub import at_revision, is_hub_name
from dougong.interop.import_hf import is_hf_directory
from dougong.interop.maps.family_map import FamilyMap
from dougong.interop.peft_form import CONFIG, WEIGHTS, is_peft_directory, read_peft, to_peft
from dougong.interop.published import published_form
from dougong.interop.verify import UNUSUAL, Verified, compare_logits, readable, rows_of
from dougong.nn.lora import LowRank
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.optim.build import AdamWConfig
from dougong.optim.schedules import CosineConfig
from dougong.recipes.export import Exported, held_out_texts, published_whole, refuse_without_tokens, sizes_of
from dougong.recipes.made_run import fill, made_run, name_for, refuse_existing
from dougong.recipes.open_run import OpenRun, open_run
from dougong.recipes.recipe import Recipe, StartConfig, recipe_from_run
from dougong.recipes.start import read_weights
from dougong.train import TrainConfig
from dougong.train.safetensors_file import write_tensors
from dougong.train.shadow import moving, tracked
from dougong.train.state import load_weights


def export_peft(opened: OpenRun, out: Path, *, verify: bool = True) -> Exported:
    """A directory for PEFT, of a run opened with its adapter apart (`open_run(…, merge=False)`).

    Raises ConfigError for what the format cannot hold, Mismatch (and leaves nothing) where PEFT computes something else
    with it than we do.
    """
    recipe = refuse_without_tokens(opened)
    if recipe.adapter is None or recipe.start is None or opened.compression is not None:
        raise ConfigError(f"{opened.directory.path} holds a whole model, no adapter. Export it: --to hf.")
    family, config = published_form(recipe.model)
    settings, tensors = to_peft(opened.model, family, config, recipe.adapter, _name_of_base(recipe.start.path))

    def write(place: Path) -> Verified | None:
        write_json(place / CONFIG, settings)
        write_tensors(place / WEIGHTS, tensors)
        return _verify(place, opened, family, config) if verify else None

    verified = published_whole(out, write)
    return Exported(out, "peft", "f32", sizes_of(out), verified, tuple(_notes(opened)))


def _name_of_base(path: str) -> str:
    """What PEFT looks for: a name on the hub; of a folder its own name only, as paths name people."""
    return path.partition(":")[2].partition("@")[0] if is_hub_name(path) else Path(path).name


def _notes(opened: OpenRun) -> list[str]:
    assert opened.recipe.start is not None
    start, base = opened.recipe.start.path, opened.recipe.adapt.base
    notes = []
    if not is_hub_name(start):
        of_run = not is_hf_directory(Path(start))
        where = f"the model of {start}, to be exported too (--to hf)" if of_run else start
        notes.append(f"it belongs to {where}; put where that lies as base_model_name_or_path into {CONFIG}.")
    if base != "float":
        notes.append(f"it was trained over {base} and verified over it: over the weights before rounding PEFT computes "
                     "a little apart.")
    return notes


def _verify(place: Path, opened: OpenRun, family: FamilyMap, config: Any) -> Verified:
    """Lays the adapter over the frozen weights in transformers, with PEFT, and compares with the merged model."""
    transformers = transformers_package()
    try:
        import peft
    except ImportError:
        raise MissingExtraError("peft", "hf", "Reading the adapter back with PEFT (or --no-verify)") from None
    bare = with_tensors(config, _frozen(opened.model))
    theirs = transformers.AutoConfig.for_model(**family.config_to_hf(config))
    theirs.dtype = "float32"
    with readable("PEFT"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
        model.load_state_dict(family.tensors_to_hf(config, tracked(bare)), strict=False)
        loaded = peft.PeftModel.from_pretrained(model.float(), place).eval()
    merged = with_tensors(config, merged_tensors(opened.model))
    texts = without_special_tokens([*held_out_texts(opened), *UNUSUAL], opened.tokenizer)
    rows = rows_of(opened.tokenizer.encode_batch(list(texts), threads=1), first=opened.tokenizer.begin_id,
                   context=context_of(merged))
    return compare_logits(merged, loaded, rows, "PEFT", texts=len(texts))


def with_tensors(config: Any, tensors: dict[str, Tensor]) -> nn.Module:
    """A float32 model of these weights on the CPU."""
    with torch.device("meta"):
        model = config.build()
    model = model.to_empty(device="cpu")
    model.initialise(0)
    load_weights(model, {name: tensor.detach().to("cpu", torch.float32) for name, tensor in tensors.items()})
    return model.eval()


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    """The weights under the adapters, by the model's own names."""
    return _weights(model, lambda part: part.dequantize(torch.float32))


def merged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What merging gives, the model left as it is."""
    return _weights(model, lambda part: part.merged().weight)


def _weights(model: nn.Module, of: Any) -> dict[str, Tensor]:
    found = {}
    for path, module in model.named_modules():
        assert path or not list(module.parameters(recurse=False)), "a model's parameters belong to its parts"
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(module, LowRank) or name == "bias":
                found[f"{path}.{name}"] = parameter
        for name, buffer in module.named_buffers(recurse=False):
            if not isinstance(module, LowRank) and name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}"] = buffer
        if isinstance(module, LowRank):
            found[f"{path}.weight"] = of(module)
    return found


def open_with_adapter(base: str, path: Path, *, checkpoint: str = "best") -> OpenRun:
    """A model with an adapter merged into it: of PEFT's form, or a run's that began from this model.

    Raises CheckpointError for an adapter that belongs to another model.
    """
    opened = open_run(base, checkpoint=checkpoint)
    if is_peft_directory(path):
        read = read_peft(path, *published_form(opened.recipe.model))
        adapt, tensors, recorded = read.adapt, read.tensors, {}
    elif (path / "recipe.yaml").is_file():
        apart = open_run(path, merge=False)
        adapt, tensors, recorded = apart.recipe.adapter, dict(moving(apart.model)), apart.recorded
        if adapt is None or apart.compression is not None:
            raise ConfigError(f"{path} holds a whole model, no adapter. Name it in place of {opened.directory.path}.")
    else:
        raise CheckpointError(f"{path} holds no adapter: neither PEFT's {CONFIG} nor a run's recipe.yaml.")
    mine = read_weights(StartConfig(path=base, checkpoint=checkpoint)).fingerprint if recorded else ""
    if recorded.get("start_fingerprint", mine) != mine:
        raise CheckpointError(f"the adapter in {path} belongs to another model than {opened.directory.path} "
                              f"(fingerprint {recorded['start_fingerprint'][:12]}, here {mine[:12]}).")
    adapt.apply(opened.model, seed=0)
    load_weights(opened.model, tensors)
    opened.merged = adapt.merge(opened.model)
    opened.model.eval()
    return opened


def import_adapter(directory: Path, base: str, path: Path) -> RunDirectory:
    """A run around an adapter in PEFT's form: it names the model it begins from, and its one checkpoint holds the
    adapter. Raises ConfigError where something is at `path` already."""
    refuse_existing(path, option="--run")
    under = open_run(base)
    if under.tokenizer is None:
        raise ConfigError(f"{base} holds no language model (model.kind={under.recipe.model.kind}).")
    read = read_peft(directory, *published_form(under.recipe.model))
    begins = read_weights(StartConfig(path=base)).fingerprint
    read.adapt.apply(under.model, seed=0)
    load_weights(under.model, read.tensors)     # every tensor has its place, or it is refused
    base = at_revision(base, under.directory.path)
    start = StartConfig(path=base if is_hub_name(base) else str(Path(base).expanduser().absolute()))
    recipe = Recipe(
        name=name_for(path), about=f"imported from {directory.name}", data=TextData(),
        tokenizer=FileConfig(path=str(RunDirectory(path).tokenizer)), start=start, model=under.recipe.model,
        adapt=read.adapt, objective=CausalLMConfig(), optim=AdamWConfig(), schedule=CosineConfig(),
        train=TrainConfig(steps=1, rows=1, micro_rows=1), runtime=replace(under.recipe.runtime, precision="fp32"))
    resolved = {"start_fingerprint": begins, "tokenizer_fingerprint": under.tokenizer.fingerprint,
                "imported": {"from": str(directory), "dtype": "float32", "data": None}}
    tensors = {name: tensor.float() for name, tensor in moving(under.model).items()}
    with made_run(path) as run:
        fill(run, recipe, resolved, tensors, reason="import", tokenizer=under.tokenizer,
             adapter=sum(tensor.numel() for tensor in tensors.values()))
        recipe_from_run(run.recipe)     # what was written can be read
    return RunDirectory(path)

"""A Hugging Face directory as a family config, tensors and a tokenizer, every part checked before it is used."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dougong.core.errors import CheckpointError, ConfigError, DataError, did_you_mean
from dougong.data.tokenizer import Tokenizer
from dougong.interop.maps import MAPS
from dougong.interop.maps.family_map import FamilyMap
from dougong.interop.tensor_files import headers, read_tensors
from dougong.train.shadow import tracked

_PLAIN = ("F64", "F32", "F16", "BF16")
_READ = ("Read are GPT-2, Llama 2 and 3 and models of their form (without rope scaling: not 3.1 and later), Qwen3 and "
         "Qwen3-MoE, such as hf:Qwen/Qwen3-0.6B.")


@dataclass(frozen=True)
class HuggingFaceModel:
    """A directory, read. `dtype` is the type of all its weights, or "mixed"; `tensors` have it still, by our names."""

    directory: Path
    family: FamilyMap
    config: Any
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer
    dtype: str
    notes: tuple[str, ...] = ()


def is_hf_directory(path: Path) -> bool:
    """Whether this looks like a model for transformers: a config, and not a run."""
    return (path / "config.json").is_file() and not (path / "recipe.yaml").is_file()


def read_hf(directory: Path) -> HuggingFaceModel:
    """Reads config, weights and tokenizer. Raises ConfigError for an architecture or a setting that is not known here,
    CheckpointError and DataError for files that are damaged, absent or do not belong together."""
    given = read_config(directory)
    family, config = family_of(directory, given)
    wanted = _check_headers(directory, family, config)
    tensors = family.tensors_from_hf(config, dict(read_tensors(directory)))
    for name, tensor in tensors.items():    # of what some version joins the headers say nothing that could be compared
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(f"{directory}: {name} is of shape {list(tensor.shape)}, and config.json asks for "
                                  f"{list(wanted[name].shape)}. They do not belong together; fetch both again.")
    tokenizer = read_tokenizer(directory, given)
    rows, notes = config.vocab_size, []
    if tokenizer.vocab_size > rows:
        raise ConfigError(f"the tokenizer in {directory} has {tokenizer.vocab_size:,} tokens, and the embedding in its "
                          f"weights only {rows:,} rows (vocab_size in config.json): they do not belong together. Fetch "
                          "both from the same place.")
    if tokenizer.vocab_size < rows:
        notes.append(f"{rows - tokenizer.vocab_size:,} rows of the embedding have no token; kept, never drawn.")
    types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    dtype = next(iter(types)) if len(types) == 1 else "mixed"
    if dtype == "mixed":
        notes.append(f"weights of several types ({dict(types)}) are widened to float32, which loses nothing.")
    elif dtype in ("bfloat16", "float16"):
        notes.append(f"{dtype} weights are widened to float32, which loses nothing; an export writes {dtype} again.")
    elif dtype == "float64":
        notes.append("float64 weights are rounded to float32.")
    return HuggingFaceModel(directory, family, config, tensors, tokenizer, dtype, tuple(notes))


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. Raises CheckpointError where it is absent or no JSON object."""
    path = directory / "config.json"
    try:
        given = json.loads(path.read_bytes())
    except OSError:
        there = ", ".join(sorted(p.name for p in directory.iterdir())[:10]) if directory.is_dir() else ""
        raise CheckpointError(f"{directory} is no Hugging Face model: it has no config.json. There is: "
                              f"{there or 'nothing'}.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}. Fetch it again.") from None
    if not isinstance(given, dict):
        raise CheckpointError(f"{path} should hold keys and values; it holds {type(given).__name__}. Fetch it again.")
    return given


def family_of(directory: Path, given: dict[str, Any]) -> tuple[FamilyMap, Any]:
    """The family that config.json names, and its config in our words. Raises ConfigError for others, naming what is
    known and what is nearest."""
    try:
        return _family_of(directory, given)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"{directory}/config.json holds a value of the wrong type or size: {error}.") from None


def _family_of(directory: Path, given: dict[str, Any]) -> tuple[FamilyMap, Any]:
    architectures = [str(name) for name in given.get("architectures") or []]
    kind: Any = given.get("model_type") or next((k for k in MAPS if MAPS[k].architecture in architectures), None)
    if kind not in MAPS:
        near = did_you_mean(str(kind), MAPS)
        raise ConfigError(f"{directory}/config.json has model_type={kind!r} (architectures: "
                          f"{', '.join(architectures) or 'none'}), which is not known here. Known: {', '.join(MAPS)}."
                          + (near.replace("Did you mean", "Nearest:").rstrip("?") + "." if "mean" in near else "")
                          + f"\n{_READ}")
    if given.get("quantization_config"):
        method = given["quantization_config"].get("quant_method", "in an unknown way")
        raise ConfigError(f"the weights in {directory} are quantised ({method}), and only plain ones are read. Take "
                          "the model that they were made from.")
    try:
        return MAPS[kind], MAPS[kind].config_from_hf(given)
    except ConfigError as error:
        raise ConfigError(f"{directory}: {error}\n{_READ}") from None


def read_tokenizer(directory: Path, given: dict[str, Any]) -> Tokenizer:
    """The tokenizer beside a model; where its settings name no token that ends a text, the model's do."""
    tokenizer = Tokenizer.load(directory)
    if tokenizer.document_id is not None:
        return tokenizer
    generation = directory / "generation_config.json"
    try:
        ends = (json.loads(generation.read_bytes()) if generation.is_file() else {}).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{generation} is damaged: {error}. Fetch it again.") from None
    ends: Any = given.get("eos_token_id") if ends is None else ends
    end: Any = ends[0] if isinstance(ends, list) and ends else ends
    return tokenizer.ending_with(end if type(end) is int else None)     # true is no token


def _check_headers(directory: Path, family: FamilyMap, config: Any) -> Mapping[str, Tensor]:
    """Compares the files' headers with what config.json asks for, before any weight is read; returns that by our names,
    on the meta device."""
    files = headers(directory)
    if config.num_layers > (held := sum(map(len, files.values()))):
        raise CheckpointError(f"{directory}/config.json asks for {config.num_layers:,} layers, and the files hold "
                              f"{held:,} tensors in all. They do not belong together; fetch both again.")
    try:
        with torch.device("meta"):
            ours = tracked(config.build())
    except (TypeError, RuntimeError, OverflowError) as error:
        raise ConfigError(f"{directory}/config.json asks for what no tensor can hold: {str(error).splitlines()[0]}"
                          ) from None
    wanted = {name: list(tensor.shape) for name, tensor in family.tensors_to_hf(config, ours).items()}
    for file, entries in files.items():
        for name, entry in entries.items():
            shape = wanted.get(name, wanted.get(family.base_prefix + name))
            if shape is not None and shape != entry["shape"]:
                raise CheckpointError(f"{directory / file}: {name} has shape {entry['shape']}, and config.json asks "
                                      f"for {shape}. They do not belong together; fetch both again.")
            if shape is not None and entry["dtype"] not in _PLAIN:
                raise CheckpointError(f"{directory / file}: {name} is stored as {entry['dtype']}, which is no plain "
                                      f"weight. Known: {', '.join(_PLAIN)}.")
    return ours

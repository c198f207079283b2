"""Directories of safetensors: one file, or several with an index, as Hugging Face lays them out.

What is read is checked first: a header that does not describe the bytes behind it, a value that is no number, an index
that points elsewhere are errors naming file and key, never a crash later.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dougong.core.errors import CheckpointError, did_you_mean
from dougong.core.files import write_json
from dougong.train.safetensors_file import TYPES, write_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
"""most bytes of one file; Hugging Face's hub shows and fetches files of this size well"""
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_LARGEST_HEADER = 100_000_000


def write_shards(directory: Path, tensors: Mapping[str, Tensor], *, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Writes all tensors, in several files with an index above `shard_bytes`; returns the files' names."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_tensors(directory / SINGLE, shards[0])
        return [SINGLE]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        write_tensors(directory / name, shard)
    write_json(directory / INDEX, {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values()),
                     "total_parameters": sum(t.numel() for t in tensors.values())},
        "weight_map": {tensor: name for name, shard in zip(names, shards) for tensor in shard}})
    return names


def headers(directory: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """File -> tensor -> {"dtype", "shape", "data_offsets"} of a directory, every header checked against its file.

    Raises CheckpointError for weights that are absent, pickled, cut off or not where the index says.
    """
    if (directory / INDEX).is_file():
        index = _weight_map(directory / INDEX)
        found = {name: read_header(directory / name) for name in sorted(set(index.values()))}
        for tensor, name in index.items():
            if tensor not in found[name]:
                raise CheckpointError(f"{directory / name} does not hold {tensor!r}, which {INDEX} says is there."
                                      f"{did_you_mean(tensor, found[name])} Fetch both files again.")
        return {name: {t: entry for t, entry in tensors.items() if index.get(t) == name}
                for name, tensors in found.items()}
    if (directory / SINGLE).is_file():
        return {SINGLE: read_header(directory / SINGLE)}
    pickled = sorted(p.name for pattern in _PICKLED for p in directory.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{directory} holds pickled weights ({', '.join(pickled[:3])}), which are refused: loading a pickle runs "
            "whatever code its maker put into it.\nFetch the model's safetensors files, or convert where you can "
            "afford it: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW) with transformers.")
    there = ", ".join(sorted(p.name for p in directory.iterdir())[:10]) or "nothing"
    raise CheckpointError(f"no weights in {directory}: {SINGLE} or {INDEX} is needed, there is {there}.")


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor -> what the header says of it. Raises CheckpointError where the file cannot be what the header says."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise CheckpointError(f"{path} is no safetensors file, or was cut off: it holds {size:,} bytes and its "
                                      f"header would be {length:,} long. Fetch it again.")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. The index names it: is it fetched?") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: its header is damaged ({error}). Fetch it again.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is damaged (no JSON object). Fetch it again.")
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in tensors.items():
        _check_entry(path, name, entry, size - 8 - length)
    _check_layout(path, tensors, size - 8 - length)
    return tensors


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in its stored type, file by file. Raises CheckpointError, naming file and key, for values that are
    not finite."""
    from safetensors import SafetensorError, safe_open

    for name, entries in headers(directory).items():
        try:
            with safe_open(directory / name, framework="pt") as file:
                for key in entries:
                    tensor = file.get_tensor(key)
                    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                        raise CheckpointError(f"{directory / name}: {key} holds values that are no numbers (NaN or "
                                              "infinity). The file is damaged, or its training had failed.")
                    yield key, tensor
        except SafetensorError as error:
            raise CheckpointError(f"{directory / name} cannot be read: {error}. Fetch it again.") from None


def _weight_map(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_bytes())["weight_map"]
        if not isinstance(found, dict):
            raise TypeError(type(found).__name__)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}. It should hold a weight_map. Fetch it again.") from None
    for tensor, name in found.items():
        if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {tensor} is said to be in {name!r}, which is no safetensors file of this "
                                  "directory.")
    return found


def _check_entry(path: Path, name: str, entry: Any, available: int) -> None:
    try:
        (begin, end), shape, kind = entry["data_offsets"], entry["shape"], entry["dtype"]
        if kind not in TYPES:
            raise CheckpointError(f"{path}: {name} is of type {kind}, which is not known here. Known: "
                                  f"{', '.join(TYPES)}.")
        if not all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape)):
            raise ValueError
        expected = math.prod(shape) * TYPES[kind].itemsize
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: the header's entry {name!r} is damaged. Fetch the file again.") from None
    if end - begin != expected:
        raise CheckpointError(f"{path}: {name} of shape {shape} ({kind}) needs {expected:,} bytes, and the header "
                              f"gives it {end - begin:,}. The file was changed or is damaged; fetch it again.")
    if end > available:
        raise CheckpointError(f"{path} is cut off: {name} ends at byte {end:,} of {available:,} that are there. Fetch "
                              "the file again.")


def _check_layout(path: Path, tensors: Mapping[str, Any], available: int) -> None:
    """Tensors lie one after another and fill the file, or bytes are shared or hidden."""
    at = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != at:
            raise CheckpointError(f"{path}: {name} begins at byte {begin:,}, where {at:,} is expected. The file was "
                                  "changed or is damaged; fetch it again.")
        at = end
    if at != available:
        raise CheckpointError(f"{path} holds {available - at:,} bytes after its last tensor. Fetch it again.")

"""Parts of tensors: which part of each a process holds, files of parts, and any part read from whatever files.

A file of parts is a plain safetensors file whose header says where each tensor begins in the whole one, in the words
that `torch.distributed.checkpoint`'s HuggingFaceStorageReader understands, and how large the whole is.
"""

import json
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from dougong.core.errors import CheckpointError
from dougong.train.safetensors_file import TYPES, read_header, write_tensors

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""where a part begins in the whole tensor, and its shape"""
_OFFSETS, _SHAPES = "DCP_SHARDING_INFO", "whole_shapes"


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    held: Any = tensor.detach()
    return held.to_local() if isinstance(held, DTensor) else held


def box(tensor: Tensor) -> Box:
    """Which part of the whole tensor that is. Raises CheckpointError where it is not one contiguous block."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    spans = [_span(tuple(tensor.shape), dim, tensor.device_mesh, tensor.placements) for dim in range(tensor.ndim)]
    offset, shape = tuple(start for start, _ in spans), tuple(length for _, length in spans)
    if shape != tuple(tensor.to_local().shape):
        raise CheckpointError(f"a tensor of {tuple(tensor.shape)} placed as {tensor.placements} should leave {shape} "
                              f"here, and there are {tuple(tensor.to_local().shape)}: it cannot be saved.\n"
                              "Choose a layout whose axes divide the model's widths.")
    return offset, shape


@lru_cache(maxsize=4096)
def _span(shape: tuple[int, ...], dim: int, mesh: Any, placements: tuple[Any, ...]) -> tuple[int, int]:
    """First index and length along one dimension: DTensor itself is asked, by placing the indices as it would the
    tensor (`_StridedShard` included), without a message to anyone."""
    along = [p if getattr(p, "dim", None) == dim else Replicate() for p in placements]
    indices = torch.arange(shape[dim]).view([-1 if d == dim else 1 for d in range(len(shape))])
    here = distribute_tensor(indices, mesh, along, src_data_rank=None).to_local().flatten().tolist()
    start = here[0] if here else 0
    if here != list(range(start, start + len(here))):
        raise CheckpointError(f"a tensor of {shape} placed as {placements} lies scattered along dimension {dim}: "
                              "it cannot be saved in parts.")
    return start, len(here)


def placed_like(own: Tensor, part: Tensor) -> Tensor:
    """`part` (what this process holds) as a tensor of the same placement as `own`."""
    part = part.to(own.device)
    if not isinstance(own, DTensor):
        return part
    return DTensor.from_local(part, own.device_mesh, own.placements, run_check=False, shape=own.shape,
                              stride=own.stride())


@torch.no_grad()
def fill(own: Tensor, value: Tensor) -> None:
    """Copies into what this process holds of `own`, from a tensor placed like it or from a whole one."""
    if isinstance(own, DTensor) and not isinstance(value, DTensor):
        value = value[tuple(slice(start, start + length) for start, length in zip(*box(own)))]
    local(own).copy_(local(value))


def write_parts(path: Path, parts: Mapping[str, tuple[Tensor, Box, tuple[int, ...]]]) -> dict:
    """Writes (part, its box, shape of the whole) by name; returns {"sha256", "bytes"}. Raises OSError."""
    offsets = {name: {"saved_offsets": list(at[0])} for name, (_, at, _) in parts.items()}
    shapes = {name: list(whole) for name, (_, _, whole) in parts.items()}
    return write_tensors(path, {name: part for name, (part, _, _) in parts.items()},
                         {"format": "pt", _OFFSETS: json.dumps(offsets), _SHAPES: json.dumps(shapes)})


class Stored(Mapping[str, torch.Size]):
    """Shapes of one group of a checkpoint's tensors by name, and `read` for any part of them, whoever wrote them."""

    def __init__(self, path: Path, group: str) -> None:
        self.path, self.group = path, group
        self._shapes: dict[str, torch.Size] = {}
        self._types: dict[str, torch.dtype] = {}
        self._parts: dict[str, list[tuple[Path, Box]]] = {}
        self._open: dict[Path, Any] = {}
        for file in sorted([*path.glob(f"{group}.safetensors"), *path.glob(f"{group}-*-of-*.safetensors")]):
            self._index(file)

    def _index(self, file: Path) -> None:
        header = read_header(file)
        about = header.pop("__metadata__", {})
        offsets, shapes = json.loads(about.get(_OFFSETS, "{}")), json.loads(about.get(_SHAPES, "{}"))
        for name, entry in header.items():
            shape = tuple(entry["shape"])
            offset = tuple(offsets[name]["saved_offsets"]) if name in offsets else (0,) * len(shape)
            self._shapes[name] = torch.Size(shapes.get(name, shape))
            self._types[name] = TYPES[entry["dtype"]]
            self._parts.setdefault(name, []).append((file, (offset, shape)))

    def __getitem__(self, name: str) -> torch.Size:
        return self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def read(self, name: str, wanted: Box | None = None) -> Tensor:
        """A part of a tensor (None: all of it); only the bytes asked for are read. Raises CheckpointError where no
        file holds some of them."""
        offset, shape = wanted or ((0,) * len(self[name]), tuple(self[name]))
        result = torch.empty(shape, dtype=self._types[name])
        found = 0
        for file, (begin, size) in self._parts[name]:
            low = [max(a, b) for a, b in zip(offset, begin)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, begin, size)]
            if all(a < b for a, b in zip(low, high)):
                into = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset))
                result[into] = self._slice(file, name, [slice(a - o, b - o) for a, b, o in zip(low, high, begin)])
                found += math.prod(b - a for a, b in zip(low, high))
        if found != result.numel():
            raise CheckpointError(f"{self.path} holds {found:,} of {result.numel():,} values asked for of "
                                  f"{self.group} {name}: a part is missing.")
        return result

    def like(self, name: str, own: Tensor) -> Tensor:
        """The part that this process holds of `own`, as a tensor placed like it."""
        return placed_like(own, self.read(name, box(own)))

    def _slice(self, file: Path, name: str, where: list[slice]) -> Tensor:
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file].get_slice(name)[tuple(where)] if where else self._open[file].get_tensor(name)

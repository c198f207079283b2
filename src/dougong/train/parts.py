"""Parts of tensors: which part of each a process holds, files of parts, and any part read from whatever files.

A file of parts is a plain safetensors file whose header says where each tensor begins in the whole one, in the words
that `torch.distributed.checkpoint`'s HuggingFaceStorageReader understands, and how large the whole is.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dougong.core.errors import CheckpointError
from dougong.runtime.parts import local, part_of
from dougong.train.safetensors_file import TYPES, read_header, write_tensors

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""where a part begins in the whole tensor, and its shape"""
_OFFSETS, _SHAPES = "DCP_SHARDING_INFO", "whole_shapes"


@dataclass(frozen=True)
class Part:
    """What this process is to hold of a tensor, read but not yet on the device, and the shape of the whole."""

    value: Tensor
    shape: torch.Size


def box(tensor: Tensor) -> Box:
    """Which part of the whole tensor this process holds. Raises CheckpointError where that is not one block."""
    pieces, here = part_of(tensor), tuple(local(tensor).shape)
    offset, shape = tuple(piece.start for piece in pieces), tuple(piece.stop - piece.start for piece in pieces)
    if shape != here:
        placements = getattr(tensor, "placements", ())
        raise CheckpointError(f"a tensor of {tuple(tensor.shape)} placed as {placements} should leave {shape} here, "
                              f"and there are {here}: it cannot be saved.\n"
                              "Choose a layout whose axes divide the model's widths.")
    return offset, shape


def placed_like(own: Tensor, part: Part) -> Tensor:
    """`part` as a tensor of the same placement as `own`; where that is on the CPU, in the very memory."""
    value = part.value.to(own.device)
    if not _is_divided(own):
        return value
    from torch.distributed.tensor import DTensor

    lying: Any = own
    return DTensor.from_local(value, lying.device_mesh, lying.placements, run_check=False, shape=own.shape,
                              stride=own.stride())


@torch.no_grad()
def fill(own: Tensor, value: Tensor | Part) -> None:
    """Copies into what this process holds of `own`, from this part of it, a tensor placed like it or a whole one."""
    if isinstance(value, Part):
        value = value.value
    elif _is_divided(own) and not _is_divided(value):
        value = value[tuple(slice(start, start + length) for start, length in zip(*box(own)))]
    local(own.detach()).copy_(local(value.detach()))


def _is_divided(tensor: Tensor) -> bool:
    """Whether it is a DTensor (whose module takes half a second to import)."""
    return hasattr(tensor, "_local_tensor")


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

    def part(self, name: str, own: Tensor) -> Part:
        """The part that this process holds of `own`, on the CPU: the device has room for one of each."""
        return Part(self.read(name, box(own)), self[name])

    def _slice(self, file: Path, name: str, where: list[slice]) -> Tensor:
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file].get_slice(name)[tuple(where)] if where else self._open[file].get_tensor(name)

"""Writing one safetensors file: hashed while it is written, on disk when the call returns.

The safetensors package writes well but reports a full disk as its own error type, does not sync, and would
have to be read again for the checksum. The format is a length, a JSON header and the bytes; reading tensors is
left to the package.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
          torch.bool: "BOOL"}
TYPES = {name: dtype for dtype, name in _NAMES.items()}
_ALIGNMENT = 8


def write_tensors(path: Path, tensors: Mapping[str, Tensor],
                  metadata: Mapping[str, str] | None = None) -> dict:
    """Writes CPU tensors to `path` and syncs it; returns {"sha256", "bytes"} of the file. Raises OSError."""
    # Wide types first keeps every tensor aligned to its width, as the format's own writer does.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict = {"__metadata__": dict(metadata or {"format": "pt"})}
    position = 0
    for name in order:
        size = tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)

    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in (len(text).to_bytes(8, "little"), text, *(_bytes(tensors[name]) for name in order)):
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "bytes": 8 + len(text) + position}


def read_header(path: Path) -> dict:
    """Name -> {"dtype", "shape", "data_offsets"}, and "__metadata__" where there is any, without the bytes."""
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]

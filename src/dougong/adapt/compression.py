"""compression.json: what a checkpoint's integers mean, in a format with a version; the checkpoint's manifest vouches
for it.

```
{"format": 1, "method": "rtn", "settings": {}, "bits_per_weight": 4.51,
 "parts": {"stack.0.attention.query": {"bits": 4, "group": 32, "activations": "float"}, …},
 "float": ["norm.weight", …],
 "source": {"run": "first", "step": 500, "weights": "ema", "fingerprint": "…"}}
```
The tensors of a part are `PART.values`, `PART.scale` and where it has one `PART.bias` (`nn/quantized.py` says what
values and scales are). What is in no part is in the file as it always is; `float` lists it. Kernels' layouts are
nowhere, so a file of any age opens on any machine: a change of meaning gets a new `format`, and the old one stays.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dougong.adapt.quantize import Form
from dougong.core.errors import CheckpointError
from dougong.core.files import sha256, write_json

FORMAT = 1
FILE = "compression.json"


@dataclass(frozen=True)
class Compression:
    """How a checkpoint's weights were made smaller."""

    method: str
    parts: Mapping[str, Form]
    source: Mapping[str, Any]
    """run (its name), step, weights (raw or ema), fingerprint of the float tensors"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """of the method"""
    bits_per_weight: float = 0.0
    kept: tuple[str, ...] = ()
    """tensors that stayed float"""

    def title(self) -> str:
        """In a few words: "int4 in groups of 32 (rtn), 4.51 bits a weight"."""
        forms = list(self.parts.values())
        most = max(set(forms), key=forms.count)
        group = f"groups of {most.group}" if most.group else "one scale a row"
        rounded = ", int8 activations" if most.activations == "int8" else ""
        return f"int{most.bits}, {group}{rounded} ({self.method}), {self.bits_per_weight:.2f} bits a weight"


def write_compression(directory: Path, compression: Compression) -> dict[str, Any]:
    """Writes the file beside a checkpoint's tensors; returns {"sha256", "bytes"} for its manifest."""
    path = directory / FILE
    write_json(path, {
        "format": FORMAT, "method": compression.method, "settings": dict(compression.settings),
        "bits_per_weight": round(compression.bits_per_weight, 4),
        "parts": {name: form.to_dict() for name, form in compression.parts.items()},
        "float": list(compression.kept), "source": dict(compression.source)})
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def read_compression(directory: Path) -> Compression | None:
    """None where the checkpoint's weights are floats. Raises CheckpointError for a format that this version does not
    know."""
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
        if found["format"] != FORMAT:
            raise CheckpointError(f"{path} is of format {found['format']}; this version reads {FORMAT}. Open it with a "
                                  "newer dougong.")
        return Compression(
            method=found["method"], parts={name: Form(**form) for name, form in found["parts"].items()},
            source=found["source"], settings=found["settings"], bits_per_weight=found["bits_per_weight"],
            kept=tuple(found["float"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not say how the weights are stored: {str(error) or type(error).__name__}."
                              " Make the compressed run anew.") from None

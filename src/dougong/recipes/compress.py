"""From a run to a run of integers: which matrices, by which method, and what is written down of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dougong.adapt import METHODS
from dougong.adapt.compression import FILE, Compression, write_compression
from dougong.adapt.quantize import (
    Form,
    bits_per_weight,
    integers_of,
    refuse_integers,
    remaining,
    round_to_nearest,
    take,
)
from dougong.core.errors import ConfigError
from dougong.core.run import RunDirectory
from dougong.nn.quantized import GROUP, Activations
from dougong.recipes.calibration import calibration
from dougong.recipes.made_run import fill, made_run, refuse_existing
from dougong.recipes.open_run import OpenRun
from dougong.recipes.start import fingerprint
from dougong.train.shadow import tracked

BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Compressed:
    """The run that was made, and what is worth knowing of it."""

    directory: RunDirectory
    compression: Compression
    bytes_before: int
    """of the weights as floats"""
    bytes_after: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"run": str(self.directory.path), "method": self.compression.method,
                "bits_per_weight": self.compression.bits_per_weight, "matrices": len(self.compression.parts),
                "bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "notes": list(self.notes)}


def form_for(to: str, *, group: int | None, activations: Activations) -> Form:
    """What `--to int8` means. `group` None: 32, or a whole row where activations are integers too; 0: a whole row."""
    if to not in BITS:
        raise ConfigError(f"--to {to} is not known. Known: {', '.join(BITS)}.")
    if group is None:
        group = GROUP if activations == "float" else 0
    if group < 0:
        raise ConfigError(f"--group {group}: columns that share a scale are counted from 1; 0 is a whole row.")
    return Form(BITS[to], group or None, activations)


def compress_run(opened: OpenRun, path: Path, form: Form, *, method: str = "rtn",
                 text: OpenRun | None = None) -> Compressed:
    """Writes the run, whole or not at all. The opened model is changed: its floats become integers. `text` is the run
    on other data (`on_data`), for methods that look at some.

    Raises ConfigError where something is at `path` already or nothing can be rounded.
    """
    refuse_existing(path, option="--out")
    model = opened.model
    source = {"run": opened.name, "step": opened.step, "weights": opened.weights,
              "fingerprint": fingerprint(tracked(model))}
    before = sum(tensor.numel() * tensor.element_size() for tensor in tracked(model).values())
    refuse_integers(model)
    find = METHODS[method]
    batches, counted = ((), ()) if find is round_to_nearest else calibration(text or opened)
    found = find(model, batches, bits=form.bits, group=form.group)
    take(model, found, form)
    notes, tensors = [*counted, *remaining(model)], tracked(model)
    integers = {name.removesuffix(".weight") for name in integers_of(model)}
    kept = tuple(name for name in tensors if name.rpartition(".")[0] not in integers)
    compression = Compression(method=method, parts=dict.fromkeys(found, form), source=source, kept=kept,
                              bits_per_weight=bits_per_weight(model))
    recorded = {**opened.recorded, "compressed": {**source, "method": method, "title": compression.title()}}
    with made_run(path) as run:
        after = fill(run, opened.recipe, recorded, tensors, reason="compress", tokenizer=opened.tokenizer,
                     step=opened.step, beside=lambda place: {FILE: write_compression(place, compression)})
    return Compressed(RunDirectory(path), compression, before, after, tuple(notes))

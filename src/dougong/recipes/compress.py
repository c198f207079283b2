"""From a run to a run of integers: which matrices, by which method, and what is written down of it."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dougong import __version__
from dougong.adapt import METHODS
from dougong.adapt.compression import FILE, Compression, write_compression
from dougong.adapt.quantize import (
    Form,
    bits_per_weight,
    fingerprint,
    integers_of,
    refuse_integers,
    remaining,
    round_to_nearest,
    take,
)
from dougong.core.config import dump_yaml
from dougong.core.errors import ConfigError
from dougong.core.events import EventLog
from dougong.core.files import explained_disk_errors, sha256, write_text
from dougong.core.run import RunDirectory
from dougong.models import count
from dougong.nn.quantized import GROUP, Activations
from dougong.recipes.calibration import calibration
from dougong.recipes.open_run import OpenRun
from dougong.runtime.device import machine_facts
from dougong.train.manifest import publish, temporary
from dougong.train.safetensors_file import write_tensors
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
    if path.exists():
        raise ConfigError(f"{path} exists already, and compressing overwrites nothing. Choose another --out.")
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
    place = path.with_name(f".{path.name}-compressing")
    with explained_disk_errors(f"the run {path}"):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            after = _write(RunDirectory(place), opened, compression, tensors)
            place.rename(path)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
    return Compressed(RunDirectory(path), compression, before, after, tuple(notes))


def _write(run: RunDirectory, opened: OpenRun, compression: Compression, tensors: dict[str, Tensor]) -> int:
    """The source's recipe and tokenizer, one checkpoint and its story; returns the bytes of the weights."""
    if opened.tokenizer is not None:
        opened.tokenizer.save(run.tokenizer)
    recorded = {**opened.recorded, "dougong": __version__, "torch": torch.__version__, "compressed": {
        **compression.source, "method": compression.method, "title": compression.title()}}
    write_text(run.recipe, dump_yaml(opened.recipe) + dump_yaml({"resolved": recorded}))
    place = temporary(run, opened.step)
    place.mkdir(parents=True)
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    written = {"model.safetensors": write_tensors(place / "model.safetensors", held),
               FILE: write_compression(place, compression)}
    publish(run, {"step": opened.step, "best": None}, written, recipe_hash=sha256(run.recipe), reason="compress")
    log = EventLog(run.events)
    log.write("start", step=opened.step, command=["dougong", *sys.argv[1:]],
              versions={"dougong": __version__, "torch": torch.__version__}, machine=machine_facts(torch.device("cpu")),
              precision=opened.recipe.runtime.precision, threads=opened.recipe.runtime.threads, compile=False,
              processes=1, resumed_from=None)
    log.write("model", parameters=count.parameters(opened.recipe.model), groups=[], flops_per_token=None)
    log.write("end", step=opened.step, reason="done", elapsed_s=0.0)
    log.close()
    return written["model.safetensors"]["bytes"]

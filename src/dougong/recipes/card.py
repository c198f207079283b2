"""The compression card: a model and what was made smaller of it, side by side in size, quality and speed.

Everything is measured here and now, on the same documents and in turns, since figures of other days and machines do
not compare. Bits per byte and calibration are of the whole split; the divergence is of its first documents.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch

from dougong.core.errors import CheckpointError, ConfigError, DougongError
from dougong.core.run import RunDirectory
from dougong.evaluate import bits_per_byte
from dougong.evaluate.agreement import agreement
from dougong.evaluate.bits_per_byte import BitsPerByte
from dougong.evaluate.calibration import Calibration
from dougong.evaluate.scores import NATS_PER_BIT
from dougong.evaluate.statistics import paired_difference
from dougong.generate.engine import Engine
from dougong.generate.sampling import SamplingConfig
from dougong.nn.moe import MoE
from dougong.plan.machine import here
from dougong.recipes.open_run import OpenRun, open_run
from dougong.recipes.recipe import recipe_from_run
from dougong.recipes.scoring import held_out_splits
from dougong.runtime.device import machine_facts
from dougong.train.shadow import tracked

Say = Callable[[str], None]
BATCHES = (1, 16)
_CLOSE_TOKENS, _SEVERAL = 1 << 15, 8
"""tokens on which the divergence is measured, and of how many documents at least, where they are short enough"""
_WORST, _LEAST_BYTES = 3, 256
"""documents named, and how long one must be for its bits per byte to say anything"""
_PROMPT, _WRITTEN, _ROUNDS = 16, 48, 5


def variants_of(path: Path) -> list[Path]:
    """Runs beside this one that were made smaller from it: rounded, pruned, trimmed, or trained on from such a run."""
    path = path.resolve()
    found = []
    for other in sorted(path.parent.glob("*/recipe.yaml")):
        chain = list(_ancestors(other.parent))
        if path in [one for one, _ in chain] and any(smaller for _, smaller in chain):
            found.append(other.parent)
    return found


def _ancestors(path: Path) -> Iterator[tuple[Path, bool]]:
    """What a run was made from, step by step, and whether that step made it smaller."""
    seen = {path.resolve()}
    while True:
        try:
            recipe, recorded = recipe_from_run(RunDirectory(path).recipe)
        except DougongError:
            return
        made = recorded.get("compressed") or recorded.get("smaller")
        if made:
            path = path.resolve().with_name(str(made["run"]))
        elif recipe.start is not None:
            path = Path(recipe.start.path)
        else:
            return
        path = (path.parent.parent if path.parent.name == "checkpoints" else path).resolve()
        if path in seen:
            return
        seen.add(path)
        yield path, bool(made) or getattr(recipe.adapt, "kind", None) == "qat"


def card(original: OpenRun, others: Sequence[Path], *, split: str | None = None, most_tokens: int = _CLOSE_TOKENS,
         rounds: int = _ROUNDS, say: Say = lambda text: None) -> dict[str, Any]:
    """The facts of the card, as JSON values; the first variant is the original. Raises ConfigError without a variant
    and CheckpointError for one that reads other data."""
    if original.tokenizer is None:
        raise ConfigError(f"{original.directory.path} holds no language model, and the card compares such only.")
    if not others:
        raise ConfigError(f"nothing beside {original.directory.path} was made from it. Make something smaller first:\n"
                          f"  dougong compress {quote(str(original.directory.path))} --to int4\n"
                          "or name runs with --with.")
    split = split or (original.recipe.evaluate.split if original.recipe.evaluate.split in
                      held_out_splits(original.corpus) else "validation")
    if not hasattr(original.corpus, "documents"):
        raise ConfigError(f"{original.directory.path} was trained on {original.recipe.data.kind}, and the card scores "
                          "text. Name some: --data FOLDER.")
    documents = list(original.corpus.documents(split))
    close = _some(documents, original.tokenizer, most_tokens)
    models = [original, *(open_run(path) for path in others)]
    rows: list[dict[str, Any]] = []
    scores: list[BitsPerByte] = []
    for opened in models:
        name = opened.name
        say(f"scoring {name}")
        sure = Calibration()
        scores.append(bits_per_byte(opened.model, opened.tokenizer, documents, context=opened.recipe.model.context,
                                    runtime=opened.runtime, name=name, calibration=sure))
        rows.append({"name": name, "what": _what(opened), **_sizes(opened), **_quality(scores[0], scores[-1]),
                     **_closeness(original, opened, close), "calibration_error": sure.error, "brier": sure.brier})
    say("measuring how fast each writes")
    for row, speeds in zip(rows, _speeds(models, documents, rounds)):
        row["tokens_per_s"] = {str(batch): values for batch, values in speeds.items()}
    bandwidth = here().memory_bytes_per_s
    for row, opened in zip(rows, models):
        row["bandwidth_share"] = row["tokens_per_s"]["1"]["median"] * _read_bytes(opened) / bandwidth
    for row, best in zip(rows, pareto(rows)):
        row["front"] = best
    return {"run": original.name, "split": split, "documents": len(documents),
            "tokens": int(scores[0].tokens.sum()), "bytes": int(scores[0].bytes.sum()), "close_documents": len(close),
            "machine": machine_facts(original.runtime.device), "threads": torch.get_num_threads(),
            "bandwidth_bytes_per_s": bandwidth, "written_tokens": _WRITTEN, "variants": rows}


def pareto(rows: Sequence[dict[str, Any]]) -> list[bool]:
    """Which variants no other is at least as small, as good and as fast as, and better in one of the three."""
    points = [(row["memory_bytes"], row["bits_per_byte"], -row["tokens_per_s"]["1"]["median"]) for row in rows]
    return [not any(all(a <= b for a, b in zip(other, point)) and other != point for other in points)
            for point in points]


def _some(documents: Sequence[Any], tokenizer: Any, most_tokens: int) -> list[Any]:
    """Documents until they hold so many tokens: from the beginning, but those first that are short enough for there to
    be several."""
    lengths = [len(tokenizer.encode(document.text)) for document in documents]
    chosen, held = [], 0
    for number in sorted(range(len(documents)), key=lambda i: _SEVERAL * lengths[i] > most_tokens):
        chosen.append(documents[number])
        held += lengths[number]
        if held >= most_tokens:
            break
    return chosen


def _what(opened: OpenRun) -> dict[str, Any]:
    """How it was made, for the page to say in its languages."""
    compression, smaller = opened.compression, opened.recorded.get("smaller")
    trained_for_it = getattr(opened.recipe.adapt, "kind", None) == "qat"
    made: dict[str, Any] = {"trained_on": opened.recipe.start is not None}
    if compression is not None:
        made["trained_on"] = trained_for_it
        most = max(compression.parts.values(), key=list(compression.parts.values()).count)
        made |= {"kind": "integers", "bits": most.bits, "group": most.group, "method": compression.method,
                 "activations": most.activations}
    elif smaller:
        made |= {"kind": smaller["how"]}
    elif trained_for_it:
        made |= {"kind": "qat", "bits": opened.recipe.adapt.bits}
    else:
        made |= {"kind": "whole"}
    return made


def _sizes(opened: OpenRun) -> dict[str, Any]:
    """Bytes of the file that holds the weights, and of the weights in memory; parameters as of the config. An adapter's
    file holds no model: what it is merged into counts."""
    from dougong.models import count

    name = "shadow" if opened.weights == "ema" and opened.compression is None else "model"
    file = opened.directory.checkpoint(opened.step) / f"{name}.safetensors"
    memory = sum(tensor.numel() * tensor.element_size() for tensor in tracked(opened.model).values())
    alone = opened.recipe.adapter is not None and opened.compression is None
    disk = file.stat().st_size if file.is_file() and not alone else memory
    parameters = count.parameters(opened.recipe.model)["total"]
    return {"parameters": parameters, "disk_bytes": disk, "memory_bytes": memory,
            "bits_per_weight": 8 * memory / parameters}


def _quality(original: BitsPerByte, variant: BitsPerByte) -> dict[str, Any]:
    """Bits per byte, and how many more than the original's, in pairs of documents."""
    if original.ids != variant.ids or not np.array_equal(original.bytes, variant.bytes):
        raise CheckpointError(f"{variant.name} was not scored on the documents of {original.name}.")
    difference, interval = paired_difference(variant, original)
    per_byte = (variant.nats - original.nats) / NATS_PER_BIT / np.maximum(original.bytes, 1)
    long = np.flatnonzero(original.bytes >= min(_LEAST_BYTES, original.bytes.max()))
    worst = long[np.argsort(-per_byte[long], kind="stable")][:_WORST]
    return {"bits_per_byte": variant.bits_per_byte, "interval": _list(variant.interval()), "difference": difference,
            "difference_interval": _list(interval), "relative": difference / original.bits_per_byte,
            "lossy": variant.lossy,
            "worst": [{"id": variant.ids[i], "bytes": int(original.bytes[i]),
                       "before": float(original.nats[i] / NATS_PER_BIT / original.bytes[i]),
                       "after": float(variant.nats[i] / NATS_PER_BIT / original.bytes[i])} for i in worst]}


def _closeness(original: OpenRun, variant: OpenRun, documents: Sequence[Any]) -> dict[str, Any]:
    """Divergence from the original; None where the tokens are others."""
    if variant.tokenizer.fingerprint != original.tokenizer.fingerprint:
        return {"kl_mean": None, "kl_p99": None, "top1_agreement": None}
    return agreement(original.model, variant.model, original.tokenizer, documents,
                     context=original.recipe.model.context, runtime=original.runtime).payload()


def _read_bytes(opened: OpenRun) -> int:
    """Bytes of weights that each new token reads: all but tables of which it looks up a row, and experts that it does
    not visit."""
    tensors = tracked(opened.model)
    tied = not any(name.startswith("head.") for name in tensors)
    visited = {f"{name}.experts.": part.top_k / part.section.num_experts
               for name, part in opened.model.named_modules() if isinstance(part, MoE)}
    read = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()
            if not (name.startswith("stem.values.") or (name.startswith("stem.tokens.") and not tied))}
    return round(sum(size * next((share for stack, share in visited.items() if name.startswith(stack)), 1)
                     for name, size in read.items()))


@torch.inference_mode()
def _speeds(models: Sequence[OpenRun], documents: Sequence[Any], rounds: int) -> list[dict[int, dict[str, float]]]:
    """Tokens per second of each at each batch: prompts read and tokens written, in turns so that a machine that slows
    down slows all; the median, the lowest and the highest round. One round before is not counted."""
    engines = [(Engine(opened.model, opened.runtime), _prompts(opened, documents)) for opened in models]
    found: list[dict[int, list[float]]] = [{batch: [] for batch in BATCHES} for _ in models]
    for turn in range(-1, rounds):
        for place, (engine, prompts) in enumerate(engines):
            for batch in BATCHES:
                begin = time.perf_counter()
                written = sum(len(step) for step in engine.start(
                    prompts[:batch], SamplingConfig(temperature=0, max_tokens=_WRITTEN)))
                if turn >= 0:
                    found[place][batch].append(written / (time.perf_counter() - begin))
    return [{batch: {"median": statistics.median(values), "min": min(values), "max": max(values)}
             for batch, values in one.items()} for one in found]


def _prompts(opened: OpenRun, documents: Sequence[Any]) -> list[list[int]]:
    """The same beginnings of documents for all, by each one's tokenizer."""
    first = [] if opened.tokenizer.begin_id is None else [opened.tokenizer.begin_id]
    texts = [documents[i % len(documents)].text for i in range(max(BATCHES))]
    prompts = [[*first, *opened.tokenizer.encode(text[:400])[:_PROMPT].tolist()] or [0] for text in texts]
    least = min(map(len, prompts))
    return [prompt[:least] for prompt in prompts]


def _list(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)

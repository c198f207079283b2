"""What a path holds: a run, a checkpoint, a Hugging Face directory, a GGUF, an ONNX or a safetensors file.

What the files claim (family, shapes, types), and what is wrong with them. Weights are not loaded.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import yaml

from dougong.core.errors import CheckpointError, DougongError
from dougong.core.events import read_events
from dougong.core.run import RunDirectory
from dougong.data.tokenizer import Tokenizer
from dougong.interop.gguf_file import read_gguf
from dougong.interop.import_hf import family_of, is_hf_directory, read_config, read_tokenizer
from dougong.interop.onnx_file import MODEL, read_onnx
from dougong.interop.tensor_files import headers, read_header
from dougong.train.checkpoint import problems
from dougong.train.manifest import read_manifest
from dougong.train.parts import Stored
from dougong.train.safetensors_file import TYPES

_MANY = 64     # metadata lists longer than this are counted, not shown


@dataclass(frozen=True)
class Entry:
    """One tensor as a header describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


def inspect_path(path: Path) -> dict[str, Any]:
    """JSON values: `kind`, `path`, `facts`, `parts` and `problems`. Raises CheckpointError where nothing known is
    there, or a file cannot be read at all."""
    if path.suffix == ".gguf":
        return _gguf(path)
    if path.suffix == ".onnx" or (path / MODEL).is_file():
        return _onnx(path if path.suffix == ".onnx" else path / MODEL)
    if path.suffix == ".safetensors":
        entries = _entries(read_header(path))
        return _answer("safetensors file", path, {"bytes": path.stat().st_size}, entries, [])
    if (path / "recipe.yaml").is_file():
        return _run(path)
    if (path / "manifest.json").is_file() or (path.name.startswith("step-") and path.is_dir()):
        return _checkpoint(path)
    if is_hf_directory(path):
        return _hugging_face(path)
    there = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "nothing" if path.is_dir() else \
        "a file of another kind" if path.exists() else "nothing"
    raise CheckpointError(f"{path} holds no run (recipe.yaml), checkpoint (manifest.json), Hugging Face model "
                          f"(config.json), .gguf, .onnx or .safetensors file. There is: {there}.")


def _run(path: Path) -> dict[str, Any]:
    run = RunDirectory(path)
    try:
        recipe = yaml.safe_load(run.recipe.read_text("utf-8"))
        family = recipe["model"]["kind"]
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{run.recipe} is no whole recipe: {str(error).splitlines()[0]}.") from None
    events = {event["event"]: event for event in read_events(run.events)}     # the last of each kind
    result = events.get("result", {})
    steps = run.checkpoint_steps()
    found = [(step, problems(run.checkpoint(step))) for step in steps]
    whole = [step for step, wrong in found if not wrong]
    resolved = recipe.get("resolved") or {}
    facts = {"family": family, "model": recipe["model"], "imported": resolved.get("imported"),
             "compressed": resolved.get("compressed"), "adapter": _adapter(recipe),
             "ended": events.get("end", {}).get("reason"), "checkpoints": steps, "valid_checkpoints": whole,
             "tokenizer": _tokenizer_facts(lambda: Tokenizer.load(run.tokenizer)) if run.tokenizer.is_dir() else None,
             "data": _data_facts(events.get("data", {}).get("facts", {})),
             "result": {key: result[key] for key in ("split", "bits_per_byte", "interval", "accuracy", "loss", "step")
                        if key in result},
             "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file())}
    entries = _model_entries(run.checkpoint(whole[-1])) if whole else []
    wrong = [text for _, texts in found for text in texts] + ([] if steps else ["no checkpoint yet"])
    return _answer("run", path, facts, entries, wrong)


def _adapter(recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the run's checkpoints hold in place of a model, and the model that it belongs to."""
    adapt, start = recipe.get("adapt"), recipe.get("start")
    if not adapt or not start or "rank" not in adapt:
        return None
    return {key: adapt.get(key) for key in ("kind", "rank", "alpha", "base")} | {"of": start["path"]}


def _checkpoint(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    facts = {"step": manifest.get("step"), "reason": manifest.get("reason"), "loss": manifest.get("loss"),
             "versions": manifest.get("versions"),
             "files": {name: file["bytes"] for name, file in manifest.get("files", {}).items()},
             "bytes": sum(file.stat().st_size for file in path.iterdir())}
    wrong = problems(path)
    try:
        entries = _model_entries(path)
    except CheckpointError as error:
        entries = []
        wrong.append(str(error))
    return _answer("checkpoint", path, facts, entries, wrong)


def _model_entries(path: Path) -> list[Entry]:
    for file in path.glob("model*.safetensors"):
        read_header(file)
    stored = Stored(path, "model")
    return [Entry(name, tuple(shape), _short(stored._types[name]), prod(shape) * stored._types[name].itemsize)
            for name, shape in stored.items()]


def _short(dtype: Any) -> str:
    return next(name for name, known in TYPES.items() if known == dtype)


def _hugging_face(path: Path) -> dict[str, Any]:
    given = read_config(path)
    wrong = []
    for check in (lambda: family_of(path, given), lambda: read_tokenizer(path, given)):
        try:
            check()
        except DougongError as error:
            wrong.append(str(error).splitlines()[0])
    try:
        entries = _entries({name: entry for held in headers(path).values() for name, entry in held.items()})
    except DougongError as error:
        entries = []
        wrong.append(str(error).splitlines()[0])
    facts = {"family": given.get("model_type"), "architectures": given.get("architectures"), "config": given,
             "tokenizer": _tokenizer_facts(lambda: read_tokenizer(path, given)),
             "bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file())}
    return _answer("Hugging Face model", path, facts, entries, wrong)


def _gguf(path: Path) -> dict[str, Any]:
    fields, tensors = read_gguf(path)
    keys = {key: value if not isinstance(value, list) or len(value) <= _MANY else f"{len(value):,} values"
            for key, value in fields.items()}
    tokens = fields.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    facts = {"family": fields.get("general.architecture"), "metadata": keys, "bytes": path.stat().st_size,
             "tokenizer": {"kind": fields.get("tokenizer.ggml.model"), "vocab_size": len(tokens),
                           "pre_tokenizer": fields.get("tokenizer.ggml.pre"),
                           "document_id": fields.get("tokenizer.ggml.eos_token_id")} if tokens else None}
    entries = [Entry(name, tuple(int(n) for n in reversed(t.shape.tolist())), t.tensor_type.name, int(t.n_bytes))
               for name, t in tensors.items()]
    return _answer("GGUF file", path, facts, entries, [])


def _onnx(path: Path) -> dict[str, Any]:
    found = read_onnx(path)
    facts = {"family": found.metadata.get("dougong.family"), "opset": found.opset, "inputs": found.inputs,
             "outputs": found.outputs, "metadata": found.metadata, "bytes": found.bytes,
             "tokenizer": _tokenizer_facts(lambda: Tokenizer.load(path.parent))
             if (path.parent / "tokenizer.json").is_file() else None}
    entries = [Entry(name, shape, kind, size) for name, (shape, kind, size) in found.tensors.items()]
    return _answer("ONNX model", path, facts, entries, found.problems)


def _answer(kind: str, path: Path, facts: Mapping[str, Any], entries: Iterable[Entry],
            wrong: list[str]) -> dict[str, Any]:
    entries = list(entries)
    facts = {**facts, "parameters": sum(prod(entry.shape) for entry in entries),
             "dtypes": sorted({entry.dtype for entry in entries})}
    return json.loads(json.dumps({"kind": kind, "path": str(path), "facts": facts, "parts": parts(entries),
                                  "problems": wrong}, default=str))


def parts(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Tensors that differ only in their numbers (of layer, of expert) counted together, in the order of the file."""
    found: dict[tuple, dict[str, Any]] = {}
    for entry in entries:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", entry.name)
        part = found.setdefault((name, entry.shape, entry.dtype), {
            "part": name, "shape": list(entry.shape), "dtype": entry.dtype, "tensors": 0, "parameters": 0, "bytes": 0})
        part["tensors"] += 1
        part["parameters"] += prod(entry.shape)
        part["bytes"] += entry.bytes
    return list(found.values())


def _entries(header: Mapping[str, Mapping[str, Any]]) -> list[Entry]:
    return [Entry(name, tuple(e["shape"]), e["dtype"], e["data_offsets"][1] - e["data_offsets"][0])
            for name, e in header.items()]


def _tokenizer_facts(load: Any) -> dict[str, Any] | None:
    try:
        tokenizer: Tokenizer = load()
    except DougongError:
        return None
    return {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "pre_tokenizer": tokenizer.pre_tokenizer,
            "document_id": tokenizer.document_id, "chat_template": tokenizer.chat_template is not None,
            "fingerprint": tokenizer.fingerprint}


def _data_facts(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    if not facts:
        return None
    return {"fingerprint": facts.get("fingerprint"), "splits": {
        name: {key: split[key] for key in ("documents", "bytes", "tokens", "rows") if key in split}
        for name, split in (facts.get("splits") or {}).items()}}

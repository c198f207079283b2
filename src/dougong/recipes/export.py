"""From a run to a form that other programs read: what the formats need to know of a run, and the order of things.

Written beside its place under a name with a dot, read back by another program, and given its name only then.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dougong import __version__
from dougong.adapt.quantize import Form, dequantised, integers_of
from dougong.core.config import dump_yaml, to_dict
from dougong.core.errors import ConfigError, DougongError
from dougong.core.events import read_events
from dougong.core.files import explained_disk_errors, sync_directory
from dougong.interop.export_hf import rounded, verify_hf, write_hf
from dougong.interop.export_onnx import settings, verify_onnx, write_onnx_directory
from dougong.interop.gguf_file import vocabulary, write_gguf, write_modelfile
from dougong.interop.gguf_form import gguf_form
from dougong.interop.gguf_verify import verify_gguf
from dougong.interop.hub import is_hub_name
from dougong.interop.model_card import CardFacts, model_card
from dougong.interop.published import published_form
from dougong.interop.tensor_files import SHARD_BYTES
from dougong.interop.verify import Verified
from dougong.models import count
from dougong.nn.quantized import Quantized
from dougong.recipes.open_run import OpenRun
from dougong.train.shadow import tracked

_TEXTS, _TEXT_CHARACTERS = 16, 2000
_PUBLISHED_SECTIONS = ("name", "seed", "size", "tokenizer", "model", "objective", "optim", "schedule", "train")
_DTYPE_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True)
class Exported:
    """What was written, and what the independent reader found (None: it was not asked)."""

    path: Path
    format: str
    dtype: str
    files: dict[str, int]
    """name -> bytes"""
    verified: Verified | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "format": self.format, "dtype": self.dtype, "files": self.files,
                "bytes": sum(self.files.values()), "verified": to_dict(self.verified) if self.verified else None,
                "notes": list(self.notes)}


def export_hf(opened: OpenRun, out: Path, *, dtype: str | None = None, verify: bool = True, license: str = "unknown",
              shard_bytes: int = SHARD_BYTES) -> Exported:
    """A directory for transformers. `dtype` None: that of the model it was imported from, else f32.

    Raises ConfigError for what the format cannot hold, Mismatch (and leaves nothing) where the reader disagrees.
    """
    family, config = published_form(refuse_without_tokens(opened).model)
    opened, _ = in_floats(opened)
    dtype = dtype or stored_dtype(opened)
    state = tracked(opened.model)
    card = model_card(card_facts(opened, family.architecture, dtype, license))

    def write(place: Path) -> Verified | None:
        write_hf(place, family, config, state, opened.tokenizer, dtype=dtype, card=card, shard_bytes=shard_bytes)
        return verify_hf(place, opened.model, opened.tokenizer, held_out_texts(opened), dtype=dtype) if verify else None

    verified = published_whole(out, write)
    notes = _notes(opened, dtype, state)
    if opened.compression:
        notes = (f"the run's weights are {opened.compression.title()}; this directory holds the floats that they stand "
                 "for, since transformers has no such form.", *notes)
    return Exported(out, "hf", dtype, sizes_of(out), verified, notes)


def export_onnx(opened: OpenRun, out: Path, *, dtype: str = "f32", verify: bool = True,
                license: str = "unknown") -> Exported:
    """A directory for onnxruntime and what builds on it: the graph, its weights, and the tokenizer.

    Raises ConfigError for what is no decoder, Mismatch (and leaves nothing) where the reader disagrees.
    """
    kind = refuse_without_tokens(opened).model.kind
    architecture = next(iter(settings(opened.model.config)["architectures"]), kind)
    card = model_card(replace(card_facts(opened, architecture, dtype, license), library="onnx"))
    opened, _ = in_floats(opened)
    about = {"dougong.version": __version__, "dougong.family": kind, "dougong.step": str(opened.step)}

    def write(place: Path) -> Verified | None:
        write_onnx_directory(place, opened.model, opened.tokenizer, dtype=dtype, card=card, about=about)
        return verify_onnx(place, opened.model, opened.tokenizer, held_out_texts(opened), dtype=dtype) \
            if verify else None

    verified = published_whole(out, write)
    notes = _notes(opened, dtype, tracked(opened.model))
    if architecture == kind:
        notes += (f"{kind} is no published family: onnxruntime runs the graph, and libraries that ask for a family's "
                  "name (transformers, optimum) do not know it.",)
    return Exported(out, "onnx", dtype, sizes_of(out), verified, notes)


def export_gguf(opened: OpenRun, out: Path, *, quant: str | None = None, verify: bool = True,
                license: str = "unknown") -> Exported:
    """A directory with one GGUF file for llama.cpp and its relatives, and a `Modelfile` for Ollama. `quant` None: f32,
    or the type that holds a compressed run's integers as they are.

    Raises ConfigError for what the format cannot hold, Mismatch (and leaves nothing) where a reader disagrees.
    """
    family, config = published_form(refuse_without_tokens(opened).model)
    form = gguf_form(family, config)
    opened, integers = in_floats(opened)
    quant = quant or _type_of_integers(opened) or "f32"
    words = vocabulary(opened.tokenizer, config.vocab_size)
    state = tracked(opened.model)
    name = opened.name
    file = f"{name}-{quant}.gguf"
    notes = []

    def write(place: Path) -> Verified | None:
        types = write_gguf(place / file, form, rounded(state, "f32"), words, quant=quant, name=name, license=license,
                           integers=integers)
        write_modelfile(place / "Modelfile", file, context=config.context, words=words)
        odd = [key for key, kind in types.items() if quant.startswith("q") and kind == "f16"]
        if odd:
            notes.append(f"{len(odd)} tensors are f16, as blocks of 32 do not divide their rows ({odd[0]}).")
        if opened.tokenizer.normalizes:
            notes.append("llama.cpp does not normalise text first, as this tokenizer does: text that is not composed "
                         "(NFC) is read otherwise there.")
        if not verify:
            return None
        found, divergence = verify_gguf(place / file, form, opened.model, opened.tokenizer, held_out_texts(opened),
                                        family.config_to_hf(config))
        if opened.compression and quant == _type_of_integers(opened):
            notes.append(f"the integers of {len(integers)} matrices are the run's own.")
        elif quant != "f32":
            notes.append(f"rounding to {quant} costs {divergence:.2e} nats a token (mean Kullback-Leibler divergence).")
        return found

    verified = published_whole(out, write)
    return Exported(out, "gguf", quant, sizes_of(out), verified, tuple(notes))


def in_floats(opened: OpenRun) -> tuple[OpenRun, dict[str, Quantized]]:
    """The run with a model of floats, which the formats and their readers know; and the integers that it had."""
    if opened.compression is None:
        return opened, {}
    return replace(opened, model=dequantised(opened.model)), integers_of(opened.model)


def _type_of_integers(opened: OpenRun) -> str | None:
    """q8_0 or q4_0, where one of them is how all the run's matrices are stored."""
    forms = set(opened.compression.parts.values()) if opened.compression else set()
    return {Form(8): "q8_0", Form(4): "q4_0"}.get(forms.pop()) if len(forms) == 1 else None


def published_whole(out: Path, write: Callable[[Path], Any]) -> Any:
    """Lets `write` fill a directory that gets the name `out` only if nothing was raised; returns what it returned."""
    _refuse_taken(out)
    with explained_disk_errors(f"the export {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as aside:
            place = Path(aside) / out.name
            place.mkdir()
            result = write(place)
            _refuse_taken(out)      # another export may have been quicker
            os.replace(place, out)
            sync_directory(out.parent)
    return result


def _refuse_taken(out: Path) -> None:
    if out.resolve() == Path.cwd():
        raise ConfigError(f"--out {out} is the folder you are in, and an export makes a new one. Name it: --out NAME.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already, and an export overwrites nothing. Choose another --out, or "
                          "remove it.")


def sizes_of(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir())}


def refuse_without_tokens(opened: OpenRun) -> Any:
    """The recipe of a language model. Raises ConfigError for other runs, and where what was trained is no language
    model's head."""
    if opened.tokenizer is None:
        raise ConfigError(f"{opened.directory.path} holds no language model (model.kind={opened.recipe.model.kind}), "
                          "and the formats here hold nothing else. Its weights are safetensors already: "
                          f"{opened.directory.checkpoints}.")
    if getattr(opened.recipe.objective, "value_outputs", None):
        raise ConfigError(f"{opened.directory.path} was trained with objective.kind={opened.recipe.objective.kind}: it "
                          "learned a head that gives numbers, for which the formats here have no place. Use the run "
                          "itself, with objective.reward=model:RUN or dougong eval. Its weights are safetensors "
                          f"already: {opened.directory.checkpoints}.")
    return opened.recipe


def stored_dtype(opened: OpenRun) -> str:
    """The type an imported model came in, so that it leaves as it came; else f32, in which all training happens."""
    return _DTYPE_NAMES.get((opened.recorded.get("imported") or {}).get("dtype", ""), "f32")


def held_out_texts(opened: OpenRun) -> list[str]:
    """Beginnings of held-out documents to compare on; none where the data are gone or are judgements, and unusual
    strings remain."""
    texts = list(opened.recipe.sample.prompts)
    try:
        documents = getattr(opened.corpus, "documents", lambda _split: [])
        view = next((v for v in map(documents, ("test", "validation", "train")) if len(v)), [])
    except DougongError:
        return texts
    step = max(1, len(view) // _TEXTS)
    return texts + [view[i].text[:_TEXT_CHARACTERS] for i in range(0, len(view), step)][:_TEXTS]


def card_facts(opened: OpenRun, architecture: str, dtype: str, license: str) -> CardFacts:
    """What the run recorded, as the card tells it."""
    events = read_events(opened.directory.events)
    steps = [event for event in events if event["event"] == "step" and event.get("step", 0) <= opened.step]
    imported, begin = opened.recorded.get("imported") or {}, opened.tokenizer.begin_id
    end = opened.tokenizer.document_id
    return CardFacts(
        name=opened.name, architecture=architecture, dtype=dtype, license=license,
        parameters=count.parameters(opened.recipe.model)["total"], context=opened.recipe.model.context,
        step=opened.step, version=__version__,
        recipe="" if imported else _recipe_text(opened),
        data=_last(events, "data").get("facts", {}), result=_last(events, "result"),
        tokens=steps[-1].get("tokens") if steps else None,
        imported_from=_without_place(imported["from"]) if imported else None,
        begun_from=_without_place(opened.recipe.start.path) if opened.recipe.start else None,
        begins_with=None if begin is None else opened.tokenizer.backend.id_to_token(begin),
        ends_with=None if end is None else opened.tokenizer.backend.id_to_token(end),
        chat=opened.tokenizer.chat_template is not None,
        rounding="" if dtype in ("f32", stored_dtype(opened)) else f" The weights were rounded to {dtype} from f32.")


def _recipe_text(opened: OpenRun) -> str:
    """The recipe without what is about this machine: a card is published, and paths name people."""
    values = to_dict(opened.recipe)
    for section, key in (("tokenizer", "path"), ("objective", "teacher"), ("objective", "reward")):
        if given := values[section].get(key):
            values[section][key] = _without_place(given)
    return dump_yaml({key: values[key] for key in _PUBLISHED_SECTIONS})


def _without_place(name: str) -> str:
    """A model, a file or a reward by its name alone; a name on a hub is one."""
    kind, _, rest = name.partition(":")
    if kind == "model":
        return f"model:{_without_place(rest)}"
    return name if is_hub_name(name) or kind == "regex" else Path(name).name


def _notes(opened: OpenRun, dtype: str, state: Any) -> tuple[str, ...]:
    if dtype == "f32":
        return ()
    stored = rounded(state, dtype)
    largest = max(((stored[name].float() - t.float()).abs().max() / t.abs().max().clamp(min=1e-30)).item()
                  for name, t in state.items())
    return () if largest == 0 else (
        f"rounded to {dtype}: a weight moved by at most {largest:.1e} of the largest of its tensor.",)


def _last(events: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next((event for event in reversed(events) if event["event"] == kind), {})

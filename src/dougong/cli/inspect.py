"""`dougong inspect`: what a path holds, and what is wrong with it."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from dougong.cli.output import Json, console, emit


def inspect(
    path: Annotated[Path, typer.Argument(help="A run, a checkpoint, a Hugging Face directory, a .gguf, "
                                              ".onnx or .safetensors file.")],
    as_json: Json = False,
) -> None:
    """Say what a run or a model's files hold; exit code 1 where something in them is damaged."""
    from dougong.interop.inspect import inspect_path

    found = inspect_path(path)
    _show(found, console(as_json))
    emit(found, as_json)
    if found["problems"]:
        raise typer.Exit(1)


def _show(found: dict[str, Any], out: Any) -> None:
    from rich.markup import escape
    from rich.table import Table as Grid

    facts = found["facts"]
    out.print(f"{found['kind']} {found['path']}", style="bold", markup=False)
    for label, text in _lines(facts):
        out.print(f"  {label:<14}{text}", markup=False)
    grid = Grid("part", "shape", "type", box=None, header_style="bold", pad_edge=False)
    for title in ("tensors", "parameters", "bytes"):
        grid.add_column(title, justify="right")
    for part in found["parts"]:
        grid.add_row(escape(part["part"]), " × ".join(map(str, part["shape"])), part["dtype"], f"{part['tensors']:,}",
                     f"{part['parameters']:,}", f"{part['bytes']:,}")
    if found["parts"]:
        out.print(grid)
    for problem in found["problems"]:
        out.print(f"problem: {problem}", style="red", markup=False)


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [("family", facts["family"])] if facts.get("family") else []
    if facts.get("step") is not None:
        lines.append(("step", f"{facts['step']:,} (saved as {facts['reason']})"))
    lines.append(("parameters", f"{facts['parameters']:,} ({', '.join(facts['dtypes']) or 'none found'})"))
    lines.append(("on disk", f"{facts['bytes']:,} bytes"))
    for label in ("inputs", "outputs"):
        lines += [(label, text) for text in _ports(facts.get(label) or {})]
    if tokenizer := facts.get("tokenizer"):
        pre = f", cut by {tokenizer['pre_tokenizer']}" if tokenizer.get("pre_tokenizer") else ""
        lines.append(("tokenizer", f"{tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens{pre}; a text ends with "
                                   f"token {tokenizer['document_id']}"))
    for name, split in ((facts.get("data") or {}).get("splits") or {}).items():
        lines.append((name, ", ".join(f"{value:,} {key}" for key, value in split.items())))
    result = facts.get("result") or {}
    if result.get("bits_per_byte") is not None:
        lines.append(("result", f"{result['bits_per_byte']:.4f} bits per byte on the {result['split']} split"))
    if adapter := facts.get("adapter"):
        held = "" if adapter["base"] == "float" else f" over {adapter['base']}"
        lines.append(("adapter", f"{adapter['kind']}, rank {adapter['rank']}, alpha {adapter['alpha']:g}{held}; the "
                                 f"model it belongs to: {adapter['of']}"))
    if facts.get("imported"):
        lines.append(("imported", f"from {facts['imported']['from']}, {facts['imported']['dtype']}"))
    if facts.get("compressed"):
        lines.append(("compressed", f"{facts['compressed']['title']}, from {facts['compressed']['run']}, step "
                                    f"{facts['compressed']['step']:,}"))
    if "valid_checkpoints" in facts:
        lines.append(("checkpoints", f"{len(facts['checkpoints'])}, of which pass all checks: "
                                     f"{', '.join(map(str, facts['valid_checkpoints'])) or 'none'}"))
    return lines


def _ports(values: dict[str, str]) -> list[str]:
    """Inputs or outputs of a graph, those that differ only in the number of their layer told once."""
    found: dict[tuple[str, str], int] = {}
    for name, kind in values.items():
        key = re.sub(r"\.\d+\.", ".*.", name), kind
        found[key] = found.get(key, 0) + 1
    return [f"{name} {kind}" + (f", {count:,} of them" if count > 1 else "") for (name, kind), count in found.items()]

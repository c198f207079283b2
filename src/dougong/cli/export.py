"""`dougong export`: a run as files that other programs read, read back by one of them before they get their name."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dougong.cli.output import Json, console, emit, tell_passed_over


def export(
    run: Annotated[Path, typer.Argument(help="A run, one of its checkpoints, or a Hugging Face directory.")],
    to: Annotated[Literal["hf", "gguf", "onnx", "peft"], typer.Option(
        "--to", help="hf: a directory for transformers; gguf: a file for llama.cpp and Ollama; onnx: a directory for "
                     "onnxruntime; peft: the adapter alone.")] = "hf",
    out: Annotated[Path | None, typer.Option(
        "--out", "-o", help="Where; default: beside the run, RUN-hf, RUN-onnx, RUN-peft, RUN-gguf, or with --quant RUN "
                            "and that type, such as RUN-q8_0.")] = None,
    dtype: Annotated[Literal["f32", "bf16", "f16"] | None, typer.Option(
        "--dtype", help="Type of the weights in hf and onnx; default: f32, in hf that of an imported model.")] = None,
    quant: Annotated[Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] | None, typer.Option(
        "--quant", help="Type of the weights in gguf; default: f32, or that of a compressed run.")] = None,
    license: Annotated[str, typer.Option("--license", help="For the model card, such as apache-2.0.")] = "unknown",
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not read back what was written.")] = False,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="best, last, or a step.")] = "best",
    as_json: Json = False,
) -> None:
    """Write a run's model for other programs, and check that they compute the same."""
    from dougong.core.errors import ConfigError
    from dougong.recipes.adapters import export_peft
    from dougong.recipes.export import export_gguf, export_hf, export_onnx
    from dougong.recipes.open_run import open_run

    if to == "peft" and (dtype or quant or license != "unknown"):
        raise ConfigError("--dtype, --quant and --license have no effect with --to peft: an adapter is written in f32. "
                          "Leave them out.")
    if (other := dtype if to == "gguf" else quant) is not None:
        raise ConfigError(f"{'--dtype' if to == 'gguf' else '--quant'} {other} has no effect with --to {to}. Use "
                          f"{'--quant' if to == 'gguf' else '--dtype'}.")
    opened = open_run(run, checkpoint=checkpoint, merge=to != "peft")
    tell_passed_over(opened)
    place = out or opened.beside(quant or to)
    common: dict[str, Any] = {"verify": not no_verify, "license": license}
    exported = {"hf": lambda: export_hf(opened, place, dtype=dtype, **common),
                "gguf": lambda: export_gguf(opened, place, quant=quant, **common),
                "onnx": lambda: export_onnx(opened, place, dtype=dtype or "f32", **common),
                "peft": lambda: export_peft(opened, place, verify=not no_verify)}[to]()
    screen = console(as_json)
    for name, size in exported.files.items():
        screen.print(f"  {name:<36}{size:>16,} bytes", style="dim", markup=False)
    for note in exported.notes:
        screen.print(note, markup=False)
    screen.print(exported.verified.sentence() if exported.verified else "not verified (--no-verify).", markup=False)
    screen.print(f"written: {exported.path}", style="bold", markup=False)
    emit(exported.to_dict(), as_json)

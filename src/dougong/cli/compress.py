"""`dougong compress`: a run whose weights are integers of 8 or 4 bits."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dougong.cli.output import Json, console, emit, tell_passed_over


def compress(
    run: Annotated[Path, typer.Argument(help="A run, one of its checkpoints, or a Hugging Face directory.")],
    to: Annotated[Literal["int8", "int4"], typer.Option("--to", help="Bits of a weight.")] = "int8",
    group: Annotated[int | None, typer.Option(
        "--group", min=0, help="Columns that share a scale; 0: a whole row. Default: 32, as in GGUF's q8_0 and q4_0; "
                               "0 with int8 activations.")] = None,
    activations: Annotated[Literal["float", "int8"], typer.Option(
        "--activations", help="int8: round what the matrices multiply too, row by row; fast for batches.")] = "float",
    method: Annotated[str, typer.Option("--method", help="How the integers are found; rtn: round to nearest.")] = "rtn",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where; default: RUN-int8 beside the run.")] = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="best, last, or a step.")] = "best",
    as_json: Json = False,
) -> None:
    """Make a run with weights of 8 or 4 bits, which generate, eval, serve and export open like any other."""
    from dougong.recipes.compress import compress_run, form_for
    from dougong.recipes.open_run import open_run

    form = form_for(to, group=group, activations=activations)
    opened = open_run(run, checkpoint=checkpoint)
    tell_passed_over(opened)
    place = out or opened.directory.path.with_name(f"{opened.directory.path.resolve().name}-{to}")
    made = compress_run(opened, place, form, method=method)
    screen = console(as_json)
    screen.print(f"{made.compression.title()}: {made.bytes_before:,} bytes of weights are {made.bytes_after:,} "
                 f"({made.bytes_before / made.bytes_after:.1f} times smaller)")
    for note in made.notes:
        screen.print(note)
    screen.print(f"written: {made.directory.path}", style="bold")
    screen.print(f'what it costs: dougong eval {made.directory.path}', style="dim")
    emit(made.to_dict(), as_json)

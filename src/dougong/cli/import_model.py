"""`dougong import`: a Hugging Face directory as a run that every verb opens."""

from pathlib import Path
from typing import Annotated

import typer

from dougong.cli.output import Json, console, emit


def import_model(
    model: Annotated[str, typer.Argument(metavar="HF_DIR", help="A directory, or a name to fetch: hf:owner/model, "
                                                                 "ms:owner/model (ModelScope).")],
    run: Annotated[Path | None, typer.Option("--run", help="Where; default: runs/NAME.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Text that `eval` scores it on: a folder.")] = None,
    as_json: Json = False,
) -> None:
    """Make a run of a model in Hugging Face's format."""
    from dougong.interop.hub import is_hub_name, local_directory
    from dougong.interop.import_hf import read_hf
    from dougong.recipes.import_model import import_run

    directory = local_directory(model)
    name = model.split("@")[0].split("/")[-1] if is_hub_name(model) else directory.resolve().name
    place = run or Path("runs") / name
    imported = import_run(read_hf(directory), place, source=model, data=data)
    screen = console(as_json)
    for note in imported.notes:
        screen.print(note)
    screen.print(f"{imported.family}, {imported.parameters:,} parameters: {imported.directory.path}", style="bold")
    screen.print(f'let it write: dougong generate {imported.directory.path} "Once upon a time"', style="dim")
    emit(imported.to_dict(), as_json)

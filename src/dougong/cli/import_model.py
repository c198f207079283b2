"""`dougong import`: a Hugging Face directory as a run that every verb opens."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from dougong.cli.output import Json, console, emit


def import_model(
    model: Annotated[str, typer.Argument(metavar="HF_DIR", help="A directory, or a name to fetch: hf:owner/model, "
                                                                 "ms:owner/model (ModelScope); or an adapter in PEFT's "
                                                                 "form.")],
    run: Annotated[Path | None, typer.Option("--run", help="Where; default: runs/NAME.")] = None,
    base: Annotated[str | None, typer.Option("--model", help="Of an adapter: the model it belongs to, a run, a "
                                                              "directory or hf:owner/model.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Text that `eval` scores it on: a folder.")] = None,
    as_json: Json = False,
) -> None:
    """Make a run of a model in Hugging Face's format, or of an adapter in PEFT's."""
    from dougong.core.errors import ConfigError
    from dougong.data.places import whole_path
    from dougong.interop.hub import is_hub_name, local_directory, model_name
    from dougong.interop.import_hf import read_hf
    from dougong.interop.peft_form import is_peft_directory
    from dougong.recipes.import_model import import_run

    directory = local_directory(model)
    if is_peft_directory(directory):
        _import_adapter(directory, base, run, data, as_json)
        return
    if base is not None:
        raise ConfigError(f"--model has no effect here: {model} holds a whole model, no adapter (adapter_config.json).")
    name = model_name(model) if is_hub_name(model) else directory.resolve().name
    place = run or Path("runs") / name
    imported = import_run(read_hf(directory), place, source=model,
                          data=None if data is None else whole_path(data))
    screen = console(as_json)
    for note in imported.notes:
        screen.print(note)
    screen.print(f"{imported.family}, {imported.parameters:,} parameters: {imported.directory.path}", style="bold")
    named = quote(str(imported.directory.path))
    screen.print(f'let it write: dougong generate {named} "Once upon a time"', style="dim", markup=False,
                 soft_wrap=True)
    emit(imported.to_dict(), as_json)


def _import_adapter(directory: Path, base: str | None, run: Path | None, data: str | None, as_json: bool) -> None:
    from dougong.core.errors import ConfigError
    from dougong.recipes.adapters import import_adapter

    if base is None:
        raise ConfigError(f"{directory} holds an adapter. Name the model that it belongs to: --model RUN, --model "
                          "FOLDER, or --model hf:OWNER/NAME.")
    if data is not None:
        raise ConfigError("--data has no effect at the import of an adapter. Score it later: dougong eval RUN --data "
                          f"{data}")
    made = import_adapter(directory, base, run or Path("runs") / directory.resolve().name)
    console(as_json).print(f"an adapter of {base}: {made.path}", style="bold")
    emit({"run": str(made.path), "base": base}, as_json)

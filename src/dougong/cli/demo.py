"""`dougong demo`: a first model in minutes, fitted to this machine."""

from pathlib import Path
from typing import Annotated

import typer

from dougong.cli.output import Json, Overrides, console, emit, progress_bar


def demo(
    minutes: Annotated[float, typer.Option("--minutes", "-m", min=0.1, help="How long to train.")] = 5.0,
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option("--run", help="The run's directory; default runs/first.")] = None,
    as_json: Json = False,
) -> None:
    """Train a first model on this machine's own Python library and show what it can do."""
    from dougong.recipes.demo import demo as story

    emit(story(minutes, overrides or [], path=run, out=console(as_json), progress=progress_bar(as_json)), as_json)

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
    import time

    from dougong.recipes.demo import show, train_demo
    from dougong.report import write_report

    begin, out = time.perf_counter(), console(as_json)
    finished = train_demo(minutes, overrides or [], path=run, out=out, progress=progress_bar())
    write_report([finished.directory], finished.directory.report)
    show(finished, out, minutes_in_all=(time.perf_counter() - begin) / 60)
    emit(finished.to_dict(), as_json)

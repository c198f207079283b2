"""`dougong report`: a run, or several side by side, as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from dougong.cli.output import Json, console, emit


def report(
    runs: Annotated[list[Path], typer.Argument(help="One run, or several to compare.")],
    out: Annotated[Path | None, typer.Option("--out", help="The page; else report.html in the first run.")] = None,
    as_json: Json = False,
) -> None:
    """Write a self-contained HTML report."""
    from dougong.core.run import RunDirectory
    from dougong.report import write_report

    directories = [RunDirectory.open(path) for path in runs]
    page = write_report(directories, out or directories[0].report)
    console(as_json).print(f"{page}  ({page.stat().st_size / 1024:,.0f} KiB)")
    emit({"report": str(page)}, as_json)

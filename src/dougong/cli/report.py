"""`dougong report`: a run, or several side by side, as one HTML page; or a run explained on the terminal."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dougong.cli.output import Json, console, emit


def report(
    runs: Annotated[list[Path], typer.Argument(help="One run, or several to compare.")],
    out: Annotated[Path | None, typer.Option("--out", help="The page; else report.html in the first run.")] = None,
    why: Annotated[bool, typer.Option("--why", help="Say here why the run was slow, and why it spiked.")] = False,
    as_json: Json = False,
) -> None:
    """Write a self-contained HTML report, or explain a run."""
    from dougong.core.errors import ConfigError
    from dougong.core.run import RunDirectory
    from dougong.recipes.journey import last_run
    from dougong.report import write_report
    from dougong.report.why import explain

    directories = [RunDirectory.open(last_run(path)) for path in runs]
    if why:
        if len(directories) > 1 or out is not None:
            raise ConfigError("--why explains one run on the terminal; give one run and leave --out out.")
        explained = explain(directories[0])
        _print(explained, console(as_json))
        emit(explained.to_dict(), as_json)
        return
    page = write_report(directories, out or directories[0].report)
    console(as_json).print(f"{page}  ({page.stat().st_size / 1024:,.0f} KiB)", markup=False)
    emit({"report": str(page)}, as_json)


def _print(why: Any, terminal: Any) -> None:
    """Sentences, then the figures they rest on."""
    terminal.print("[bold]Why slow[/]")
    _say(why.slow_sentences, terminal)
    phases = [(name.en, text.en, f"{share:.1%}", "█" * round(30 * share)) for name, text, share in why.phase_rows()]
    _grid(["phase", "time", "share", ""], phases, terminal)
    for heads, rows in (why.rank_table(), why.outlier_table()):
        _grid([head.en for head in heads], [[cell.en for cell in row] for row in rows], terminal)
    terminal.print("\n[bold]Why it spiked[/]")
    _say(why.spiked_sentences, terminal)
    heads, rows = why.trouble_table()
    _grid([head.en for head in heads], [[cell.en for cell in row] for row in rows], terminal, words=4)
    if why.more_troubles:
        terminal.print(f"and {why.more_troubles} more", style="dim")
    for event in why.spiked.hangs:
        for one in event.get("processes", []):
            terminal.print(f"\nprocess {one['rank']} stood here:", style="bold")
            terminal.print(str(one.get("stack") or "unknown").rstrip(), markup=False, style="dim")


def _say(sentences: list[Any], terminal: Any) -> None:
    for sentence in sentences:
        terminal.print(sentence.en, markup=False)


def _grid(heads: list[str], rows: list[Any], terminal: Any, *, words: int = 0) -> None:
    """A table, if there are rows; the last `words` columns hold text."""
    from rich.table import Table as Grid
    from rich.text import Text

    if not rows:
        return
    grid = Grid(box=None, header_style="bold dim", pad_edge=False)
    for place, head in enumerate(heads):
        text = place == 0 or place >= len(heads) - max(1, words)
        grid.add_column(head, justify="left" if text else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    terminal.print()
    terminal.print(grid)

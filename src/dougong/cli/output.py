"""What every command prints: text for people on standard output, or one JSON object on its last line."""

import json
import os
import sys
from typing import Annotated, Any

import typer

from dougong.core.events import finite

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line of standard output.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...",
                                                       help="Changes, such as optim.lr=3e-4 or data.path=~/texts.")]
ModelToBegin = Annotated[str | None, typer.Option("--model", help="A model to begin from: a run, a Hugging Face "
                                                                  "folder, hf:OWNER/NAME. Short for start.path=…")]


def with_model(model: str | None, overrides: list[str] | None) -> list[str]:
    """The changes to a recipe, with the model that `--model` names to begin from."""
    return [*([f"start.path={model}"] if model else []), *(overrides or [])]


def is_first_process() -> bool:
    """Whether this process speaks: of those that torchrun started together, the first."""
    return os.environ.get("RANK", "0") == "0"


def console(as_json: bool = False) -> Any:
    """A rich console for people: on standard output, or on standard error when that belongs to JSON."""
    from rich.console import Console

    return Console(stderr=as_json, highlight=False, quiet=not is_first_process())


def emit(value: Any, as_json: bool) -> None:
    """Prints the JSON object if it was asked for; numbers that are not finite are null."""
    if as_json and is_first_process():
        print(json.dumps(finite(value), ensure_ascii=False, allow_nan=False))
        sys.stdout.flush()


def tell_passed_over(opened: Any) -> None:
    """Says on standard error which damaged checkpoints were not used."""
    for problem in opened.passed_over:
        print(f"warning: checkpoint passed over: {problem}", file=sys.stderr)


def progress_bar() -> Any:
    """A callable `(done, total, what)` that draws one bar with an ETA per `what` on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    terminal = Console(stderr=True)
    bar = Progress(TextColumn("{task.description:<28}"), BarColumn(30), TextColumn("{task.percentage:>3.0f}%"),
                   TimeRemainingColumn(), console=terminal, transient=True)
    tasks: dict[str, Any] = {}

    def report(done: int, total: int | None, what: str) -> None:
        if not terminal.is_terminal or not is_first_process():
            return
        if not tasks:
            bar.start()
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done, total=total)
        if total is not None and done >= total and all(task.finished for task in bar.tasks):
            bar.stop()
            for task in tasks.values():
                bar.remove_task(task)
            tasks.clear()

    return report

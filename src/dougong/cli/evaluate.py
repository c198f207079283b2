"""`dougong eval`: exact bits per byte over a whole split, beside honest baselines."""

from pathlib import Path
from typing import Annotated

import typer

from dougong.cli.output import Json, console, emit, progress_bar, tell_passed_over


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run or one of its checkpoints.")],
    split: Annotated[str | None, typer.Option("--split", help="validation or test; default: the recipe's.")] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", min=1, help="Tokens between windows; the context if not given.")
    ] = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="best, last, or a step.")] = "best",
    data: Annotated[str | None, typer.Option("--data", help="Other text, all of it: a folder, file or glob.")] = None,
    no_baselines: Annotated[bool, typer.Option("--no-baselines", help="Leave out the 5-gram and xz.")] = False,
    as_json: Json = False,
) -> None:
    """Score a run's model on held-out data."""
    from dougong.recipes.open_run import open_run
    from dougong.recipes.scoring import print_result, score

    opened = open_run(run, checkpoint=checkpoint, to_read=True)
    result = score(opened, data=data, split=split, stride=stride, baselines=not no_baselines,
                   progress=progress_bar())
    tell_passed_over(opened)
    out = console(as_json)
    out.print(f"{run}, step {opened.step:,} ({opened.weights} weights)", style="dim", markup=False)
    print_result(result, out)
    emit({**result, "step": opened.step}, as_json)

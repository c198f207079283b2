"""`dougong train`: recipe in, run out; or a journey of several."""

import os
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from dougong.cli.output import Json, ModelToBegin, Overrides, console, emit, is_first_process, progress_bar, with_model

UNFINISHED = 75
"""exit code of a run that was told to stop, under torchrun, which takes 0 for the end of the training (EX_TEMPFAIL)"""


def train(
    recipe: Annotated[str | None, typer.Argument(help="A shipped recipe's or journey's name, or a .yaml file.")] = None,
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option("--run", help="The run's directory; else runs/<recipe's name>.")] = None,
    model: ModelToBegin = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run named by --run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, count and predict; train nothing.")] = False,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Train this many seeds and show the spread.")] = 1,
    as_json: Json = False,
) -> None:
    """Train a model. Ctrl-C saves and says how to continue."""
    from dougong.core.errors import ConfigError
    from dougong.recipes.journey import is_journey

    out, progress = console(as_json), progress_bar()
    if (recipe is not None and is_journey(recipe)) or (resume and _is_begun_journey(recipe, run)):
        if dry_run or seeds > 1 or model:
            raise ConfigError("--dry-run, --seeds and --model belong to one recipe, and a journey has several. Give "
                              "them to the recipes of its stages one by one; `dougong recipes` lists both.")
        emit(_travel(recipe, overrides, run, resume, out, progress), as_json)
        return
    if resume:
        from dougong.recipes.train import resume_run

        other = "--dry-run" if dry_run else "--seeds" if seeds > 1 else "--model" if model else ""
        path, layout = _run_to_resume(recipe, overrides, run, other=other)
        _conclude(resume_run(path, layout=layout, progress=progress), out, as_json)
        return
    from dougong.recipes.recipe import load_recipe

    if recipe is None:
        raise ConfigError("name a recipe, as in `dougong train first`; `dougong recipes` lists them.")
    if dry_run and (seeds > 1 or run is not None):
        raise ConfigError("--dry-run makes no run, so --run and --seeds have no effect beside it. Leave them out.")
    asked, base = load_recipe(recipe, with_model(model, overrides))
    if dry_run:
        from dougong.recipes.dry_run import dry_run as predict

        emit(predict(asked, out=out, progress=progress), as_json)
    elif seeds > 1:
        from dougong.recipes.seeds import train_seeds

        emit(train_seeds(asked, base, count=seeds, path=run, out=out, progress=progress), as_json)
    else:
        from dougong.recipes.train import train_run

        _conclude(train_run(asked, base, path=run, progress=progress), out, as_json)


def _is_begun_journey(recipe: str | None, run: Path | None) -> bool:
    from dougong.recipes.journey import FILE

    path = run or (_place_of(recipe) if recipe and "=" not in recipe else None)
    return path is not None and (path / FILE).is_file()


def _place_of(recipe: str) -> Path:
    """Where the runs of a recipe or a journey are made unless told otherwise."""
    from dougong.recipes.recipe import name_of

    return Path("runs") / name_of(recipe)


def _travel(recipe: str | None, overrides: list[str] | None, run: Path | None, resume: bool, out: Any,
            progress: Any) -> dict:
    """All stages, or those that are left; prints where each run is, and what to do with the last."""
    from rich.markup import escape

    from dougong.recipes.journey import load_journey, travel, travel_on

    if resume:
        travelled = travel_on(_journey_to_resume(recipe, overrides, run), out=out, progress=progress)
    else:
        travelled = travel(load_journey(str(recipe), overrides), run, out=out, progress=progress)
    path = escape(quote(str(travelled.path)))
    if travelled.stopped:
        out.print(f"\nStopped in stage {escape(travelled.stopped)}; everything is saved.\n"
                  f"Continue with: [bold]dougong train --resume --run {path}[/]", soft_wrap=True)
    else:
        _judge(travelled.path, out, progress)
        out.print(f"\n{escape(str(travelled.path))} is done. Its last run is {escape(str(travelled.last))}.\n"
                  f"Next: [bold]dougong chat {path}[/], [bold]dougong serve {path}[/], [bold]dougong eval {path}[/]",
                  soft_wrap=True)
    return travelled.to_dict()


def _journey_to_resume(recipe: str | None, overrides: list[str] | None, run: Path | None) -> Path:
    """The journey that `--resume` means. Raises ConfigError for whatever would ask for another one."""
    from dougong.core.errors import ConfigError

    changes = [argument for argument in [recipe, *(overrides or [])] if argument and "=" in argument] or overrides
    if changes:
        raise ConfigError(f"--resume continues a journey as it was begun; {changes[0]!r} would change it. Leave it "
                          "out, or begin a new one.")
    if recipe is not None and run is not None:
        raise ConfigError(f"--resume continues the journey inside {run}, so {recipe!r} has no effect. Leave it out.")
    return run or _place_of(str(recipe))


def _judge(path: Path, out: Any, progress: Any) -> None:
    """Asks the last run what no stage was trained on, where the stages learned conversations; leaves a page."""
    from dougong.recipes.judge import judge_journey, print_judged
    from dougong.report.skills_page import write_skills_page

    judged = judge_journey(path, progress=progress)
    if judged is not None:
        out.print()
        print_judged(judged, out)
        out.print(f"Its page: {write_skills_page(judged, path / 'skills.html')}", markup=False)


def _run_to_resume(recipe: str | None, overrides: list[str] | None, run: Path | None, *,
                   other: str) -> tuple[Path, Any]:
    """The run that `--resume` means, and the layout if another one is asked for. Raises ConfigError for whatever would
    ask for another run than that."""
    from dougong.core.errors import ConfigError

    changes = [argument for argument in [recipe, *(overrides or [])] if argument and "=" in argument]
    others = [change for change in changes if not change.startswith("layout")]
    if others:
        raise ConfigError(f"--resume continues the run's own recipe; {others[0]!r} would change it.\n"
                          "Only the layout may be another (layout.shard=4). Start a new run to change something else.")
    recipe = None if recipe in changes else recipe
    if other:
        raise ConfigError(f"--resume continues one run as it is; {other} has no place beside it. Leave it out.")
    if recipe is not None and run is not None:
        raise ConfigError(f"--resume continues the recipe inside {run}, so {recipe!r} has no effect. Leave it out, or "
                          f"start a new run: dougong train {recipe} --run {run}")
    if recipe is None and run is None:
        raise ConfigError("--resume continues a run: name it, as in `dougong train --resume --run runs/first`.")
    return run or _place_of(str(recipe)), _layout(changes)


def _layout(changes: list[str]) -> Any:
    """The layout that overrides spell, whole; None without any."""
    from dougong.core.config import from_dict, parse_overrides
    from dougong.runtime.layout import LAYOUTS

    asked = parse_overrides(changes).get("layout")
    if asked is None:
        return None
    values = {"kind": str(asked)} if not isinstance(asked, dict) else {"kind": "axes", **asked}
    return from_dict(LAYOUTS[str(values["kind"])], values, where="layout")


def _conclude(finished, out, as_json: bool) -> None:
    """Tells how the run ended. Under torchrun one that was told to stop ends as unfinished, with its own exit code: the
    machines that stay are to go on without the one that leaves."""
    emit(_summary(finished, out), as_json)
    if finished.reason == "interrupted" and "TORCHELASTIC_RUN_ID" in os.environ:
        from dougong.runtime.processes import wait_for_all

        wait_for_all()      # torchrun ends the others when one has failed: not before the first has written its report
        raise typer.Exit(UNFINISHED)


def _summary(finished, out) -> dict:
    """Writes the report, prints where the run is and what to do with it; returns the JSON payload."""
    from rich.markup import escape

    from dougong.recipes.scoring import print_result
    from dougong.report import write_report

    path, named = escape(str(finished.directory.path)), escape(quote(str(finished.directory.path)))
    if not is_first_process():
        return finished.to_dict()
    if finished.was_done:
        if not finished.directory.report.exists():      # killed after the run had ended, before its page was written
            write_report([finished.directory], finished.directory.report)
        out.print(f"{path} is already finished ({finished.reason} at step {finished.step:,}); nothing was changed.\n"
                  "To train longer, start a new run with more steps, or go on from its weights: "
                  f"dougong train RECIPE --model {named} …", soft_wrap=True)
        return finished.to_dict()
    write_report([finished.directory], finished.directory.report)
    if finished.reason == "interrupted":
        out.print(f"\nStopped at step {finished.step:,}; everything is saved.\n"
                  f"Continue with: [bold]dougong train --resume --run {named}[/]", soft_wrap=True)
    else:
        if finished.result:
            out.print()
            print_result(finished.result, out)
        verbs = ["generate", "eval"] if finished.is_language_model else ["eval"]
        out.print(f"\n{path} is done; its report is {escape(str(finished.directory.report))}.\n"
                  "Next: " + ", ".join(f"[bold]dougong {verb} {named}[/]" for verb in verbs), soft_wrap=True)
    return finished.to_dict()

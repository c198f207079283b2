"""`dougong data`: look at the data of a recipe, or do its preparation ahead."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from dougong.cli.output import Json, ModelToBegin, Overrides, console, emit, progress_bar, with_model

app = typer.Typer(no_args_is_help=True, help="Look at a recipe's data, or prepare it ahead of training.")
_Recipe = Annotated[str, typer.Argument(help="A shipped recipe's name, a .yaml file, or a run.")]


def _corpus(recipe: str, overrides: list[str] | None, model: str | None):
    from dougong.recipes import RECIPES

    if recipe not in RECIPES and Path(recipe).is_dir():
        return _corpus_of_run(Path(recipe), with_model(model, overrides))
    from dougong.recipes.assemble import prepare_data
    from dougong.recipes.derive import resolve
    from dougong.recipes.recipe import load_recipe

    resolved, _ = resolve(load_recipe(recipe, with_model(model, overrides))[0])
    return prepare_data(resolved, progress=progress_bar())


def _corpus_of_run(path: Path, changes: list[str]):
    from dougong.core.errors import ConfigError
    from dougong.core.run import RunDirectory
    from dougong.recipes.journey import last_run
    from dougong.recipes.open_run import corpus_of
    from dougong.recipes.recipe import recipe_from_run
    from dougong.recipes.start import as_it_lies

    if changes:
        raise ConfigError(f"a run has the data it was trained on; {changes[0]!r} would change them. Leave it out, or "
                          "name a recipe.")
    directory = RunDirectory.open(last_run(path))
    recipe, recorded = recipe_from_run(directory.recipe)
    return corpus_of(as_it_lies(recipe, recorded, directory), recorded, directory.path,
                     progress=progress_bar())


@app.command("prepare")
def prepare(recipe: _Recipe = "first", overrides: Overrides = None, model: ModelToBegin = None,
            as_json: Json = False) -> None:
    """Read, clean, split, tokenise and pack; training then starts at once."""
    from dougong.data.walk import left_out
    from dougong.recipes.assemble import print_data_facts

    corpus, out = _corpus(recipe, overrides, model), console(as_json)
    print_data_facts(corpus.facts, out)
    if found := left_out(corpus.facts.get("skipped") or {}):
        look = shlex.join(["dougong", "data", "inspect", recipe, *with_model(model, overrides)])
        out.print(f"{found}; named by: {look}", style="dim", markup=False, soft_wrap=True)
    emit(corpus.facts, as_json)


@app.command("inspect")
def inspect(
    recipe: _Recipe = "first",
    overrides: Overrides = None,
    documents: Annotated[int, typer.Option("--documents", "-n", min=1, help="How many documents to show.")] = 3,
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "train",
    model: ModelToBegin = None,
    as_json: Json = False,
) -> None:
    """Show documents with their tokens in colour, what was skipped and what was removed."""
    from dougong.data.inspect import look, render

    seen = look(_corpus(recipe, overrides, model), split=split, documents=documents)
    render(seen, console(as_json))
    emit(seen, as_json)

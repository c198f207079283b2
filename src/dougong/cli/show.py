"""`dougong show`: the resolved recipe, every derived number with its reason, and the difference from its base; of a
journey, its stages."""

from typing import Annotated

import typer

from dougong.cli.output import Json, ModelToBegin, Overrides, console, emit, with_model


def show(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's or journey's name, or a .yaml file.")] = "first",
    overrides: Overrides = None,
    model: ModelToBegin = None,
    json_schema: Annotated[bool, typer.Option("--json-schema", help="Print the JSON schema for editors.")] = False,
    as_json: Json = False,
) -> None:
    """Print a recipe as it would run and where it differs from its base, or a journey's stages."""
    import json

    from rich.markup import escape
    from rich.syntax import Syntax
    from rich.table import Table as Grid

    from dougong.core.config import difference, dump_yaml, to_dict
    from dougong.core.config import json_schema as schema_of
    from dougong.core.errors import ConfigError
    from dougong.recipes.derive import resolve
    from dougong.recipes.journey import is_journey, load_journey
    from dougong.recipes.recipe import Recipe, load_recipe

    if json_schema:
        print(json.dumps(schema_of(Recipe), ensure_ascii=False))
        return
    out = console(as_json)
    if is_journey(recipe):
        if model:
            raise ConfigError("--model belongs to one recipe, and a journey has several: dougong show RECIPE --model …")
        journey = load_journey(recipe, overrides)
        out.print(Syntax(dump_yaml(journey), "yaml", background_color="default"))
        out.print("A stage's changes lie over its recipe; `dougong show RECIPE` has the rest.", style="dim")
        emit({"journey": to_dict(journey)}, as_json)
        return
    asked, base = load_recipe(recipe, with_model(model, overrides))
    resolved, derived = resolve(asked)
    out.print(Syntax(dump_yaml(resolved), "yaml", background_color="default"))
    if derived:
        grid = Grid("derived", "value", "why", box=None, header_style="bold", pad_edge=False)
        for item in derived:
            grid.add_row(item.key, escape(str(item.value)), escape(item.reason))
        out.print(grid)
    changes = difference(base, asked)
    if changes:
        grid = Grid(f"changed from {base.name}", "was", "is", box=None, header_style="bold", pad_edge=False)
        for key, (old, new) in changes.items():
            grid.add_row(key, escape(str(old)), escape(str(new)))
        out.print("", grid)
    emit({"recipe": to_dict(resolved), "derived": [item.to_dict() for item in derived],
          "changed": {key: list(pair) for key, pair in changes.items()}}, as_json)

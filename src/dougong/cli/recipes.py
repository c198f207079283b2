"""`dougong recipes`: what ships."""

from dougong.cli.output import Json, console, emit


def recipes(as_json: Json = False) -> None:
    """List the recipes that ship, and the journeys through several of them."""
    from dougong.recipes import RECIPES
    from dougong.recipes.journey import JOURNEYS

    rows = [{"name": name, "about": RECIPES[name]().about} for name in RECIPES]
    journeys = [{"name": name, "about": JOURNEYS[name]().about} for name in JOURNEYS]
    out = console(as_json)
    for row in rows:
        out.print(f"[bold]{row['name']:<22}[/]{row['about']}")
    for row in journeys:
        out.print(f"[bold]{row['name']:<22}[/]{row['about']} [dim](a journey of several recipes)[/]")
    out.print("\nLook at one with `dougong show NAME`, start it with `dougong train NAME`.\n"
              "Your own: a YAML file with `base: NAME` and what you change.", style="dim")
    emit({"recipes": rows, "journeys": journeys}, as_json)

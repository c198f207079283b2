"""`dougong recipes`: what ships."""

from dougong.cli.output import Json, console, emit


def recipes(as_json: Json = False) -> None:
    """List the recipes that ship."""
    from dougong.recipes import RECIPES

    rows = [{"name": name, "about": RECIPES[name]().about} for name in RECIPES]
    out = console(as_json)
    for row in rows:
        out.print(f"[bold]{row['name']:<22}[/]{row['about']}")
    out.print("\nLook at one with `dougong show NAME`, start it with `dougong train NAME`.\n"
              "Your own: a YAML file with `base: NAME` and what you change.", style="dim")
    emit({"recipes": rows}, as_json)

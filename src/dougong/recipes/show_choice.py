"""The choice of `plan --budget` for people: what to train, from what, what else, and what is not known."""

from typing import Any

from dougong.plan.laws import amount


def print_choice(plan: dict[str, Any], out: Any) -> None:
    """Prints every part of the plan to a rich console."""
    choice = plan["choice"]
    out.print(f"\n[bold]{plan['budget']['text']}[/]: train [bold]{amount(choice['parameters'])}[/] parameters on "
              f"[bold]{amount(choice['tokens'])}[/] tokens (by {_escaped(plan['law'])})")
    heads = f", {choice['num_heads']} heads" if "num_heads" in choice else ""
    out.print(f"{choice['num_layers']} layers of width {choice['dim']}{heads}, vocabulary {choice['vocab_size']:,}, "
              f"context {choice['context']:,}; {plan['rows']:,} rows a step, {plan['steps']:,} steps\n")
    if plan.get("layout"):
        out.print(f"layout: {_escaped(plan['layout']['name'])}; {_escaped(plan['layout']['reason'])}\n")
    _print_loss(plan, out)
    out.print(_figures(plan["figures"]), "")
    if plan.get("probe"):
        out.print(_small_runs(plan["probe"]), "")
        if plan["probe"]["warning"]:
            out.print(_escaped(plan["probe"]["warning"]) + "\n", style="yellow")
    out.print(_curve(plan), "")
    if plan["others"]:
        out.print(_others(plan["others"]), "")
    where = ", on each host" if "--nnodes" in plan["command"] else ""
    out.print(f"Train it{where}:", style="bold")
    out.print(f"  {_escaped(plan['command'])}", soft_wrap=True)


def _print_loss(plan: dict[str, Any], out: Any) -> None:
    loss = plan["loss"]
    if plan["refused"]:
        out.print(_escaped(plan["refused"]) + "\n", style="yellow")
    elif loss.get("interval"):
        low, high = loss["interval"]
        out.print(f"predicted: [bold]{loss['value']:.3f}[/] {loss['unit']}, between {low:.3f} and {high:.3f} "
                  f"({loss['meaning']})\n")
    else:
        mark = " [yellow](extrapolated)[/]" if loss["extrapolated"] else ""
        out.print(f"predicted: [bold]{loss['value']:.3f}[/] {loss['unit']}{mark}; it orders shapes, and is no promise "
                  "about other text\n")


def _grid(*titles: str) -> Any:
    from rich.table import Table

    return Table(*titles, box=None, header_style="bold", pad_edge=False)


def _figures(figures: list[dict[str, Any]]) -> Any:
    grid = _grid("number", "value", "fitted on", "from")
    for one in figures:
        mark = "\n".join(f"[yellow]extrapolated:[/] {_escaped(said)}" for said in one["extrapolated"])
        note = _escaped(one["note"])
        grid.add_row(one["name"], amount(one["value"]), one["fitted"] or "–",
                     "\n".join(part for part in (_escaped(one["source"]), note, mark) if part))
    return grid


def _small_runs(probe: dict[str, Any]) -> Any:
    grid = _grid("small run", "parameters", "tokens", "steps", "ms a step", "bits per byte")
    for run in probe["runs"]:
        grid.add_row(run["size"], amount(run["parameters"]), amount(run["tokens"]), f"{run['steps']:,}",
                     f"{run['seconds_per_step'] * 1000:.0f}", f"{run['bits_per_byte']:.4f}")
    return grid


def _curve(plan: dict[str, Any]) -> Any:
    """The trade-off: every shape with the whole budget spent on it; the chosen one marked."""
    hidden = plan["refused"] is not None
    grid = _grid("", "shape", "parameters", "tokens", "passes", "" if hidden else "loss", "serves")
    options, chosen = plan["curve"], plan["choice"]["size"]
    at = next(i for i, option in enumerate(options) if option["size"] == chosen)
    for option in options[max(at - 4, 0):at + 5]:
        spread = f" ({option['interval'][0]:.3f} to {option['interval'][1]:.3f})" if option["interval"] else ""
        grid.add_row("→" if option["size"] == chosen else "", f"{option['num_layers']} × {option['dim']}",
                     amount(option["parameters"]), amount(option["tokens"]),
                     "–" if option["epochs"] is None else f"{option['epochs']:.1f}",
                     "" if hidden else f"{option['loss']:.3f}{spread}", "yes" if option["fits"] else "too large")
    return grid


def _others(others: list[dict[str, Any]]) -> Any:
    grid = _grid("other laws", "parameters", "tokens", "fitted on", "from")
    for law in others:
        mark = " [yellow](extrapolated)[/]" if law["extrapolated"] else ""
        note = f"; {_escaped(law['note'])}" if law["note"] else ""
        grid.add_row(law["name"], amount(law["parameters"]), amount(law["tokens"]), law["fitted"],
                     f"{_escaped(law['source'])}{note}{mark}")
    return grid


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")

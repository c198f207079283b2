"""A plan in the terminal: the run, the memory as bars, the layouts ranked."""

from typing import Any

from dougong.plan.laws import amount

COLOURS = {"weights": "blue", "gradients": "cyan", "optimizer": "magenta", "activations": "yellow", "logits": "red",
           "gathered": "green", "recomputed": "bright_yellow", "temporary": "bright_red", "inputs": "white",
           "allowance": "bright_black"}
_BAR = 40


def print_plan(plan: dict[str, Any], out: Any) -> None:
    """Everything that a reader needs to decide, in one screen; the rest is in the JSON and on the page."""
    chosen, model, work = plan["best"][0], plan["model"], plan["work"]
    machine, devices = plan["machine"], plan["devices"]
    where = f"{devices:,} x {machine['name']}" + (f" in {plan['hosts']:,} hosts" if plan["hosts"] > 1 else "")
    out.print(f"[bold]{plan['recipe']}[/] on {where}: {amount(model['parameters']['total'])} parameters, "
              + (f"{amount(model['trained'])} trained beside them, " if model["trained"] else "")
              + f"{amount(model['flops_per_token'])} FLOP a token, {amount(work['tokens'])} tokens in "
              f"{work['steps']:,} steps of {work['rows']:,} rows x {work['context']:,}")
    out.print()
    _memory(chosen, out)
    out.print()
    _time(plan, chosen, out)
    out.print()
    _ranking(plan, out)


def _memory(option: dict[str, Any], out: Any) -> None:
    capacity, total = option["capacity_bytes"], option["memory_bytes"]
    out.print(f"[bold]memory of one process[/], {option['name']}: {size(total)} of {size(capacity)} "
              f"({total / capacity:.0%}); {option['micro_rows']} rows at once x {option['micro_batches']}"
              + (f"; {', '.join(option['changes'])}" if option["changes"] else ""))
    largest = max(option["memory"].values())
    for kind, held in sorted(option["memory"].items(), key=lambda item: -item[1]):
        if held > 0:
            bar = "█" * max(1, round(_BAR * held / largest))
            out.print(f"  {kind:<12} [{COLOURS.get(kind, 'white')}]{bar:<{_BAR}}[/] {size(held):>10}")


def _time(plan: dict[str, Any], option: dict[str, Any], out: Any) -> None:
    bill, machine = option["bill"], plan["machine"]
    seconds = option["step_seconds"]
    shares = ", ".join(f"{kind} {value / seconds:.0%}" for kind, value in option["seconds"].items()
                       if value / seconds >= 0.005)
    out.print(f"[bold]time[/]  {seconds * 1000:,.0f} ms a step ({shares}); {option['tokens_per_s']:,.0f} tokens/s; "
              f"{span(bill['days'])}; {energy(bill['energy_kwh'])}"
              + (f"; cost {bill['cost']:,.2f}" if bill["cost"] is not None else ""))
    out.print(f"      efficiency {machine['efficiency']:.0%} of {machine_peak(plan) / 1e12:,.3g} TFLOP/s: "
              f"{machine['efficiency_source']}", style="dim")
    for item in option["traffic"]:
        out.print(f"      {item['axis']}: {item['what']}, {item['collectives']:,} messages, {size(item['bytes'])} a "
                  f"step over the {item['link']}, {item['seconds'] * 1000:,.1f} ms"
                  + (" while computing" if item["hidden"] else " waited for"), style="dim")
    if plan["simulated"]:
        found = plan["simulated"]
        out.print(f"      the divided model on fake tensors: {size(found['peak_bytes'])} at the peak (arithmetic: "
                  f"{size(found['arithmetic_bytes'])}, both without allowance), {found['collectives']:,} collectives a "
                  "micro-batch", style="dim")


def _ranking(plan: dict[str, Any], out: Any) -> None:
    from rich.table import Column
    from rich.table import Table as Grid

    why = Column("why", overflow="fold")    # a setting is to be copied: never cut short
    grid = Grid("", "layout", "GiB", "tokens/s", "time", why, box=None, header_style="bold", pad_edge=False)
    for place, option in enumerate(plan["best"], 1):
        grid.add_row(str(place), option["name"], f"{option['memory_bytes'] / 2**30:,.1f}",
                     f"{option['tokens_per_s']:,.0f}", span(option["bill"]["days"]),
                     "; ".join([*option["changes"], option["reason"]]))
    for option in plan["others"][:6]:
        fits, held = option["fits"], option["memory"]
        grid.add_row("–" if fits else "✗", option["name"], f"{option['memory_bytes'] / 2**30:,.1f}" if held else "",
                     f"{option['tokens_per_s']:,.0f}" if fits else "", span(option["bill"]["days"]) if fits else "",
                     option["reason"], style="dim")
    out.print(grid)
    out.print(f"{plan['considered']:,} ways were tried by arithmetic. --html FILE draws them.", style="dim")


def energy(kwh: float) -> str:
    """64.1 kWh, 41.7 GWh."""
    unit, size = next(((unit, size) for unit, size in (("GWh", 1e6), ("MWh", 1e3)) if kwh >= size), ("kWh", 1))
    return f"{kwh / size:,.3g} {unit}"


def machine_peak(plan: dict[str, Any]) -> float:
    bf16 = plan["work"]["precision"] == "bf16"
    return plan["machine"]["peak_bf16_flops" if bf16 else "peak_fp32_flops"]


def size(count: float) -> str:
    """Bytes for people: GiB, MiB or KiB, as devices' memories are given."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count:,.0f} B"


def span(days: float) -> str:
    """"3.2 days", "5 hours", "40 minutes"."""
    hours = days * 24
    if days >= 2:
        return f"{days:,.1f} days"
    if hours >= 2:
        return f"{hours:.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours * 60 >= 1 else f"{hours * 3600:.0f} seconds"

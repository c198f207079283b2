"""The demo: a first model, fitted to this machine and the minutes given, shown from data to report."""

from pathlib import Path
from shlex import quote
from typing import Any

from rich.markup import escape

from dougong.core.config import parse_overrides
from dougong.core.events import last_per_step, read_events
from dougong.recipes.assemble import print_data_facts
from dougong.recipes.derive import size_for
from dougong.recipes.recipe import load_recipe
from dougong.recipes.scoring import print_result
from dougong.recipes.train import Finished, train_run


def train_demo(minutes: float, overrides: list[str], *, path: Path | None, out: Any, progress: Any) -> Finished:
    """Trains recipe `first` at a size that fits this machine and the minutes."""
    fitted = [] if "size" in parse_overrides(overrides) else [f"size={size_for(minutes)}"]
    recipe, base = load_recipe("first", [*fitted, *overrides], changes={"train": {"minutes": minutes}})
    out.print(f"[bold]斗拱 dougong[/]: a language model from nothing, in about {minutes:g} minutes of training.\n"
              f"Size {recipe.size} fits this machine and this time.\n")
    return train_run(recipe, base, path=path, progress=progress)


def show(finished: Finished, out: Any, *, minutes_in_all: float) -> None:
    """What came of it: the data, what the model writes, how it compares, and what to try next."""
    run = finished.directory.path
    if finished.result is None:
        out.print(f"\nStopped. Continue with: [bold]dougong train --resume --run {escape(quote(str(run)))}[/]")
        return
    named = escape(quote(str(run)))
    events = last_per_step(read_events(finished.directory.events))
    out.print("\n[bold]The data[/]")
    print_data_facts(next(event["facts"] for event in events if event["event"] == "data"), out)
    samples = [event for event in events if event["event"] == "sample"]
    out.print("\n[bold]What it writes[/]")
    for sample in [sample for sample in samples if sample["step"] == samples[-1]["step"]]:
        out.print(sample["prompt"], style="bold", end="", markup=False)
        out.print(sample["text"], style="cyan", markup=False)
        out.rule(style="dim")
    out.print("\n[bold]What it has learned[/] (of text it has never seen)")
    print_result(finished.result, out)
    _verdict(finished.result, out)
    out.print(f"\n[bold]Report[/]  {finished.directory.report}   ({minutes_in_all:.1f} minutes in all)\n\n"
              f"[bold]Try next[/]\n  dougong generate {named} \"class Stack:\"\n"
              f"  dougong eval {named} --split validation\n"
              "  dougong train first data.path=~/my/texts", soft_wrap=True)


def _verdict(result: dict[str, Any], out: Any) -> None:
    gram = next((row for row in result["baselines"] if "gram" in row["name"]), None)
    if gram and gram["interval"]:
        better = gram["interval"][1] < 0
        share = 1 - result["bits_per_byte"] / gram["bits_per_byte"]
        verdict = f"needs {share:.0%} fewer bits than" if better else "does not yet beat"
        out.print(f"The model {verdict} a byte 5-gram trained on the same text.")

"""Does `dougong plan --budget … --probe` choose well, and is its prediction right? Two held-out budgets here.

    python benchmarks/plan_budget.py [--scale 1] [--budgets 6,24] [--minutes M] [--workers N] [--runs FILE]
                                     [--json PATH] [KEY=VALUE]

For each budget (minutes of training; "a laptop hour and four", ten times smaller) the probe runs as the command runs
it, then a grid of twelve shapes is trained for the whole time: eight sizes around the middle at the dial's proportions,
four of them again half as deep again. Asked: the chosen shape at most 2 % above the best of the grid in bits per byte,
and its own result inside the predicted interval.

Equal time without equal load: the seconds of one step of every shape are measured once, at the first call, which wants
a quiet machine; all runs then have fixed numbers of steps (time / seconds of a step), so what else the machine does
later changes nothing but the waiting, nor does it matter that --workers processes train the grid side by side, each on
its share of the cores. Finished runs are kept in --runs (JSON lines): stopped at any moment, or by --minutes, the
same command goes on, on another machine too, as the steps of each run are settled (results/plan_budget_24.jsonl).
--scale divides the budgets: at 10 they are 36 s and 2.4 min of training. KEY=VALUE changes recipe `first`. The full
form takes about 6.5 hours on two cores, --scale 10 about 45 minutes; there the small runs stop within their first
steps, where the probe itself warns, so 2 to 4 is as far as the figures keep their meaning.
"""

import argparse
import json
import multiprocessing
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import header, write

from dougong.plan.budget import Budget, parse_budget
from dougong.recipes import small_runs
from dougong.recipes.assemble import prepare_data
from dougong.recipes.derive import measured_peak
from dougong.recipes.recipe import Recipe, load_recipe, with_values
from dougong.recipes.small_runs import Small, centre, shape_with, sized, tokens_per_step
from dougong.runtime.device import usable_cores

FACTORS = (0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83)   # of the middle size, at the dial's proportions
DEEPER = (0.35, 0.71, 1.41, 2.0)                          # of these also one with half as many layers again


class OutOfTime(Exception):
    """--minutes are over; what is finished is kept."""


@dataclass
class Ledger:
    """What was measured and trained, one JSON line each; found again by its key."""

    path: Path
    until: float

    def __post_init__(self) -> None:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.known = {json.dumps(line["key"]): line["value"] for line in map(json.loads, lines)}

    def once(self, key: list[Any], work: Any) -> Any:
        """The value kept under the key, or that of `work`, kept from now on."""
        name = json.dumps(key)
        if name not in self.known:
            if time.monotonic() > self.until:
                raise OutOfTime
            self.keep(key, work())
        return self.known[name]

    def keep(self, key: list[Any], value: Any) -> None:
        self.known[json.dumps(key)] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, "value": value}) + "\n")


def facts_of(recipe: Recipe) -> list[Any]:
    """What tells shapes apart in the ledger."""
    model = recipe.model
    return [recipe.tokenizer.vocab_size, model.context, model.dim, model.num_layers, model.num_heads,
            model.num_kv_heads, model.head_dim, model.ffn_dim, recipe.train.rows]


def pace(ledger: Ledger, recipe: Recipe, corpus: Any) -> float:
    return ledger.once(["pace", *facts_of(recipe)], lambda: small_runs.measured_pace(recipe, corpus))


def train(ledger: Ledger, recipe: Recipe, corpus: Any, size: str, steps: int) -> Small:
    value = ledger.once(run_key(recipe, steps), lambda: trained(recipe, size, steps, corpus))
    return Small(shape_with(recipe, size, corpus), steps, float(steps * tokens_per_step(recipe)), **value)


def run_key(recipe: Recipe, steps: int) -> list[Any]:
    return ["run", *facts_of(recipe), steps, recipe.seed]


def trained(recipe: Recipe, size: str, steps: int, corpus: Any = None) -> dict[str, Any]:
    begin = time.monotonic()
    done = small_runs.train_small(recipe, corpus or prepare_data(recipe), size, steps)
    print(f"  trained {size:>6} {facts_of(recipe)[2:4]} {steps:>6} steps: {done.bits_per_byte:.4f} bits per byte "
          f"({time.monotonic() - begin:.0f} s)", flush=True)
    return {"seconds_per_step": done.seconds_per_step, "bits_per_byte": done.bits_per_byte}


def train_side_by_side(ledger: Ledger, jobs: list[tuple[Recipe, str, int]], workers: int) -> None:
    """What of these runs the ledger does not know, in `workers` processes that share the cores. Raises OutOfTime once
    those begun are kept."""
    missing = {json.dumps(run_key(recipe, steps)): (recipe, size, steps) for recipe, size, steps in jobs}
    waiting = deque((key, job) for key, job in missing.items() if key not in ledger.known)
    threads = max(1, usable_cores() // workers)
    running: dict[Future[dict[str, Any]], str] = {}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        while running or (waiting and time.monotonic() < ledger.until):
            while waiting and len(running) < workers and time.monotonic() < ledger.until:
                key, (recipe, *rest) = waiting.popleft()
                running[pool.submit(trained, with_values(recipe, {"runtime.threads": threads}), *rest)] = key
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                ledger.keep(json.loads(running.pop(done)), done.result())
    if waiting:
        raise OutOfTime


def grid(settled: Recipe, middle: float) -> list[tuple[str, Recipe]]:
    """Twelve shapes around a size: the dial's proportions, and some deeper ones."""
    from dougong.plan.shapes import written

    shapes = [(written(f * middle), sized(settled, written(f * middle))) for f in FACTORS]
    for factor in DEEPER:
        size = written(factor * middle)
        layers = round(1.5 * sized(settled, size).model.num_layers + 0.01)
        shapes.append((size, sized(with_values(settled, {"model.num_layers": layers}), size)))
    return shapes


def one_budget(ledger: Ledger, base: Recipe, seconds: float, share: float | None, workers: int) -> dict[str, Any]:
    """Probe, choice, grid and the chosen shape's own run for one time of training."""
    whole = seconds / (1 - share) if share else _whole(seconds)
    print(f"{seconds:.0f} s of training after {whole - seconds:.0f} s of probe", flush=True)
    speed = ledger.once(["peak"], measured_peak)
    small_runs.measured_peak = lambda: speed   # type: ignore[assignment]
    probe = small_runs.run_probe(base, whole - seconds, seconds, pace=lambda *a: pace(ledger, *a),
                                 train=lambda *a: train(ledger, *a))
    money = Budget(1, parse_budget(f"here x {whole:.0f} s").machine, whole)
    plan = small_runs.choose(base, probe, seconds, money, None)
    middle = centre(speed * small_runs.UTILISATION, seconds)
    settled = small_runs.settle_probe(base, middle)
    corpus = prepare_data(settled)
    shapes = grid(settled, middle)
    paces = [pace(ledger, recipe, corpus) for _, recipe in shapes]         # all before the first long run
    size = plan["choice"]["size"]
    chosen = sized(settled, size)
    own = pace(ledger, chosen, corpus)
    print(f"  chosen: {size}, predicted {plan['loss']['value']:.4f}, {plan['loss']['interval']}", flush=True)
    jobs = [(recipe, size, max(10, round(seconds / step))) for (size, recipe), step in
            zip([(size, chosen), *shapes], [own, *paces], strict=True)]
    if workers > 1:
        train_side_by_side(ledger, jobs, workers)
    result, *runs = [train(ledger, recipe, corpus, size, steps) for recipe, size, steps in jobs]
    return judge(plan, probe.runs, result, runs, seconds)


def _whole(seconds: float) -> float:
    """The budget that leaves so many seconds after its probe."""
    whole = seconds
    for _ in range(50):
        whole = seconds + small_runs.probe_seconds(whole)
    return whole


def judge(plan: dict[str, Any], small: list[Small], chosen: Small, runs: list[Small],
          seconds: float) -> dict[str, Any]:
    best = min(runs, key=lambda run: run.bits_per_byte)
    gap = chosen.bits_per_byte / best.bits_per_byte - 1
    low, high = plan["loss"]["interval"]
    inside = low <= chosen.bits_per_byte <= high
    print(f"  best of the grid {best.shape.size} ({best.shape.model.num_layers} x {best.shape.model.dim}) "
          f"{best.bits_per_byte:.4f}; chosen {chosen.shape.size} {chosen.bits_per_byte:.4f}: {gap:+.2%} (asked: at "
          f"most +2 %)\n  predicted {plan['loss']['value']:.4f}, {low:.4f} to {high:.4f}: "
          f"{'inside' if inside else 'OUTSIDE'}\n", flush=True)
    return {"seconds": seconds, "chosen": chosen.to_dict(), "best": best.to_dict(), "gap": gap, "inside": inside,
            "predicted": plan["loss"], "numbers": plan["probe"]["numbers"], "probe": [run.to_dict() for run in small],
            "grid": [run.to_dict() for run in runs], "curve": plan["curve"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="divides the budgets")
    parser.add_argument("--budgets", default="6,24", help="minutes of training, before --scale")
    parser.add_argument("--share", type=float, help="the probe's part of the budget; else as the command has it")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--workers", type=int, default=1, help="processes that train the grid")
    parser.add_argument("--runs", default="plan_budget_runs.jsonl", help="where finished runs are kept")
    parser.add_argument("--json")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    report = header()
    base, _ = load_recipe("first", ["train.minutes=null", "size=null", "evaluate.tokens=150000", *arguments.overrides])
    ledger = Ledger(Path(arguments.runs), time.monotonic() + 60 * arguments.minutes)
    results = []
    try:
        for minutes in map(float, arguments.budgets.split(",")):
            results.append(one_budget(ledger, base, 60 * minutes / arguments.scale, arguments.share,
                                      arguments.workers))
    except OutOfTime:
        print(f"stopped after {arguments.minutes:g} minutes; the same command goes on ({len(ledger.known)} kept)")
    write(arguments.json, {**report, "scale": arguments.scale, "share": arguments.share, "budgets": results})


if __name__ == "__main__":
    main()

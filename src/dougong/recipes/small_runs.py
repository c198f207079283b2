"""`plan --budget … --probe`: a few small models trained here say which shape is best for the whole budget.

A stated share of the budget goes into short runs of the recipe itself, each to its own end (rate decayed, so that
their losses compare): two or three sizes for equal times, the smallest for a shorter time too. The curve through them
(`plan.curve`) and the measured speeds give the loss that each shape reaches in the whole time. Models in their first
few hundred steps say nothing about later: what they learn first comes at once, and later the larger they are
(benchmarks/plan_budget.py). So a short budget is probed with smaller models rather than with shorter runs; and where
the smallest's shorter run would end there and the others would not, it is left out, as the fall between the two would
be taken for the slope: how loss falls with text is then the prior's.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as change
from typing import Any

import numpy as np
import torch

from dougong.core.config import replace
from dougong.core.errors import ConfigError
from dougong.plan.budget import Budget, Serving, Text, duration
from dougong.plan.curve import Curve, SmallRun, fit_curve
from dougong.plan.laws import DATA_CONSTRAINED, Figure, small_scale
from dougong.plan.shapes import Choice, Shape, ladder, written
from dougong.recipes.assemble import assemble, prepare_data
from dougong.recipes.choose import SMALLEST, pick, rate_figure, shape_of, shape_overrides, unique_tokens
from dougong.recipes.derive import measured_peak, resolve
from dougong.recipes.probe import measure_step
from dougong.recipes.recipe import Recipe, with_values
from dougong.recipes.scoring import quick_score
from dougong.recipes.train import given, with_steps
from dougong.train import fit

SHARE, LEAST_S, MOST = 0.15, 120.0, 0.3
"""of the budget's time: 15 %, but two minutes where that is more, and never above 30 %"""
SAME = 0.005
"""relative difference of losses below which two shapes count as equal, and the smaller is taken"""
FEWEST_STEPS = 500
"""of a small run for the longest time"""
_SHORTEST_S = 15.0
UTILISATION = 0.45
_TIMED = 5
_LONG = {3: 0.25, 2: 0.37}
"""number of sizes: share of the probe's time for each"""
_SHORT = 0.04, 0.12
"""least and most for the smallest once more, as few steps as allowed: what is left times steps and evaluates"""
_NEARLY = 0.9
"""of FEWEST_STEPS is as good"""


@dataclass(frozen=True)
class Small:
    """One probe run as it was trained."""

    shape: Shape
    steps: int
    tokens: float
    seconds_per_step: float
    bits_per_byte: float

    def to_dict(self) -> dict[str, Any]:
        return {**self.shape.to_dict(), "steps": self.steps, "tokens": self.tokens,
                "seconds_per_step": self.seconds_per_step, "bits_per_byte": self.bits_per_byte}


@dataclass(frozen=True)
class Probe:
    """What the probe found: its runs, the curve through them, and what is needed to apply it to the whole time."""

    runs: list[Small]
    curve: Curve
    vocab_size: int
    context: int
    unique: float
    """tokens to train on before the text repeats"""
    seconds: float
    timings: dict[float, float]
    """FLOPs of a step: measured seconds"""
    text: str = "your text, counted"
    """where `unique` comes from"""

    def seconds_per_step(self, flops: float) -> float:
        """Between the shapes measured by the logarithms, beyond them at the rate of the nearest."""
        known = sorted(self.timings)
        logs = np.interp(math.log(flops), np.log(known), np.log([self.timings[k] for k in known]))
        nearest = min(max(flops, known[0]), known[-1])
        return float(np.exp(logs)) * flops / nearest


def choose_by_probe(base: Recipe, money: Budget, text: Text, serving: Serving | None, *, out: Any = None,
                    progress: Any = None, share: float | None = None) -> dict[str, Any]:
    """Trains the small models, then chooses for what is left of the budget. Same keys as the choice by law.

    Of a `text` of which the amount is given, the recipe names a part: small runs read that, the budget reads it all.
    Raises ConfigError where the time is too short for a probe to say anything.
    """
    allowed = probe_seconds(money.seconds) if share is None else share * money.seconds
    if allowed < _SHORTEST_S:
        raise ConfigError(f"{money} leaves {allowed:.0f} seconds for a probe, too few to learn anything from.\n"
                          f"Give at least {duration(_SHORTEST_S / MOST)}, or leave --probe out.")
    if out is not None:
        out.print(f"The probe takes {allowed / money.seconds:.0%} of the budget, about {duration(allowed)} of "
                  f"{duration(money.seconds)}, for small runs and some timing; {duration(money.seconds - allowed)} are "
                  "left for training.")
    probe = run_probe(base, allowed, money.seconds - allowed, progress=progress)
    if text.amount is not None:
        probe = change(probe, unique=unique_tokens(base, text, probe.runs[0].shape), text="the amount given")
    return choose(base, probe, money.seconds - allowed, money, serving)


def probe_seconds(budget: float) -> float:
    """What a probe takes of so many seconds."""
    return min(max(SHARE * budget, LEAST_S), MOST * budget)


def measured_pace(recipe: Recipe, corpus: Any) -> float:
    """Seconds of one step of a recipe here."""
    return measure_step(_assembled(recipe, corpus), steps=_TIMED)


def train_small(recipe: Recipe, corpus: Any, size: str, steps: int) -> Small:
    """Trains one small model to the end of its own schedule and scores it on held-out text."""
    built = _assembled(with_steps(recipe, steps), corpus)
    paces = [result.seconds for result in fit(built.state, built.objective, built.runtime, built.recipe.train)]
    score = quick_score(built.recipe, corpus, built.runtime)
    assert score is not None, "run_probe looks for held-out text first"
    return Small(shape_with(recipe, size, corpus), steps, float(steps * tokens_per_step(recipe)),
                 float(np.median(paces)), score(built.state.model)["bits_per_byte"])


def _assembled(recipe: Recipe, corpus: Any) -> Any:
    """`assemble`, compiled afresh: all sizes share the code of a layer, of which torch compiles eight shapes and runs
    the others as they are."""
    if recipe.runtime.compile:
        torch.compiler.reset()
    return assemble(recipe, corpus)


def run_probe(base: Recipe, allowed: float, training: float, *, pace: Callable[..., float] = measured_pace,
              train: Callable[..., Small] = train_small, progress: Any = None) -> Probe:
    """Spends about `allowed` seconds on small runs that are to tell about a run of `training` seconds."""
    report = progress or (lambda done, total, what: None)
    speed = measured_peak() * UTILISATION
    settled = settle_probe(base, centre(speed, training))
    corpus = prepare_data(settled, progress=progress)
    if not corpus.facts["splits"]["validation"].get("documents"):
        raise ConfigError("the probe compares losses on held-out text, and these data have no validation split.\n"
                          "Give data.split.fractions, as in data.split.fractions=[0.9,0.1,0].")
    begin = time.perf_counter()
    runs: list[Small] = []
    timings: dict[float, float] = {}
    sizes, long = _sizes_and_seconds(settled, corpus, speed, allowed, training, pace)
    report(0, round(allowed), "probe: timing small shapes")
    recipes = {size: sized(settled, size) for size in sizes}
    paces = {size: pace(recipe, corpus) for size, recipe in recipes.items()}
    timings.update((_flops_per_step(recipe, corpus), paces[size]) for size, recipe in recipes.items())
    plan = planned_runs(paces, long, allowed)
    for number, (size, steps) in enumerate(plan, start=1):
        report(round(time.perf_counter() - begin), round(allowed), f"probe: small run {number} of {len(plan)}")
        runs.append(train(recipes[size], corpus, size, steps))
    for factor in (0.5, 1.0, 2.0):
        report(round(time.perf_counter() - begin), round(allowed), "probe: timing larger shapes")
        recipe = sized(settled, written(factor * centre(speed, training)))
        timings[_flops_per_step(recipe, corpus)] = pace(recipe, corpus)
    report(round(allowed), round(allowed), "probe: timing larger shapes")
    validation, train_split = (corpus.facts["splits"][name] for name in ("validation", "train"))
    ceiling = math.log2(corpus.tokenizer.vocab_size) * validation["tokens"] / validation["bytes"]
    curve = fit_curve([SmallRun(run.shape.matrices, run.tokens, run.bits_per_byte) for run in runs],
                      ceiling=ceiling, unique=train_split["tokens"])
    return Probe(runs, curve, corpus.tokenizer.vocab_size, settled.model.context, train_split["tokens"],
                 time.perf_counter() - begin, timings)


def planned_runs(paces: dict[str, float], long: float, allowed: float) -> list[tuple[str, int]]:
    """The sizes, the smallest first, with their steps: as many as fit `long` seconds at their paces, and the smallest
    once more for less, unless that alone would end in the first steps: then the others have its time."""
    smallest, pace = next(iter(paces.items()))
    again = min(max(FEWEST_STEPS * pace, _SHORT[0] * allowed), _SHORT[1] * allowed)
    steps = {size: max(FEWEST_STEPS // 4, round(long / step)) for size, step in paces.items()}
    fewer = min(max(FEWEST_STEPS // 4, round(again / pace)), max(FEWEST_STEPS // 8, steps[smallest] // 2))
    if fewer < _NEARLY * FEWEST_STEPS <= min(steps.values()):
        return [(size, round((long + again / len(paces)) / step)) for size, step in paces.items()]
    return [*steps.items(), (smallest, fewer)]


def _sizes_and_seconds(settled: Recipe, corpus: Any, speed: float, allowed: float, training: float,
                       pace: Callable[..., float]) -> tuple[list[str], float]:
    """Three sizes with a quarter of the time each, or two with more where three would stay in their first steps."""
    shapes: dict[Any, str] = {}
    for size in ladder(SMALLEST, max(2 * centre(speed, allowed), 30 * SMALLEST)):
        shapes.setdefault(sized(settled, size).model, size)     # different sizes can be one shape
    known = {size: shape_with(sized(settled, size), size, corpus).matrices for size in shapes.values()}
    found: tuple[list[str], float] = [], 0.0
    for number, share in _LONG.items():
        long = share * allowed
        cap = min(2 * centre(speed, long), centre(speed, training))
        able = [size for size, n in known.items() if n <= max(1.25 * cap, sorted(known.values())[1])]
        while len(able) > 2 and long / pace(sized(settled, able[-1]), corpus) < 0.95 * FEWEST_STEPS:
            able.pop()
        found = probe_sizes({size: known[size] for size in able}, number), long
        if len(found[0]) == number:
            break
    return found


def probe_sizes(known: dict[str, int], number: int) -> list[str]:
    """The largest of the sizes (with their N), and down to `number` of them, each about half of the one before."""
    chosen = [max(known, key=lambda size: known[size])]
    while len(chosen) < number and (smaller := [s for s in known if known[s] < 0.8 * known[chosen[0]]]):
        chosen.insert(0, min(smaller, key=lambda size: abs(math.log(2 * known[size] / known[chosen[0]]))))
    return chosen


def centre(flops_per_s: float, seconds: float) -> float:
    """Where the search begins: the size that the rule for small runs gives; what the small runs say moves it."""
    return max(small_scale(flops_per_s * seconds).optimum(flops_per_s * seconds)[0], SMALLEST)


def settle_probe(base: Recipe, size: float) -> Recipe:
    """Tokenizer, context, device, precision and threads: the same for every small run and for the chosen one."""
    shape, _ = shape_of(base, written(size))
    values: dict[str, Any] = {"model.context": shape.model.context}
    if hasattr(base.tokenizer, "vocab_size"):
        values["tokenizer.vocab_size"] = shape.model.vocab_size
    settled = with_values(base, values)
    return replace(settled, runtime=resolve(with_values(settled, {"size": written(size)}))[0].runtime)


def sized(settled: Recipe, size: str) -> Recipe:
    return resolve(with_values(settled, {"size": size}))[0]


def shape_with(recipe: Recipe, size: str, corpus: Any) -> Shape:
    return Shape(size, replace(recipe.model, vocab_size=corpus.tokenizer.vocab_size))


def tokens_per_step(recipe: Recipe) -> int:
    return given(recipe.train.rows) * recipe.model.context


def _flops_per_step(recipe: Recipe, corpus: Any) -> float:
    return shape_with(recipe, "", corpus).flops_per_token * tokens_per_step(recipe)


def choose(base: Recipe, probe: Probe, training: float, money: Budget, serving: Serving | None) -> dict[str, Any]:
    """The shape with the least loss in `training` seconds by the probe's curve and speeds, the smaller where the
    difference is below what two runs of one recipe differ by."""
    options = probe_options(base, probe, training, serving)
    best = pick(options, money, same=SAME)
    least = min((o for o in options if o.fits), key=lambda o: o.loss)
    recipe = _at_vocabulary(base, best.shape.size, probe)[1]
    rows = given(recipe.train.rows)
    steps = max(10, round(best.tokens / (rows * best.shape.model.context)))
    numbers = probe.curve.numbers
    figures = [
        Figure("parameters", best.shape.parameters, "your own curve: least loss in the time left, at the speed of each",
               note="" if least is best else f"{least.shape.size} would be {least.loss / best.loss - 1:+.2%}, within "
               "noise: the smaller is cheaper to serve"),
        Figure("tokens", best.tokens, f"{best.seconds_per_step:.3f} s a step, measured here"),
        Figure("passes over the text", best.epochs or 0, f"{DATA_CONSTRAINED.source}: what repeated text is worth; the "
               f"text: {probe.text}"),
        Figure("batch (tokens)", rows * best.shape.model.context, "the dial: as in the small runs"),
        change(rate_figure(base, recipe.optim, best.shape.matrices, best.tokens),
               note="the small runs took theirs in the same way"),
        *(Figure(name, middle, "fitted to the small runs", note=f"95 % interval {low:.3g} to {high:.3g}")
          for name, (low, middle, high) in numbers.items())]
    loss = {"value": best.loss, "interval": list(best.interval or ()), "unit": "bits per byte of held-out text",
            "meaning": "95 % of what one run may reach if the curve's form holds: what the small runs leave open, and "
                       "the scatter of a single run"}
    return {"by": "probe", "law": "your own curve", "choice": best.to_dict(), "rows": rows, "steps": steps,
            "loss": loss, "refused": None, "figures": [figure.to_dict() for figure in figures], "others": [],
            "curve": [option.to_dict() for option in options],
            "probe": {"runs": [run.to_dict() for run in probe.runs], "seconds": probe.seconds,
                      "warning": _warning(probe),
                      "training_seconds": training, "numbers": {key: list(value) for key, value in numbers.items()}},
            "overrides": [*shape_overrides(base, best.shape), f"train.rows={rows}", f"train.steps={steps}"]}


def _warning(probe: Probe) -> str | None:
    """What makes the figures rougher than they look; None where nothing does."""
    most: dict[str, int] = {}
    for run in probe.runs:
        most[run.shape.size] = max(run.steps, most.get(run.shape.size, 0))
    fewest = min(most.values())
    if fewest >= _NEARLY * FEWEST_STEPS:
        return None
    return (f"The time was too short: a small run had {fewest} steps, and below {FEWEST_STEPS} models are still in "
            "their first, sudden progress, which says little about later. Give a longer budget before trusting this "
            "choice.")


def probe_options(base: Recipe, probe: Probe, training: float, serving: Serving | None) -> list[Choice]:
    """Every shape of the ladder that trains at a sensible speed, with the loss and interval that the curve gives it."""
    sizes = [run.shape.matrices for run in probe.runs]
    options = []
    for size in ladder(min(sizes), 60 * max(sizes)):
        shape, recipe = _at_vocabulary(base, size, probe)
        per_step = given(recipe.train.rows) * shape.model.context
        pace = probe.seconds_per_step(shape.flops_per_token * per_step)
        tokens = training / pace * per_step
        if options and options[-1].shape.model == shape.model:
            continue
        if tokens < FEWEST_STEPS / 2 * per_step and len(options) > 1:
            break   # it would not come out of its first steps
        middle, interval = probe.curve.predict(shape.matrices, tokens, probe.unique)
        options.append(Choice(shape, tokens, tokens / probe.unique, pace, middle, interval, shape.fits(serving)))
    return options


def _at_vocabulary(base: Recipe, size: str, probe: Probe) -> tuple[Shape, Recipe]:
    """The dial's shape at the probe's tokenizer and context, and the recipe that has its batch and rate."""
    fixed: dict[str, Any] = {"model.context": probe.context}
    if hasattr(base.tokenizer, "vocab_size"):
        fixed["tokenizer.vocab_size"] = probe.vocab_size
    shape, resolved = shape_of(with_values(base, fixed), size)
    return Shape(size, replace(shape.model, vocab_size=probe.vocab_size)), resolved

"""`plan --budget … --probe`: a few small models trained here say which shape is best for the whole budget.

A stated share of the budget goes into short runs of the recipe itself, each to its own end (rate decayed, so that their
losses compare): three sizes for the longest time that the share allows, one of them for a shorter time too. The curve
through them (`plan.curve`) and the measured speeds give the loss that each shape reaches in the whole time.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dougong.core.config import replace
from dougong.core.errors import ConfigError
from dougong.plan.budget import Budget, Serving, Text, duration
from dougong.plan.curve import Curve, SmallRun, fit_curve
from dougong.plan.laws import DATA_CONSTRAINED, Figure
from dougong.plan.shapes import Option, Shape, ladder, written
from dougong.recipes.assemble import assemble, prepare_data
from dougong.recipes.choose import pick, shape_of, shape_overrides
from dougong.recipes.derive import measured_peak, resolve
from dougong.recipes.probe import measure_step
from dougong.recipes.recipe import Recipe, with_values
from dougong.recipes.scoring import quick_score
from dougong.recipes.train import given, with_steps
from dougong.train import fit

SHARE = 0.15
"""of the budget's time, unless told otherwise"""
TOKENS_PER_PARAMETER = 4.0
"""where the search begins, in runs of seconds to minutes on a CPU (benchmarks/plan_budget.py); the probe moves it"""
SAME = 0.005
"""relative difference of losses below which two shapes count as equal, and the smaller is taken"""
_SHORTEST_S = 15.0
_UTILISATION = 0.45
_TIMED = 5
_LONG, _SHORT = 0.25, 0.1   # of the probe's time: three long runs and a short one; the rest times steps and evaluates
_FEWEST_STEPS = 30


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
    seconds: float
    timings: dict[float, float]
    """FLOPs of a step: measured seconds"""

    def seconds_per_step(self, flops: float) -> float:
        """Between the shapes measured by the logarithms, beyond them at the rate of the nearest."""
        known = sorted(self.timings)
        logs = np.interp(math.log(flops), np.log(known), np.log([self.timings[k] for k in known]))
        nearest = min(max(flops, known[0]), known[-1])
        return float(np.exp(logs)) * flops / nearest


def choose_by_probe(base: Recipe, money: Budget, text: Text, serving: Serving | None, *, out: Any = None,
                    progress: Any = None, share: float = SHARE) -> dict[str, Any]:
    """Trains the small models, then chooses for what is left of the budget. Same keys as the choice by law.

    Raises ConfigError where the time is too short for a probe to say anything.
    """
    allowed = share * money.seconds
    if allowed < _SHORTEST_S:
        raise ConfigError(f"{money} leaves {allowed:.0f} seconds for a probe ({share:.0%}), too few to learn anything "
                          f"from.\nGive at least {duration(_SHORTEST_S / share)}, or leave --probe out.")
    if out is not None:
        out.print(f"The probe takes {share:.0%} of the budget, about {duration(allowed)} of {duration(money.seconds)}, "
                  f"for small runs and some timing; {duration(money.seconds - allowed)} are left for training.")
    probe = run_probe(base, allowed, money.seconds - allowed, progress=progress)
    return choose(base, probe, money.seconds - allowed, money, serving)


def measured_pace(recipe: Recipe, corpus: Any) -> float:
    """Seconds of one step of a recipe here."""
    return measure_step(assemble(recipe, corpus), steps=_TIMED)


def train_small(recipe: Recipe, corpus: Any, size: str, steps: int) -> Small:
    """Trains one small model to the end of its own schedule and scores it on held-out text."""
    built = assemble(with_steps(recipe, steps), corpus)
    paces = [result.seconds for result in fit(built.state, built.objective, built.runtime, built.recipe.train)]
    score = quick_score(built.recipe, corpus, built.runtime)
    assert score is not None, "run_probe looks for held-out text first"
    return Small(shape_with(recipe, size, corpus), steps, float(steps * tokens_per_step(recipe)),
                 float(np.median(paces)), score(built.state.model)["bits_per_byte"])


def run_probe(base: Recipe, allowed: float, training: float, *, pace: Callable[..., float] = measured_pace,
              train: Callable[..., Small] = train_small, progress: Any = None) -> Probe:
    """Spends about `allowed` seconds on small runs that are to tell about a run of `training` seconds."""
    report = progress or (lambda done, total, what: None)
    speed = measured_peak() * _UTILISATION
    settled = settle_probe(base, centre(speed, training))
    corpus = prepare_data(settled, progress=progress)
    if not corpus.facts["splits"]["validation"].get("documents"):
        raise ConfigError("the probe compares losses on held-out text, and these data have no validation split.\n"
                          "Give data.split.fractions, as in data.split.fractions=[0.9,0.1,0].")
    begin = time.perf_counter()
    long, short = _LONG * allowed, _SHORT * allowed
    middle = centre(speed, long)
    runs: list[Small] = []
    timings: dict[float, float] = {}
    for number, (size, seconds) in enumerate([(middle / 2, long), (middle, long), (2 * middle, long),
                                              (middle / 2, short)], start=1):
        report(round(time.perf_counter() - begin), round(allowed), f"probe: small run {number} of 4")
        recipe = sized(settled, written(size))
        step = pace(recipe, corpus)
        runs.append(train(recipe, corpus, written(size), max(_FEWEST_STEPS, round(seconds / step))))
        timings[_flops_per_step(recipe, corpus)] = step
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


def centre(flops_per_s: float, seconds: float) -> float:
    """Where runs of minutes had their best size: C = 6·N·D with D = 4·N."""
    return max(math.sqrt(flops_per_s * seconds / 6 / TOKENS_PER_PARAMETER), 60e3)


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
    rows = _at_vocabulary(base, best.shape.size, probe)[1]
    steps = max(10, round(best.tokens / (rows * best.shape.model.context)))
    numbers = probe.curve.numbers
    figures = [
        Figure("parameters", best.shape.parameters, "your own curve: least loss in the time left, at the speed of each",
               note="" if least is best else f"{least.shape.size} would be {least.loss / best.loss - 1:+.2%}, within "
               "noise: the smaller is cheaper to serve"),
        Figure("tokens", best.tokens, f"{best.seconds_per_step:.3f} s a step, measured here"),
        Figure("passes over the text", best.epochs or 0, f"{DATA_CONSTRAINED.source}: what repeated text is worth"),
        Figure("batch (tokens)", rows * best.shape.model.context, "the dial: as in the small runs"),
        *(Figure(name, middle, "fitted to the small runs", note=f"95 % interval {low:.3g} to {high:.3g}")
          for name, (low, middle, high) in numbers.items())]
    loss = {"value": best.loss, "interval": list(best.interval or ()), "unit": "bits per byte of held-out text",
            "meaning": "95 % of what one run may reach if the curve's form holds: what the small runs leave open, and "
                       "the scatter of a single run"}
    return {"by": "probe", "law": "your own curve", "choice": best.to_dict(), "rows": rows, "steps": steps,
            "loss": loss, "refused": None, "figures": [figure.to_dict() for figure in figures], "others": [],
            "curve": [option.to_dict() for option in options],
            "probe": {"runs": [run.to_dict() for run in probe.runs], "seconds": probe.seconds,
                      "training_seconds": training, "numbers": {key: list(value) for key, value in numbers.items()}},
            "overrides": [*shape_overrides(base, best.shape), f"train.steps={steps}"]}


def probe_options(base: Recipe, probe: Probe, training: float, serving: Serving | None) -> list[Option]:
    """Every shape of the ladder that trains at a sensible speed, with the loss and interval that the curve gives it."""
    sizes = [run.shape.matrices for run in probe.runs]
    options = []
    for size in ladder(min(sizes), 60 * max(sizes)):
        shape, rows = _at_vocabulary(base, size, probe)
        per_step = rows * shape.model.context
        pace = probe.seconds_per_step(shape.flops_per_token * per_step)
        tokens = training / pace * per_step
        if tokens < _FEWEST_STEPS * per_step:
            break
        middle, interval = probe.curve.predict(shape.matrices, tokens, probe.unique)
        options.append(Option(shape, tokens, tokens / probe.unique, pace, middle, interval, shape.fits(serving)))
    return options


def _at_vocabulary(base: Recipe, size: str, probe: Probe) -> tuple[Shape, int]:
    """The dial's shape at the probe's tokenizer and context, and the rows of its step."""
    fixed: dict[str, Any] = {"model.context": probe.context}
    if hasattr(base.tokenizer, "vocab_size"):
        fixed["tokenizer.vocab_size"] = probe.vocab_size
    shape, resolved = shape_of(with_values(base, fixed), size)
    return Shape(size, replace(shape.model, vocab_size=probe.vocab_size)), given(resolved.train.rows)

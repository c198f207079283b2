"""Several runs side by side: their numbers with differences, and where their recipes differ."""

from dataclasses import dataclass

import numpy as np

from dougong.core.config import flatten
from dougong.report.baselines import signed
from dougong.report.facts import RunFacts
from dougong.report.headline import Measure, measures
from dougong.report.numbers import Text, compact, duration, energy, fixed, memory_size, percent


@dataclass(frozen=True)
class ComparedRow:
    label: Text
    cells: list[tuple[Text, Text | None, str]]
    """value, difference from the first run, and "better", "worse" or "" """
    spread: Text | None


def side_by_side(runs: list[RunFacts]) -> list[ComparedRow]:
    """One row for each number that at least one run has; differences are against the first run."""
    tables = [measures(run) for run in runs]
    rows = []
    for key in dict.fromkeys(k for table in tables for k in table):
        found = [table.get(key) for table in tables]
        shown = next(m for m in found if m)
        base = found[0]
        cells = [
            (Text.same("–"), None, "") if m is None else (m.text, *_change(m, base if i else None))
            for i, m in enumerate(found)
        ]
        rows.append(ComparedRow(shown.label, cells, _spread(found) if only_seeds_differ(runs) else None))
    return rows


def _change(measure: Measure, base: Measure | None) -> tuple[Text | None, str]:
    if base is None:
        return None, ""
    gap = measure.value - base.value
    if abs(gap) < 0.0005 * abs(base.value):  # would print as 0.0 %
        return Text.same("=" if gap == 0 else "≈"), ""
    verdict = "" if not measure.better else "better" if gap * measure.better > 0 else "worse"
    if measure.key in ("bits_per_byte", "loss", "evaluation_loss", "accuracy"):
        return signed(gap, measure.key != "accuracy"), verdict
    if not base.value:
        return None, verdict
    share = percent(gap / base.value, 0 if abs(gap / base.value) >= 0.1 else 1)
    return (share if gap < 0 else Text("+" + share.en, "+" + share.zh)), verdict


def _spread(found: list[Measure | None]) -> Text | None:
    known = [m for m in found if m]
    if len(known) < 2 or len(known) != len(found):
        return None
    values = [m.value for m in known]
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    if deviation <= 1e-9 * abs(mean):  # equal, but for the rounding of the mean
        return None
    show = {
        "time": duration,
        "memory": memory_size,
        "energy": energy,
        "accuracy": lambda v: percent(v, 2),
    }.get(known[0].key, compact if abs(mean) >= 1000 else fixed)
    return Text(f"{show(mean).en} ± {show(deviation).en}", f"{show(mean).zh} ± {show(deviation).zh}")


def recipe_differences(runs: list[RunFacts]) -> list[tuple[str, list[str | None]]]:
    """Dotted recipe keys on which the runs differ (the name apart) and the values; None where absent."""
    flat = [flatten(run.recipe) for run in runs]
    keys = dict.fromkeys(k for values in flat for k in values if k != "name")
    rows = [(key, [str(values[key]) if key in values else None for values in flat]) for key in keys]
    return [row for row in rows if len(set(row[1])) > 1]


def only_seeds_differ(runs: list[RunFacts]) -> bool:
    return (
        len(runs) > 1
        and all(run.recipe for run in runs)
        and {key for key, _ in recipe_differences(runs)} == {"seed"}
    )

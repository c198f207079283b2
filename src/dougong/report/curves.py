"""Which curves a report draws: from the facts of one or several runs to charts."""

from typing import Any

import numpy as np

from dougong.report.facts import RunFacts
from dougong.report.numbers import Text, compact, exact, fixed, is_number, significant
from dougong.report.plot import Chart, Clock, Line, Mark, Reference, downsample, smooth, smoothing_window
from dougong.report.words import baseline_name, say, word

_SHOWN_ALONE = ("loss", "lr", "grad_norm", "tokens_per_s", "mfu", "memory_bytes", "epoch")
_NO_CURVE = {"event", "time", "attempt", "step", "tokens", "seconds", "elapsed_s", "documents", "bytes"}
_MORE_CHARTS = 6
_EVALUATION_COLOUR = 1


def charts_of(runs: list[RunFacts]) -> list[Chart]:
    """The loss, bits per byte, rate, gradient norm, throughput and whatever else the objective measured."""
    charts = [
        _loss(runs),
        _bits(runs),
        _column(runs, "lr", Text.same("")),
        _column(runs, "grad_norm", say("unit_before_clip")),
        _column(
            runs,
            "tokens_per_s",
            say("unit_per_s" if runs[0].is_text else "unit_examples_per_s"),
            number="compact",
            from_zero=True,
        ),
    ]
    charts += _further(runs)
    return [chart for chart in charts if chart is not None]


def clocks_of(runs: list[RunFacts]) -> list[Clock]:
    return [Clock.of(run.series.step, run.series.tokens, run.series.minutes) for run in runs]


def _loss(runs: list[RunFacts]) -> Chart | None:
    lines = [
        line for index, run in enumerate(runs) for line in _trained(run, index, "loss", several=len(runs) > 1)
    ]
    for index, run in enumerate(runs):
        lines += _evaluated(run, index, "loss", several=len(runs) > 1)
    marks = [mark for index, run in enumerate(runs) for mark in _marks(run, index)]
    kinds = [
        (run.recipe.get("objective") or {}).get("kind")
        if isinstance(run.recipe.get("objective"), dict)
        else None
        for run in runs
    ]
    unit = (
        say("unit_nats")
        if all(run.is_text or k == "classify" for run, k in zip(runs, kinds))
        else Text.same("")
    )
    return (
        Chart("loss", say("curve_loss"), unit, lines, number="fixed", marks=marks, wide=True, falls=True)
        if lines
        else None
    )


def _bits(runs: list[RunFacts]) -> Chart | None:
    lines = [
        line
        for index, run in enumerate(runs)
        for line in _evaluated(run, index, "bits_per_byte", several=len(runs) > 1)
    ]
    if not lines:
        return None
    return Chart(
        "bits",
        say("curve_bits"),
        say("unit_bits"),
        lines,
        number="fixed",
        wide=True,
        falls=True,
        references=_references(runs),
    )


def _references(runs: list[RunFacts]) -> list[Reference]:
    """Baselines as horizontal lines that name the split they were measured on, where all runs that have them agree."""
    found: dict[tuple[str, str], set[float]] = {}
    for run in runs:
        for baseline in run.result.get("baselines") or []:
            if isinstance(baseline, dict) and is_number(baseline.get("bits_per_byte")):
                key = str(baseline.get("name")), str(run.result.get("split", "–"))
                found.setdefault(key, set()).add(baseline["bits_per_byte"])
    return [
        Reference(
            value,
            say(
                "line_baseline",
                name=Text(name, baseline_name(name).zh.strip()),
                split=word(split),
                value=fixed(value),
            ),
        )
        for (name, split), values in found.items()
        for value in values
        if len(values) == 1
    ]


def _column(
    runs: list[RunFacts], key: str, unit: Text, *, number: str = "significant", from_zero: bool = False
) -> Chart | None:
    lines = [
        line for index, run in enumerate(runs) for line in _trained(run, index, key, several=len(runs) > 1)
    ]
    title = say(f"curve_{key}") if key in _SHOWN_ALONE[:4] else Text.same(key.replace("_", " "))
    return (
        Chart(
            f"c-{key}" if key in _SHOWN_ALONE else "",
            title,
            unit,
            lines,
            number=number,
            from_zero=from_zero or key == "lr",
        )
        if lines
        else None
    )


def _further(runs: list[RunFacts]) -> list[Chart]:
    """Metrics of the objective (a GAN's two losses, an accuracy) from steps and evaluations."""
    keys: dict[str, None] = {}
    for run in runs:
        keys.update(dict.fromkeys(k for k in run.series.values if k not in _SHOWN_ALONE))
        for evaluation in run.evaluations:
            keys.update(
                dict.fromkeys(
                    k
                    for k, v in evaluation.items()
                    if is_number(v) and k not in _NO_CURVE and k not in ("loss", "bits_per_byte")
                )
            )
    charts = []
    for number, key in enumerate(list(keys)[:_MORE_CHARTS]):
        lines = [
            line
            for index, run in enumerate(runs)
            for line in (
                *_trained(run, index, key, several=len(runs) > 1),
                *_evaluated(run, index, key, several=len(runs) > 1),
            )
        ]
        if lines:
            title = word(key) if key == "accuracy" else Text.same(key.replace("_", " "))
            charts.append(Chart(f"more-{number}", title, Text.same(""), lines))
    return charts


def _trained(run: RunFacts, index: int, key: str, *, several: bool) -> list[Line]:
    """Raw (unless many runs would cover each other) and smoothed values of a step metric."""
    column = run.series.values.get(key)
    if column is None or not np.isfinite(column).any():
        return []
    step, name = run.series.step, Text.same(run.name)
    window = 1 if key == "lr" else smoothing_window(int(np.isfinite(column).sum()))
    if window == 1:
        label = name if several else say("line_value") if key == "lr" else say("line_raw")
        return [Line("smooth", index, index, label, *downsample(step, column))]
    lines = [
        Line(
            "smooth",
            index,
            index,
            name if several else say("line_smooth", n=window),
            *downsample(step, smooth(column, window), 300),
        )
    ]
    raw = [] if several else [Line("raw", index, index, say("line_raw"), *downsample(step, column))]
    return raw + lines


def _evaluated(run: RunFacts, index: int, key: str, *, several: bool) -> list[Line]:
    """Evaluation points, one line for each split and kind of weights."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for evaluation in run.evaluations:
        if is_number(evaluation.get(key)):
            groups.setdefault(
                (str(evaluation.get("split", "")), str(evaluation.get("weights", "raw"))), []
            ).append(evaluation)
    lines = []
    for place, ((split, weights), found) in enumerate(groups.items()):
        phrase = say("line_eval_ema" if weights == "ema" else "line_eval", split=word(split))
        label = Text(f"{run.name}, {phrase.en}", f"{run.name}，{phrase.zh}") if several else phrase
        x, y = (np.array([float(e[name]) for e in found]) for name in ("step", key))
        lines.append(
            Line("points", index if several else _EVALUATION_COLOUR + place, index, label, *downsample(x, y))
        )
    return lines


def _marks(run: RunFacts, index: int) -> list[Mark]:
    skips = [
        Mark("skip", s["step"], index, say("mark_skip", step=exact(s["step"]), reason=s.get("reason") or "–"))
        for s in run.skips[:200]
        if is_number(s.get("step"))
    ]
    resumes = [
        Mark("resume", a.first_step, index, say("mark_resume", step=exact(a.first_step), attempt=a.number))
        for a in run.attempts[1:]
    ]
    return skips + resumes


def table_of(run: RunFacts, rows: int = 24) -> tuple[list[Text], list[list[Text]]]:
    """The plotted numbers as a table: about `rows` steps, those with an evaluation first of all."""
    series = run.series
    if not len(series) and not run.evaluations:
        return [], []
    evaluated = {e["step"]: e for e in run.evaluations}
    chosen = _spread(sorted(set(evaluated)), rows)
    if len(chosen) < rows and len(series):
        chosen = sorted({*chosen, *_spread(series.step.tolist(), rows - len(chosen))})
    losses = smooth(series.values["loss"], smoothing_window(len(series)))
    columns = [
        ("tokens_read" if run.is_text else "examples_read", series.tokens, compact),
        ("x_minutes", series.minutes, significant),
        ("curve_loss", losses, fixed),
        *(
            (f"curve_{k}", series.values[k], compact if k == "tokens_per_s" else significant)
            for k in ("lr", "grad_norm", "tokens_per_s")
            if k in series.values
        ),
    ]
    columns = [c for c in columns if np.isfinite(c[1]).any()]
    measured = [
        k for k in ("loss", "bits_per_byte", "accuracy") if any(is_number(e.get(k)) for e in run.evaluations)
    ]
    names = {"loss": "evaluation_loss", "bits_per_byte": "curve_bits", "accuracy": "accuracy"}
    heads = [say("x_step"), *(say(c[0]) for c in columns), *(say(names[k]) for k in measured)]
    body = []
    for step in chosen:
        at = int(np.searchsorted(series.step, step)) if len(series) else 0
        at = at if at < len(series) and series.step[at] == step else None
        body.append(
            [
                exact(step),
                *(
                    show(float(values[at])) if at is not None else Text.same("")
                    for _, values, show in columns
                ),
                *(
                    fixed(evaluated[step][k]) if is_number(evaluated.get(step, {}).get(k)) else Text.same("")
                    for k in measured
                ),
            ]
        )
    return heads, body


def _spread(values: list[float], count: int) -> list[float]:
    """At most `count` of the values, evenly spread, first and last included."""
    if len(values) <= count:
        return list(values)
    return (
        [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]
        if count > 1
        else values[-1:]
    )

"""The few numbers that matter: of one run for its header, and of every run for their comparison."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dougong.report.baselines import Baseline, ends, measured_key, pair, strongest_baseline
from dougong.report.facts import RunFacts
from dougong.report.numbers import (
    Text,
    compact,
    duration,
    energy,
    exact,
    fixed,
    is_number,
    memory_size,
    percent,
    points,
    significant,
)
from dougong.report.words import baseline_name, say, word


@dataclass(frozen=True)
class Measure:
    """One number of a run: value, how it is printed, a remark, and which direction is better (0: neither)."""

    key: str
    label: Text
    value: float
    text: Text
    note: Text | None = None
    better: int = 0


def headline(run: RunFacts) -> list[Measure]:
    """Four to six numbers where the run has them, the most telling first."""
    found = measures(run)
    best = strongest_baseline(run)
    chosen = [
        next(
            (found[k] for k in ("bits_per_byte", "accuracy", "evaluation_loss", "loss") if k in found), None
        ),
        _against(run, best) if best else None,
        found.get("parameters"),
        found.get("tokens"),
        found.get("time"),
        found.get("tokens_per_s"),
        found.get("memory"),
    ]
    return [m for m in chosen if m is not None][:6]


def measures(run: RunFacts) -> dict[str, Measure]:
    """Every number that two runs can be compared on, by key."""
    tokens = run.series.tokens[-1] if len(run.series) else None
    processor, cores = (
        (run.start.get("machine") or {}).get("processor"),
        (run.start.get("machine") or {}).get("cores"),
    )
    epochs = run.series.last("epoch")
    mfu = run.series.median("mfu")
    embedding = (run.model.get("parameters") or {}).get("embedding")
    candidates = [
        *_quality(run),
        _measure(
            "parameters",
            say("parameters"),
            (run.model.get("parameters") or {}).get("total"),
            compact,
            say("of_them_embedding", n=compact(embedding)) if is_number(embedding) and embedding else None,
        ),
        _measure("steps", say("steps"), run.last_step or None, exact),
        _measure(
            "tokens",
            say("tokens_read" if run.is_text else "examples_read"),
            tokens,
            compact,
            say("epochs", n=significant(epochs, 2)) if epochs else None,
        ),
        _measure(
            "time",
            say("training_time"),
            run.training_s,
            duration,
            say("on_device", cores=cores, processor=processor) if processor and cores else None,
            better=-1,
        ),
        _measure(
            "tokens_per_s",
            say("throughput_short" if run.is_text else "throughput_other"),
            run.series.median("tokens_per_s"),
            compact,
            say("of_peak", mfu=percent(mfu, 1)) if mfu else None,
            better=1,
        ),
        _measure("memory", say("peak_memory"), run.peak_memory_bytes, memory_size, better=-1),
        _measure("energy", say("energy"), run.end.get("energy_wh"), energy, better=-1),
    ]
    return {m.key: m for m in candidates if m is not None}


def _measure(
    key: str,
    label: Text,
    value: Any,
    show: Callable[[float], Text],
    note: Text | None = None,
    better: int = 0,
) -> Measure | None:
    return Measure(key, label, float(value), show(value), note, better) if is_number(_plain(value)) else None


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _quality(run: RunFacts) -> list[Measure | None]:
    """The final result where there is one, else the best evaluation, else the training loss."""
    found: list[Measure | None] = []
    for key, show, better in (("bits_per_byte", fixed, -1), ("accuracy", lambda v: percent(v, 1), 1)):
        label, result = say(key), run.result.get(key)
        if is_number(result):
            found.append(_measure(key, label, result, show, _result_note(run, show), better))
            continue
        values = [(e[key], e) for e in run.evaluations if is_number(e.get(key))]
        if values:
            value, event = min(values, key=lambda pair: -better * pair[0])
            note = say("during_training", step=exact(event["step"]), split=word(event.get("split", "–")))
            found.append(_measure(key, label, value, show, note, better))
    losses = [e["loss"] for e in run.evaluations if is_number(e.get("loss"))]
    found.append(
        _measure("evaluation_loss", say("evaluation_loss"), min(losses, default=None), fixed, better=-1)
    )
    column = run.series.values.get("loss")
    tail = (
        column[np.isfinite(column)][-max(3, len(column) // 50) :]
        if column is not None and len(column)
        else ()
    )
    found.append(
        _measure("loss", say("loss_last"), float(np.mean(tail)) if len(tail) else None, fixed, better=-1)
    )
    return found


def _result_note(run: RunFacts, show: Callable[[float], Text]) -> Text | None:
    split, interval = word(run.result.get("split", "–")), pair(run.result.get("interval"))
    if not interval:
        return say("whole_split", split=split) if run.result.get("split") else None
    return say("interval_on", low=show(interval[0]), high=show(interval[1]), split=split)


def _against(run: RunFacts, base: Baseline) -> Measure:
    better, name = base.advantage >= 0, baseline_name(base.name)
    if measured_key(run) == "bits_per_byte":
        share = abs(base.advantage) / base.value if base.value else 0.0
        note = say("paired_interval", **ends(base.interval)) if base.interval else None
        return Measure(
            "against", say("fewer_bits" if better else "more_bits", name=name), share, percent(share), note
        )
    gap = abs(base.advantage)
    note = say("paired_interval_plain", **ends(base.interval, bits=False)) if base.interval else None
    return Measure(
        "against", say("better_accuracy" if better else "worse_accuracy", name=name), gap, points(gap), note
    )

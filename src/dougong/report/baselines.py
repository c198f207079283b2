"""The model beside its baselines: sentences in plain words, and bars with intervals."""

from dataclasses import dataclass
from typing import Any

from dougong.report.facts import RunFacts
from dougong.report.numbers import Formatter, Text, fixed, is_number, percent, points
from dougong.report.words import baseline_name, say


@dataclass(frozen=True)
class Bar:
    """One bar of the comparison; lengths are fractions of the widest."""

    name: Text
    value: Text
    length: float
    low: float | None
    high: float | None
    ours: bool
    difference: Text | None = None
    interval: Text | None = None


@dataclass(frozen=True)
class Comparison:
    """The model beside its baselines: a sentence each, and bars."""

    sentences: list[Text]
    title: Text
    note: Text | None
    bars: list[Bar]


@dataclass(frozen=True)
class Baseline:
    """A baseline beside the model. `advantage` is positive where the model is better; `interval` its own."""

    name: str
    value: float
    advantage: float
    interval: tuple[float, float] | None


def measured_key(run: RunFacts) -> str | None:
    return next((k for k in ("bits_per_byte", "accuracy") if is_number(run.result.get(k))), None)


def baselines(run: RunFacts) -> list[Baseline]:
    """The result's baselines. An event's differences are the model's value minus the baseline's."""
    key = measured_key(run)
    if key is None:
        return []
    found = []
    for entry in run.result.get("baselines") or []:
        if not isinstance(entry, dict) or not is_number(entry.get(key)):
            continue
        value = float(entry[key])
        advantage, interval = run.result[key] - value, pair(entry.get("interval"))
        if key == "bits_per_byte":
            advantage, interval = -advantage, interval and (-interval[1], -interval[0])
        found.append(Baseline(str(entry.get("name", "baseline")), value, advantage, interval))
    return found


def strongest_baseline(run: RunFacts) -> Baseline | None:
    """The one that leaves the model least to boast about."""
    return min(baselines(run), key=lambda b: b.advantage, default=None)


def comparison(run: RunFacts) -> Comparison | None:
    """None while the run has no result."""
    key = measured_key(run)
    if key is None:
        return None
    bits = key == "bits_per_byte"
    found = sorted(baselines(run), key=lambda b: b.advantage)
    sentences = [_sentence(run, b, bits) for b in found[:1]] or [
        say("verdict_alone" if bits else "verdict_accuracy_alone", model=_show(run.result[key], bits, 2))
    ]
    if found and found[0].interval:
        low, high = found[0].interval
        sentences.append(
            say("excludes_zero" if low > 0 or high < 0 else "includes_zero", **ends(found[0].interval, bits))
        )
    sentences += [_sentence(run, b, bits) for b in found[1:3]]
    notes = [say("bars_note_model")] if pair(run.result.get("interval")) else []
    notes += [say("bars_note_baseline")] if any(b.interval for b in found) else []
    note = Text(" ".join(t.en for t in notes), "".join(t.zh for t in notes)) if notes else None
    return Comparison(
        sentences, say("bars_title" if bits else "bars_title_accuracy"), note, _bars(run, found, bits)
    )


def _sentence(run: RunFacts, base: Baseline, bits: bool) -> Text:
    ours, name = run.result["bits_per_byte" if bits else "accuracy"], baseline_name(base.name)
    if not bits:
        return say("verdict_accuracy", model=percent(ours, 1), base=percent(base.value, 1), name=name)
    digits = 2 if abs(base.advantage) >= 0.05 else 3
    values = {"model": fixed(ours, digits), "base": fixed(base.value, digits), "name": name}
    if not base.advantage or not base.value:
        return say("verdict_same", **values)
    share = abs(base.advantage) / base.value
    return say(
        "verdict_fewer" if base.advantage > 0 else "verdict_more",
        **values,
        share=percent(share, 0 if share >= 0.02 else 1),
    )


def _bars(run: RunFacts, found: list[Baseline], bits: bool) -> list[Bar]:
    """The best first. A baseline's whisker is the model's value and the interval of the difference to it."""
    ours = float(run.result["bits_per_byte" if bits else "accuracy"])
    differences = [_signed_interval(base, bits) for base in found]
    whiskers = [(ours + d[0], ours + d[1]) if d else None for d in differences]
    own = pair(run.result.get("interval"))
    reach = [ours, *(b.value for b in found), *(w[1] for w in [own, *whiskers] if w)]
    widest = max([*reach, 0.0 if bits else 1.0]) or 1.0

    def bar(name: Text, value: float, whisker: tuple[float, float] | None, **more: Any) -> tuple[float, Bar]:
        low, high = (max(whisker[0], 0) / widest, whisker[1] / widest) if whisker else (None, None)
        return value, Bar(name, _show(value, bits), max(value, 0) / widest, low, high, **more)

    bars = [
        bar(say("this_model"), ours, own, ours=True, interval=_interval_text(own, lambda v: _show(v, bits)))
    ]
    for base, whisker, gap in zip(found, whiskers, differences):
        name = Text(base.name, baseline_name(base.name).zh.strip())
        interval = _interval_text(gap, lambda v: signed(v, bits))
        difference = signed(base.value - ours, bits)
        bars.append(bar(name, base.value, whisker, ours=False, difference=difference, interval=interval))
    return [b for _, b in sorted(bars, key=lambda pair: pair[0], reverse=not bits)]


def _signed_interval(base: Baseline, bits: bool) -> tuple[float, float] | None:
    """Of baseline minus model: the advantage itself in bits, its opposite in accuracy."""
    if base.interval is None or bits:
        return base.interval
    return -base.interval[1], -base.interval[0]


def _interval_text(interval: tuple[float, float] | None, show: Formatter) -> Text | None:
    if interval is None:
        return None
    low, high = show(interval[0]), show(interval[1])
    return Text(f"{low.en} to {high.en}", f"{low.zh} 至 {high.zh}")


def signed(value: float, bits: bool = True) -> Text:
    text = _show(value, bits)
    return text if value < 0 else Text("+" + text.en, "+" + text.zh)


def _show(value: float, bits: bool, digits: int = 3) -> Text:
    return fixed(value, digits) if bits else percent(value, 1)


def ends(interval: tuple[float, float], bits: bool = True) -> dict[str, Text]:
    show = fixed if bits else points
    return {"low": show(interval[0]), "high": show(interval[1])}


def pair(value: Any) -> tuple[float, float] | None:
    if isinstance(value, list | tuple) and len(value) == 2 and all(is_number(v) for v in value):
        return float(value[0]), float(value[1])
    return None

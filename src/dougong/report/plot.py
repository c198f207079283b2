"""Our own line charts as inline SVG: down-sampling, smoothing, scales, and the drawing of one chart.

A chart is drawn here once and needs no script. The same numbers go into the page as JSON, so that report.js
can redraw it at any width, over another x axis, and read values out. x is always kept as the step; a `Clock`
turns steps into tokens and minutes.
"""

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup

from dougong.report.numbers import Text, compact, significant

POINTS = 600
"""most points kept of one line"""
WIDE, SMALL = (1040, 340), (420, 230)
_EARLY = 0.04
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 16, 34


@dataclass(frozen=True)
class Line:
    """One drawn series. `kind`: "raw" (faint, every extreme), "smooth" (its mean), "points" (evaluations)."""

    kind: str
    colour: int
    run: int
    label: Text
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Reference:
    """A horizontal line to compare with, such as a baseline."""

    y: float
    label: Text


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: a "skip" or a "resume"."""

    kind: str
    step: float
    run: int
    label: Text


@dataclass(frozen=True)
class Chart:
    """Lines over steps with what belongs to them. `number` names how report.js prints a value."""

    key: str
    title: Text
    unit: Text
    lines: list[Line]
    number: str = "significant"
    references: list[Reference] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    wide: bool = False
    from_zero: bool = False
    falls: bool = False
    """a fast fall at the beginning, which the linear view lets start above the frame"""

    @property
    def size(self) -> tuple[int, int]:
        return WIDE if self.wide else SMALL

    @property
    def full_range(self) -> tuple[float, float]:
        return y_range(self.lines, [r.y for r in self.references], from_zero=self.from_zero)

    @property
    def y_range(self) -> tuple[float, float]:
        """What the linear view shows: without the fall of the first 4 % where that takes too much."""
        full = self.full_range
        if not self.falls:
            return full
        begin = _EARLY * max((float(n.x[-1]) for n in self.lines if len(n.x)), default=0.0)
        later = [replace(n, x=n.x[n.x >= begin], y=n.y[n.x >= begin]) for n in self.lines]
        low, high = y_range(later, [r.y for r in self.references], from_zero=self.from_zero)
        return (
            (low, high)
            if high - low < 0.6 * (full[1] - full[0]) and any(len(n.x) > 1 for n in later)
            else full
        )

    @property
    def starts_above(self) -> bool:
        return self.y_range != self.full_range

    @property
    def outside(self) -> int:
        """How many kept points lie outside the full range (rare spikes would flatten everything else)."""
        low, high = self.full_range
        return sum(int(np.sum((line.y < low) | (line.y > high))) for line in self.lines)

    def payload(self) -> dict[str, Any]:
        (low, high), full = self.y_range, self.full_range
        return {
            "y": [low, high],
            "ticks": ticks(low, high, 5),
            "full": full,
            "fullTicks": ticks(*full, 5),
            "number": self.number,
            "title": _both(self.title),
            "unit": _both(self.unit),
            "wide": self.wide,
            "lines": [
                {
                    "kind": n.kind,
                    "colour": n.colour,
                    "run": n.run,
                    "label": _both(n.label),
                    "x": _short(n.x),
                    "y": _short(n.y),
                }
                for n in self.lines
            ],
            "references": [{"y": r.y, "label": _both(r.label)} for r in self.references],
            "marks": [
                {"kind": m.kind, "x": m.step, "run": m.run, "label": _both(m.label)} for m in self.marks
            ],
        }

    def svg(self, domain: tuple[float, float]) -> Markup:
        """The chart over the linear steps of `domain`, complete without any script."""
        width, height = self.size
        low, high = self.y_range
        x_low, x_high = domain

        def px(x: Any) -> Any:
            return LEFT + (x - x_low) / (x_high - x_low) * (width - LEFT - RIGHT)

        def py(y: Any) -> Any:
            return height - BOTTOM - (y - low) / (high - low) * (height - TOP - BOTTOM)

        parts = [
            _grid(width, height, py, ticks(low, high, 5), px, ticks(x_low, x_high, 6 if self.wide else 4))
        ]
        clip = Markup(
            '<clipPath id="clip-{0}"><rect x="{1}" y="{2}" width="{3}" height="{4}"/></clipPath>'
        ).format(self.key, LEFT, TOP - 4, width - LEFT - RIGHT + 4, height - TOP - BOTTOM + 4)
        parts += [_reference(width, py, reference) for reference in self.references]
        parts += [_mark(height, px, mark) for mark in self.marks]
        parts.append(Markup('{}<g clip-path="url(#clip-{})">').format(clip, self.key))
        parts += [_line(line, px, py) for line in self.lines]
        parts.append(Markup("</g>"))
        return Markup("").join(parts)


def _grid(width: int, height: int, py: Any, y_ticks: list[float], px: Any, x_ticks: list[float]) -> Markup:
    rows = [
        Markup(
            '<path class="grid" d="M{} {:.1f}H{}"/><text class="tick" x="{}" y="{:.1f}" '
            'text-anchor="end">{}</text>'
        ).format(LEFT, py(t), width - RIGHT, LEFT - 9, py(t) + 4, tick_label(t).svg)
        for t in y_ticks
    ]
    columns = [
        Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            px(t), height - BOTTOM + 20, tick_label(t).svg
        )
        for t in x_ticks
    ]
    base = Markup('<path class="axis" d="M{} {}H{}"/>').format(LEFT, height - BOTTOM, width - RIGHT)
    return Markup("").join([*rows, base, *columns])


def _reference(width: int, py: Any, reference: Reference) -> Markup:
    return Markup(
        '<path class="reference" d="M{} {y:.1f}H{}"/><text class="reference-label" x="{}" y="{label_y:.1f}" '
        'text-anchor="end">{}</text>'
    ).format(
        LEFT,
        width - RIGHT,
        width - RIGHT,
        reference.label.svg,
        y=py(reference.y),
        label_y=py(reference.y) - 5,
    )


def _mark(height: int, px: Any, mark: Mark) -> Markup:
    x = px(mark.step)
    if mark.kind == "resume":
        return Markup('<g class="mark resume"><title>{}</title><path d="M{x:.1f} {}V{}"/></g>').format(
            mark.label.plain, TOP, height - BOTTOM, x=x
        )
    return Markup('<g class="mark skip"><title>{}</title><path d="M{:.1f} {}l-4.5 8h9z"/></g>').format(
        mark.label.plain, x, height - BOTTOM - 9
    )


def _line(line: Line, px: Any, py: Any) -> Markup:
    xs, ys = px(line.x), py(line.y)
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys)) if len(xs) else ""
    drawn = (
        Markup('<path class="line {} c{}" d="{}"/>').format(line.kind, line.colour % 8, path)
        if path
        else Markup("")
    )
    if line.kind != "points" and len(xs) != 1:  # a single point has no line: show it as a dot
        return drawn
    return drawn + Markup("").join(
        Markup('<circle class="dot c{}" cx="{:.1f}" cy="{:.1f}" r="3.6"/>').format(line.colour % 8, x, y)
        for x, y in zip(xs, ys)
    )


@dataclass(frozen=True)
class Clock:
    """Steps beside the tokens and minutes they took, thinned; report.js interpolates between its entries."""

    step: np.ndarray
    tokens: np.ndarray
    minutes: np.ndarray

    @classmethod
    def of(cls, step: np.ndarray, tokens: np.ndarray, minutes: np.ndarray, points: int = 300) -> "Clock":
        keep = (
            np.unique(_edges(len(step), points).clip(max=max(len(step) - 1, 0)))
            if len(step)
            else np.array([], int)
        )
        return cls(step[keep], tokens[keep], minutes[keep])

    def payload(self) -> dict[str, Any]:
        """Columns that are wholly known; an axis without a column is not offered."""
        columns = {"step": self.step, "tokens": self.tokens, "minutes": self.minutes}
        return {
            name: _short(column, digits=7)
            for name, column in columns.items()
            if len(column) and np.isfinite(column).all()
        }


def downsample(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` of the finite points: first, last and every bucket's extremes, so no spike is lost.

    Bucket edges are half linear and half geometric: a linear and a logarithmic axis both have detail.
    """
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= points:
        return x, y
    edges = _edges(len(x), (points - 2) // 2)
    keep = {0, len(x) - 1}
    for begin, end in pairwise(edges):
        keep.add(begin + int(np.argmin(y[begin:end])))
        keep.add(begin + int(np.argmax(y[begin:end])))
    index = np.array(sorted(keep))
    return x[index], y[index]


def _edges(count: int, buckets: int) -> np.ndarray:
    """Ascending bucket edges 0 … count, at most `buckets` of them between neighbours."""
    half = max(buckets // 2, 1)
    linear = np.linspace(0, count, half + 1)
    geometric = np.geomspace(1, max(count, 1), buckets - half) if buckets > half else np.array([])
    return np.unique(np.concatenate([linear, geometric]).astype(np.int64))


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """Weighted mean of the finite values around each point: a moving mean of half the window, applied twice.

    The width shrinks near the start, where a loss falls fast; at the end only points that exist are averaged.
    NaN where there is nothing to average.
    """
    return _moving_mean(_moving_mean(y, window // 2), window // 2) if window > 1 else y


def _moving_mean(y: np.ndarray, window: int) -> np.ndarray:
    """At index i over i ± min(window / 2, i / 4)."""
    n = len(y)
    finite = np.isfinite(y)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    i = np.arange(n)
    half = np.minimum(window // 2, i // 4)
    low, high = np.maximum(i - half, 0), np.minimum(i + half + 1, n)
    weight = count[high] - count[low]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(weight > 0, (total[high] - total[low]) / weight, np.nan)


def smoothing_window(count: int) -> int:
    """Points in the mean: 4 % of the run but at least 24, and 1 (nothing to smooth) for very short runs."""
    return 1 if count < 20 else max(round(0.04 * count), min(24, count // 5))


def y_range(lines: list[Line], others: list[float], *, from_zero: bool = False) -> tuple[float, float]:
    """Holds every smoothed value, evaluation and reference, and all but the rarest 0.5 % of raw values."""
    low, high = math.inf, -math.inf
    for line in lines:
        if len(line.y):
            edge = 0.5 if line.kind == "raw" and len(line.y) > 50 else 0
            bounds = np.percentile(line.y, [edge, 100 - edge])
            low, high = min(low, float(bounds[0])), max(high, float(bounds[1]))
    for value in others:
        low, high = min(low, value), max(high, value)
    if not math.isfinite(low) or not math.isfinite(high):
        return 0.0, 1.0
    if from_zero:
        low = min(low, 0.0)
    span = (high - low) or abs(high) * 0.1 or 1.0
    return (low if from_zero and low == 0 else low - 0.04 * span), high + 0.06 * span


def x_range(lines: list[Line]) -> tuple[float, float]:
    xs = [x for line in lines if len(line.x) for x in (float(line.x[0]), float(line.x[-1]))]
    low, high = (min(xs), max(xs)) if xs else (0.0, 1.0)
    low = 0.0 if low < 0.2 * high else low  # most runs begin at (nearly) nothing
    return low, high if high > low else low + 1.0


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """About `wanted` round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high]."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    raw = span / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    stride = next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999), 10 * power)
    first, last = math.ceil(low / stride - 1e-9), math.floor(high / stride + 1e-9)
    return [float(f"{k * stride:.10g}") for k in range(first, last + 1)]


def tick_label(value: float) -> Text:
    return compact(value, trim=True) if abs(value) >= 1000 else significant(value, 4)


def _both(text: Text) -> list[str]:
    return [text.en, text.zh]


def _short(values: np.ndarray, digits: int = 5) -> list[float | int]:
    """Rounded to `digits` significant digits: nobody sees more, and the page stays small."""
    rounded = (float(f"{v:.{digits}g}") if abs(v) < 10**digits else float(round(v)) for v in values.tolist())
    return [int(v) if v == int(v) else v for v in rounded]

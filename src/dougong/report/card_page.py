"""The picture of a compression card: size against quality with speed as the dots' size, bars, figures, worst texts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

import dougong
from dougong.core.files import write_text
from dougong.report import numbers
from dougong.report.card_words import advice, change, made_by, picks, say, times
from dougong.report.numbers import Text
from dougong.report.page import _environment, _hash
from dougong.report.plan_page import _SCRIPT

_HERE = Path(__file__).parent
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 1040, 440, 74, 40, 30, 54
_STEP = 0.005
"""where the quality axis turns from even steps to ratios"""
_MARKS = (-0.5, -0.2, -0.1, -0.05, -0.02, -0.01, -0.005, 0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_LEAST_DOT, _MOST_DOT = 6.0, 21.0


def write_card_page(card: dict[str, Any], out: Path) -> Path:
    """Writes one page that loads nothing and returns its path. `card` is what `recipes.card.card` gives."""
    write_text(out, render_card(card))
    return out


def render_card(card: dict[str, Any]) -> str:
    """The page as a string."""
    style = "".join((_HERE / name).read_text(encoding="utf-8") for name in ("report.css", "plan.css", "card.css"))
    environment = _environment()
    environment.globals |= {"say": say, "n": numbers, "made_by": made_by, "change": change, "times": times,
                            "colour": colour, "bar": bar, "quality_bar": quality_bar}
    rows = card["variants"]
    return environment.get_template("card.html").render(
        card=card, rows=rows, advice=advice(rows), headline=headline(rows), plot=plot(rows), style=Markup(style),
        script=Markup(_SCRIPT), style_hash=_hash(style), script_hash=_hash(_SCRIPT), version=dougong.__version__,
        largest=max(row["disk_bytes"] for row in rows),
        fastest=max(speed["median"] for row in rows for speed in row["tokens_per_s"].values()))


def colour(place: int) -> int:
    """Of the variant at this place; the original is ink."""
    return 9 if place == 0 else (place - 1) % 8


def headline(rows: Sequence[dict[str, Any]]) -> list[tuple[Text, Text, Text]]:
    """(what, how much, whose) of the variant that is picked first, or the smallest."""
    original, picked = rows[0], picks(rows)
    best = picked.get("small") or picked.get("everyday") or min(rows[1:], key=lambda row: row["disk_bytes"])
    name = Text.same(best["name"])
    speed = best["tokens_per_s"]["1"]["median"] / original["tokens_per_s"]["1"]["median"]
    agrees = numbers.percent(best["top1_agreement"], 1) if best["top1_agreement"] is not None else numbers.UNKNOWN
    return [(say("smaller"), times(original["disk_bytes"] / best["disk_bytes"]), name),
            (say("costs"), change(best["relative"]), name), (say("faster"), times(speed), name),
            (say("agrees"), agrees, name)]


def bar(value: float, most: float) -> str:
    """Width of a bar in per cent."""
    return f"{100 * value / most:.2f}" if most else "0"


@dataclass(frozen=True)
class QualityBar:
    """A bar from zero to the right (worse) or left (better), with its interval; all in per cent of the width."""

    zero: float
    x: float
    width: float
    low: float | None
    high: float | None


def quality_bar(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> QualityBar:
    ends = [end for one in rows for end in _interval(one)]
    low, high = min(0.0, *(_turned(end) for end in ends)), max(_turned(0.002), *(_turned(end) for end in ends))

    def at(share: float) -> float:
        return 100 * (_turned(share) - low) / (high - low)

    zero, value, (begin, end) = at(0.0), at(row["relative"]), _interval(row)
    known = row["difference_interval"] is not None
    low_end, high_end = (at(begin), at(end)) if known else (None, None)
    return QualityBar(zero, min(zero, value), abs(value - zero), low_end, high_end)


def _interval(row: dict[str, Any]) -> tuple[float, float]:
    """Of the relative change."""
    if row["difference_interval"] is None:
        return row["relative"], row["relative"]
    base = row["bits_per_byte"] - row["difference"]
    return row["difference_interval"][0] / base, row["difference_interval"][1] / base


def _turned(share: float) -> float:
    """The quality axis: even around nothing, ratios beyond, so that 0.1 % and 50 % are both to be seen."""
    return math.asinh(share / _STEP)


@dataclass
class _Dot:
    """A variant's place in the plot, its interval, and where its name stands."""

    name: str
    x: float
    y: float
    radius: float
    low: float
    high: float
    label_x: float = 0.0
    label_y: float = 0.0
    anchor: str = "start"

    def box(self, anchor: str, y: float) -> tuple[float, float, float, float]:
        """Left, right, top and bottom of the name on one side."""
        near, width = self.radius + 10, 8.2 * len(self.name)
        left = self.x + near if anchor == "start" else self.x - near - width
        return left, left + width, y - 9, y + 9


def plot(rows: Sequence[dict[str, Any]]) -> Markup:
    """Size in memory (logarithmic) against the change of bits per byte."""
    sizes = [math.log10(row["memory_bytes"]) for row in rows]
    span = max(sizes) - min(sizes) or 0.3
    x_low, x_high = min(sizes) - 0.12 * span, max(sizes) + 0.24 * span
    shares = [end for row in rows for end in (*_interval(row), row["relative"])]
    y_low, y_high = _turned(min(0.0, *shares)) - 0.35, _turned(max(_STEP, *shares)) + 0.35
    fastest = max(row["tokens_per_s"]["1"]["median"] for row in rows)

    def px(size: float) -> float:
        return _LEFT + (size - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def py(share: float) -> float:
        return _HEIGHT - _BOTTOM - (_turned(share) - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    dots = []
    for row, size in zip(rows, sizes):
        radius = max(_LEAST_DOT, _MOST_DOT * math.sqrt(row["tokens_per_s"]["1"]["median"] / fastest))
        begin, end = _interval(row)
        dots.append(_Dot(row["name"], px(size), py(row["relative"]), radius, py(begin), py(end)))
    _place_labels(dots)
    parts = [_grid(x_low, x_high, y_low, y_high, px, py)]
    front = _front([(row["memory_bytes"], row["bits_per_byte"]) for row in rows])
    if len(front) > 1:
        path = "L".join(f"{dots[place].x:.1f} {dots[place].y:.1f}" for place in front)
        parts.append(Markup('<path class="front" d="M{}"/>').format(path))
    for place in sorted(range(len(rows)), key=lambda place: -dots[place].radius):
        parts.append(_drawn(rows[place], dots[place], colour(place)))
    return Markup('<svg viewBox="0 0 {} {}" role="img">{}</svg>').format(_WIDTH, _HEIGHT, Markup("").join(parts))


def _drawn(row: dict[str, Any], dot: _Dot, hue: int) -> Markup:
    title = f"{row['name']}: {numbers.data_size(row['memory_bytes']).en}, {change(row['relative']).en}"
    ring = Markup('<circle class="ring" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"/>').format(dot.x, dot.y, dot.radius + 4) \
        if row["front"] else Markup("")
    whisker = Markup('<path class="whisker" d="M{:.1f} {:.1f}V{:.1f}"/>').format(dot.x, dot.low, dot.high) \
        if abs(dot.low - dot.high) > 1 else Markup("")
    leader = Markup('<path class="leader" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(
        dot.x, dot.y, dot.label_x, dot.label_y) if abs(dot.label_y - dot.y) > 9 else Markup("")
    return Markup('<g class="c{}"><title>{}</title>{}{}<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"/>{}'
                  '<text class="name" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text></g>').format(
        hue, title, ring, leader, dot.x, dot.y, dot.radius, whisker, dot.label_x, dot.label_y + 4, dot.anchor, dot.name)


def _place_labels(dots: list[_Dot]) -> None:
    """Names beside their dots, on the side and as near to their height as leaves dots and other names free."""
    taken = [(dot.x - dot.radius - 4, dot.x + dot.radius + 4, dot.y - dot.radius - 4, dot.y + dot.radius + 4)
             for dot in dots]
    places = [(anchor, shift) for shift in range(0, 200, 4) for anchor in ("start", "end")]
    for dot in sorted(dots, key=lambda one: (one.y, one.x)):
        inside = [(anchor, shift) for anchor, shift in places if dot.box(anchor, dot.y)[0] > _LEFT
                  and dot.box(anchor, dot.y)[1] < _WIDTH - 4 and dot.y + shift < _HEIGHT - _BOTTOM - 6]
        anchor, shift = next(((anchor, shift) for anchor, shift in inside
                              if not any(_overlap(dot.box(anchor, dot.y + shift), other) for other in taken)),
                             ("start", 0))
        box = dot.box(anchor, dot.y + shift)
        taken.append(box)
        dot.anchor, dot.label_y, dot.label_x = anchor, dot.y + shift, box[0] if anchor == "start" else box[1]


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


def _grid(x_low: float, x_high: float, y_low: float, y_high: float, px: Any, py: Any) -> Markup:
    marks = [mark for mark in _MARKS if y_low <= _turned(mark) <= y_high]
    parts = [Markup('<path class="{}" d="M{} {y:.1f}H{}"/><text class="tick" x="{}" y="{t:.1f}" text-anchor="end">{}'
                    '</text>').format("axis" if mark == 0 else "grid", _LEFT, _WIDTH - _RIGHT, _LEFT - 10,
                                      change(mark).svg if mark else Text.same("0").svg, y=py(mark), t=py(mark) + 4)
             for mark in marks]
    exponents = range(math.floor(x_low), math.ceil(x_high) + 1)
    sizes = [m * 10.0**e for e in exponents for m in (1, 2, 5) if x_low <= math.log10(m * 10.0**e) <= x_high]
    parts += [Markup('<path class="grid" d="M{x:.1f} {}V{}"/>'
                     '<text class="tick" x="{x:.1f}" y="{}" text-anchor="middle">{}</text>').format(
        _TOP, _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM + 20, numbers.data_size(size).svg, x=px(math.log10(size)))
        for size in sizes]
    parts.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
        _WIDTH - _RIGHT, _HEIGHT - 10, say("axis_size").svg))
    parts.append(Markup('<text class="tick" x="8" y="{}">{}</text>').format(_TOP - 14, say("axis_costs").svg))
    return Markup("").join(parts)


def _front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other beats in both: smaller and better; by size."""
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda place: points[place]):
        if not front or points[place][1] < points[front[-1]][1]:
            front.append(place)
    return front

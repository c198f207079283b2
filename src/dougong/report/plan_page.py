"""The picture of a plan: memory as bars, the layout drawn on its hosts, speed against memory, and the ranking."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

import dougong
from dougong.core.files import write_text
from dougong.report import numbers
from dougong.report.numbers import Text
from dougong.report.page import _environment, _hash
from dougong.report.plan_words import KINDS, PARTS, axis_words, reason, say
from dougong.report.plot import tick_label, ticks

_HERE = Path(__file__).parent
_COLOURS = {"weights": 1, "gradients": 5, "optimizer": 4, "activations": 3, "logits": 0, "gathered": 2, "recomputed": 7,
            "temporary": 6, "inputs": 7, "allowance": 8}
_HOSTS, _DEVICES = 8, 8
"""hosts drawn of one layout, and devices of each"""
_WIDTH, _HEIGHT = 1040, 360
_AXES = ("pipeline", "replicate", "shard", "expert", "context", "tensor")
_SCRIPT = """(() => { const root = document.documentElement; root.classList.add("js");
const lang = to => { root.dataset.lang = to; for (const b of document.querySelectorAll("[data-lang-to]"))
b.setAttribute("aria-pressed", b.dataset.langTo === to); };
document.addEventListener("DOMContentLoaded", () => { lang((navigator.language || "").startsWith("zh") ? "zh" : "en");
document.addEventListener("click", e => { const b = e.target.closest("button"); if (b && b.dataset.langTo)
lang(b.dataset.langTo); }); }); })();"""


@dataclass(frozen=True)
class Piece:
    """A part of a stacked bar: x and width in per cent."""

    kind: Text
    colour: int
    x: float
    width: float
    size: Text


def write_plan_page(plan: dict[str, Any], out: Path) -> Path:
    """Writes one page that loads nothing and returns its path. `plan` is what `plan_recipe` gives."""
    write_text(out, render_plan(plan))
    return out


def render_plan(plan: dict[str, Any]) -> str:
    """The page as a string."""
    style = (_HERE / "report.css").read_text(encoding="utf-8") + (_HERE / "plan.css").read_text(encoding="utf-8")
    environment = _environment()
    environment.globals |= {"say": say, "kinds": KINDS, "pieces": pieces, "gib": gib, "reason": reason, "n": numbers}
    best = plan["best"][0]
    shown = [*plan["best"], *(option for option in plan["others"] if option["memory"])][:9]
    return environment.get_template("plan.html").render(
        plan=plan, best=best, shown=shown, limit=max([best["capacity_bytes"], *(o["memory_bytes"] for o in shown)]),
        headline=headline(plan), drawings=drawings(best["layout"], plan["machine"], plan["devices"]),
        curve=curve(plan), step=step_parts(best), style=Markup(style), script=Markup(_SCRIPT),
        style_hash=_hash(style), script_hash=_hash(_SCRIPT), version=dougong.__version__, time=time_of,
        colours={kind: colour for kind, colour in _COLOURS.items() if any(o["memory"].get(kind) for o in shown)})


def headline(plan: dict[str, Any]) -> list[tuple[Text, Text, Text]]:
    """(what, how much, remark) of the best layout."""
    best, bill, work = plan["best"][0], plan["best"][0]["bill"], plan["work"]
    tokens, price = numbers.compact(work["tokens"]), plan["machine"]["price_per_hour"]
    rows = [
        (say("memory"), gib(best["memory_bytes"]), say("of_capacity", size=gib(best["capacity_bytes"]))),
        (say("speed"), Text(f"{best['tokens_per_s']:,.0f}", f"{best['tokens_per_s']:,.0f}"), say("tokens_per_s")),
        (say("time"), time_of(best), say("for_tokens", tokens=tokens)),
        (say("energy"), numbers.energy(bill["energy_kwh"] * 1000), say("without_cooling")),
    ]
    if bill["cost"] is not None:
        rows[3] = (say("cost"), Text.same(f"{bill['cost']:,.0f}"),
                   say("at_price", price=f"{price:g}", energy=numbers.energy(bill["energy_kwh"] * 1000)))
    return rows


def time_of(option: dict[str, Any]) -> Text:
    days = option["bill"]["days"]
    return numbers.duration(days * 86_400) if days < 2 else Text(f"{days:,.1f} days", f"{days:,.1f} 天")


def gib(count: float) -> Text:
    """Bytes as GiB or MiB."""
    return Text.same(f"{count / 2**30:,.1f} GiB" if count >= 2**29 else f"{count / 2**20:,.1f} MiB")


def pieces(option: dict[str, Any], limit: float) -> list[Piece]:
    """The stacked bar of one option's memory, `limit` being its full width."""
    found, x = [], 0.0
    for kind in _COLOURS:
        if size := option["memory"].get(kind, 0.0):
            width = 100 * size / limit
            found.append(Piece(KINDS[kind], _COLOURS[kind], x, width, gib(size)))
            x += width
    return found


def step_parts(option: dict[str, Any]) -> list[tuple[Text, float]]:
    """(part, share) of one step's time."""
    total = option["step_seconds"]
    return [(PARTS[kind], seconds / total) for kind, seconds in option["seconds"].items() if seconds / total > 0.001]


@dataclass(frozen=True)
class Drawing:
    """One axis on the hosts: `hosts` are rows of colours, one for each device."""

    axis: str
    size: int
    words: Text
    hosts: list[tuple[str, list[int]]]


def drawings(layout: dict[str, Any], machine: dict[str, Any], devices: int) -> list[Drawing]:
    """For each axis above 1 (or the one device): which part of it each device has, by colour, on hosts spread evenly
    over all."""
    each = min(machine["host_devices"], devices)
    hosts = math.ceil(devices / each)
    picked = sorted({round(i * (hosts - 1) / max(1, min(hosts, _HOSTS) - 1)) for i in range(min(hosts, _HOSTS))})
    found = []
    for axis in _AXES:
        size = layout[axis] or 1
        if size == 1 and not (axis == "replicate" and devices == 1):
            continue
        stride = math.prod(layout[inner] or 1 for inner in _AXES[_AXES.index(axis) + 1:])
        rows = [(f"{host + 1:,}", [_colour((host * each + place) // stride % size, size)
                                   for place in range(min(each, _DEVICES)) if host * each + place < devices])
                for host in picked]
        found.append(Drawing(axis, size, axis_words(axis, size), rows))
    return found


def _colour(part: int, size: int) -> int:
    """Eight colours: of more parts, neighbours share one."""
    return part if size <= 8 else part * 8 // size


def curve(plan: dict[str, Any]) -> Markup:
    """Tokens per second against memory: what fits as numbered dots, what does not as crosses beyond the line."""
    fitting = [(place, o) for place, o in enumerate([*plan["best"], *plan["others"]], 1) if o["fits"]]
    failing = [o for o in plan["others"] if not o["fits"] and o["memory"]]
    capacity = plan["best"][0]["capacity_bytes"] / 2**30
    near = [o for o in failing if o["memory_bytes"] / 2**30 < 2.5 * capacity]
    most_x = 1.08 * max([capacity, *(o["memory_bytes"] / 2**30 for o in near)])
    most_y = 1.12 * max(o["tokens_per_s"] for _, o in fitting)
    left, right, top, bottom = 84, 24, 18, 48

    def px(x: float) -> float:
        return left + x / most_x * (_WIDTH - left - right)

    def py(y: float) -> float:
        return _HEIGHT - bottom - y / most_y * (_HEIGHT - top - bottom)

    parts = [Markup('<path class="grid" d="M{} {:.1f}H{}"/><text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}'
                    '</text>').format(left, py(t), _WIDTH - right, left - 9, py(t) + 4, tick_label(t).svg)
             for t in ticks(0, most_y, 5)]
    parts += [Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
        px(t), _HEIGHT - bottom + 20, tick_label(t).svg) for t in ticks(0, most_x, 8)]
    parts.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
        _WIDTH - right, _HEIGHT - 8, say("axis_memory").svg))
    parts.append(Markup('<text class="tick" x="{}" y="{}">{}</text>').format(8, top - 4, say("axis_speed").svg))
    parts.append(Markup('<path class="reference" d="M{x:.1f} {}V{}"/><text class="reference-label" x="{t:.1f}" y="{}" '
                        'text-anchor="end">{}</text>').format(top, _HEIGHT - bottom, top + 12,
                                                               say("axis_capacity", name=plan["machine"]["name"]).svg,
                                                               x=px(capacity), t=px(capacity) - 6))
    front = _front([(o["memory_bytes"] / 2**30, o["tokens_per_s"]) for _, o in fitting])
    if len(front) > 1:
        path = "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in front)
        parts.append(Markup('<path class="line c1" d="M{}"/>').format(path))
    for place, option in reversed(fitting):
        x, y = px(option["memory_bytes"] / 2**30), py(option["tokens_per_s"])
        parts.append(Markup('<g class="c{c}"><title>{}</title><circle class="dot" cx="{:.1f}" cy="{:.1f}" r="11"/>'
                            '<text class="in-dot" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text></g>').format(
            option["name"], x, y, x, y + 4, place, c=0 if place == 1 else 1))
    for option in near:
        x, y = px(option["memory_bytes"] / 2**30), py(min(option["tokens_per_s"], most_y * 0.98))
        cross = Markup('<path class="fails" d="M{:.1f} {:.1f}l10 10m0 -10l-10 10"><title>{}</title></path>')
        parts.append(cross.format(x - 5, y - 5, option["name"]))
    return Markup('<svg viewBox="0 0 {} {}" role="img">{}</svg>').format(_WIDTH, _HEIGHT, Markup("").join(parts))


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats in both: less memory and more speed."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front

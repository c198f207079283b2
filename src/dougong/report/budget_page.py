"""The picture of `plan --budget`: the trade-off between size and text, each number with its source, and what to run."""

import math
from pathlib import Path
from typing import Any

from markupsafe import Markup

import dougong
from dougong.core.files import write_text
from dougong.report import numbers
from dougong.report.numbers import Text
from dougong.report.page import _environment, _hash
from dougong.report.plan_page import _SCRIPT
from dougong.report.plan_words import filled
from dougong.report.plot import tick_label, ticks

_HERE = Path(__file__).parent
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 1040, 360, 84, 24, 26, 48

_PHRASES: dict[str, tuple[str, str]] = {
    "plan": ("Plan for a budget", "按预算规划"),
    "chosen": ("{parameters} parameters on {tokens} tokens", "{parameters} 参数，{tokens} 词元"),
    "shape": ("{layers} layers of width {dim}, vocabulary {vocabulary}, context {context}",
              "{layers} 层，宽 {dim}，词表 {vocabulary}，上下文 {context}"),
    "by": ("by {law}", "依据：{law}"),
    "curve_title": ("Every size with the whole budget spent on it", "把全部预算用于每种规模"),
    "curve_lead": ("To the left the model is too small for what it reads, to the right it reads too little for its "
                   "size. The band holds 95 % of what one run may reach; the dot is the choice, crosses do not fit "
                   "the memory for serving.",
                   "左侧模型太小，右侧读得太少。色带为单次运行结果的 95% 区间；圆点为所选规模，"
                   "叉号表示部署内存放不下。"),
    "order_only": ("Below the laws the height only orders the shapes: it is no loss.",
                   "在定律范围之下，高度只用于排序，不是损失。"),
    "axis_size": ("parameters", "参数量"),
    "numbers_title": ("Each number and where it comes from", "每个数字及其来源"),
    "number": ("number", "数字"), "value": ("value", "值"), "fitted": ("fitted on", "拟合范围"),
    "source": ("from", "来源"), "extrapolated": ("extrapolated:", "外推："),
    "runs_title": ("The small runs of the probe", "探测用的小型训练"),
    "size": ("size", "规模"), "tokens": ("tokens", "词元"), "steps": ("steps", "步数"),
    "bits": ("bits per byte", "每字节比特数"),
    "train": ("Train it", "开始训练"),
    "predicted": ("predicted", "预测"),
}


def say(key: str, **values: object) -> Text:
    """A phrase in both languages."""
    return filled(_PHRASES[key], **values)


def write_budget_page(plan: dict[str, Any], out: Path) -> Path:
    """Writes one page that loads nothing and returns its path. `plan` is what `plan_budget` gives."""
    write_text(out, render_budget(plan))
    return out


def render_budget(plan: dict[str, Any]) -> str:
    """The page as a string."""
    style = (_HERE / "report.css").read_text(encoding="utf-8") + (_HERE / "plan.css").read_text(encoding="utf-8")
    environment = _environment()
    environment.globals |= {"say": say, "n": numbers, "amount": amount}
    return environment.get_template("budget.html").render(
        plan=plan, choice=plan["choice"], curve=trade_off(plan), style=Markup(style), script=Markup(_SCRIPT),
        style_hash=_hash(style), script_hash=_hash(_SCRIPT), version=dougong.__version__)


def amount(value: float) -> Text:
    """A figure as each language counts; what is tiny, huge or a ratio in digits."""
    return numbers.compact(value) if 1000 <= value < 1e15 else Text.same(f"{value:.4g}")


def trade_off(plan: dict[str, Any]) -> Markup:
    """Loss over size on a logarithmic scale, with the interval as a band where a probe gave one."""
    options = [option for option in plan["curve"] if option["loss"] <= 1.5 * min(o["loss"] for o in plan["curve"])]
    sizes = [math.log10(option["parameters"]) for option in options]
    spread = [value for option in options for value in (option["interval"] or [option["loss"]])]
    low, high = min(spread), max(spread)
    room = 0.06 * (high - low) or 0.1
    low, high = low - room, high + room

    def px(size: float) -> float:
        span = max(sizes) - min(sizes) or 1.0
        return _LEFT + 16 + (size - min(sizes)) / span * (_WIDTH - _LEFT - _RIGHT - 32)

    def py(loss: float) -> float:
        return _TOP + (high - loss) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [] if plan["refused"] else [
        Markup('<path class="grid" d="M{} {:.1f}H{}"/><text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
               ).format(_LEFT, py(t), _WIDTH - _RIGHT, _LEFT - 9, py(t) + 4, tick_label(t).svg)
        for t in ticks(low, high, 5)]
    parts += [Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
        px(size), _HEIGHT - _BOTTOM + 20, numbers.compact(option["parameters"]).svg)
        for size, option in list(zip(sizes, options))[::max(1, len(options) // 10)]]
    parts.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
        _WIDTH - _RIGHT, _HEIGHT - 8, say("axis_size").svg))
    if options[0]["interval"]:
        edge = [f"{px(s):.1f} {py(o['interval'][0]):.1f}" for s, o in zip(sizes, options)]
        edge += [f"{px(s):.1f} {py(o['interval'][1]):.1f}" for s, o in reversed(list(zip(sizes, options)))]
        parts.append(Markup('<path class="c1" fill="currentColor" fill-opacity=".14" d="M{}Z"/>').format(
            "L".join(edge)))
    line = "L".join(f"{px(s):.1f} {py(o['loss']):.1f}" for s, o in zip(sizes, options))
    parts.append(Markup('<path class="line c1" d="M{}"/>').format(line))
    for size, option in zip(sizes, options):
        x, y = px(size), py(option["loss"])
        title = f"{option['num_layers']} × {option['dim']}"
        if not option["fits"]:
            parts.append(Markup('<path class="fails" d="M{:.1f} {:.1f}l10 10m0 -10l-10 10"><title>{}</title></path>'
                                ).format(x - 5, y - 5, title))
        elif option["size"] == plan["choice"]["size"]:
            parts.append(Markup('<g class="c0"><title>{}</title><circle class="dot" cx="{:.1f}" cy="{:.1f}" r="8"/></g>'
                                ).format(title, x, y))
    return Markup('<svg viewBox="0 0 {} {}" role="img">{}</svg>').format(_WIDTH, _HEIGHT, Markup("").join(parts))

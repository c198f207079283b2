"""The page of a judged model: each skill beside the answers that need no model, what was declined, and failures."""

from pathlib import Path
from typing import Any

from markupsafe import Markup

import dougong
from dougong.core.files import write_text
from dougong.report import numbers
from dougong.report.numbers import Text
from dougong.report.page import _environment, _hash
from dougong.report.plan_page import _SCRIPT

_HERE = Path(__file__).parent
_WIDTH, _ROW, _LEFT, _RIGHT, _TOP = 1040, 46, 190, 90, 34

_PHRASES: dict[str, tuple[str, str]] = {
    "kicker": ("An assistant, judged", "助手评测"),
    "parameters": ("{count} parameters", "{count} 参数"),
    "items": ("{count} questions it never saw", "{count} 个从未见过的问题"),
    "claimed": ("skills it claims", "达标的技能"),
    "claimed_of": ("of {count}: better than both answers without a model", "共 {count} 项：胜过两种无需模型的回答"),
    "right": ("right answers inside its skills", "技能范围内的正确率"),
    "declined": ("questions outside declined", "范围外问题的拒答率"),
    "declined_remark": ("of {count}; inside its skills it declines {inside}",
                        "共 {count} 个；范围内误拒 {inside}"),
    "skills_title": ("Skill by skill", "逐项技能"),
    "skills_lead": ("The dot is the share of right answers with its 95 % interval. The upright marks need no model: "
                    "the commonest answer of the training questions, and the answer of the most similar one.",
                    "圆点为正确率及其 95% 区间。两种竖标无需模型：训练问题中最常见的回答，以及最相似问题的回答。"),
    "model": ("the model", "模型"), "majority": ("commonest answer", "最常见回答"),
    "nearest": ("most similar question", "最相似问题"),
    "skill": ("skill", "技能"), "questions": ("questions", "问题数"), "claims": ("claimed", "达标"),
    "over_majority": ("model − commonest (95 %)", "模型 − 最常见（95%）"),
    "over_nearest": ("model − most similar (95 %)", "模型 − 最相似（95%）"),
    "yes": ("yes", "是"), "no": ("no", "否"),
    "failures_title": ("Ten failures, drawn at random", "随机抽取的十个失败"),
    "failures_lead": ("Not chosen: a seed drew them from all wrong answers.",
                      "未经挑选：由随机种子从全部错误回答中抽取。"),
    "successes_title": ("As many right answers", "同样多的正确回答"),
    "question": ("question", "问题"), "wanted": ("right answer", "正确回答"), "reply": ("its reply", "它的回答"),
    "none": ("There was none.", "没有。"),
    "stages_title": ("How it was made", "制作过程"),
    "stage": ("stage", "阶段"), "run": ("run", "目录"), "minutes": ("training", "训练用时"),
    "how": ("Skills are judged on items that no stage trained on; of Python's functions, on whole modules that no "
            "stage read. Answers count as right when they are equal but for white space. Replies are greedy.",
            "评测题目从未用于任何阶段的训练；涉及 Python 函数的题目来自各阶段都未读过的模块。"
            "回答除空白外完全一致才算正确。回答采用贪心解码。"),
}


def say(key: str, **values: object) -> Text:
    """The phrase `key` with its braces filled."""
    return Text(*_PHRASES[key]).filled(**values)


def write_skills_page(judged: dict[str, Any], out: Path) -> Path:
    """Writes one page that loads nothing and returns its path. `judged` is what `recipes.judge` gives."""
    write_text(out, render_skills(judged))
    return out


def render_skills(judged: dict[str, Any]) -> str:
    """The page as a string."""
    style = (_HERE / "report.css").read_text(encoding="utf-8") + (_HERE / "plan.css").read_text(encoding="utf-8")
    environment = _environment()
    environment.globals |= {"say": say, "percent": percent, "pair": pair, "n": numbers}
    return environment.get_template("skills.html").render(
        judged=judged, headline=headline(judged), chart=chart(judged["scores"]), style=Markup(style),
        script=Markup(_SCRIPT), style_hash=_hash(style), script_hash=_hash(_SCRIPT), version=dougong.__version__)


def headline(judged: dict[str, Any]) -> list[tuple[Text, Text, Text]]:
    """(what, how much, remark)."""
    scores = judged["scores"]
    claimed = [score for score in scores if score["claimed"]]
    rows = [(say("claimed"), Text.same(len(claimed)), say("claimed_of", count=len(scores))),
            (say("right"), percent(judged["right"]), say("items", count=judged["items"]))]
    if outside := judged["outside"]:
        rows.append((say("declined"), percent(outside["declined"]),
                     say("declined_remark", count=outside["items"], inside=percent(judged["inside_declined"]))))
    return rows


def percent(share: float) -> Text:
    return Text.same(f"{share:.0%}" if share in (0, 1) or 0.1 <= share <= 0.9 else f"{share:.1%}")


def pair(interval: list[float] | None) -> Text:
    """An interval of a difference, in percentage points."""
    if interval is None:
        return numbers.UNKNOWN
    return Text.same(f"{100 * interval[0]:+.0f} … {100 * interval[1]:+.0f}".replace("-", numbers.MINUS))


def chart(scores: list[dict[str, Any]]) -> Markup:
    """One row a skill, shares from left to right."""
    height = _TOP + _ROW * len(scores) + 10

    def px(share: float) -> float:
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    parts = [Markup('<path class="grid" d="M{x:.1f} {}V{}"/><text class="tick" x="{x:.1f}" y="{}" text-anchor="middle">'
                    '{}</text>').format(_TOP - 6, height - 6, _TOP - 14, f"{tick}%", x=px(tick / 100))
             for tick in range(0, 101, 20)]
    for place, score in enumerate(scores):
        y = _TOP + _ROW * place + _ROW / 2
        colour = "c0" if score["claimed"] else "c8"
        low, high = score["interval"] or (score["model"], score["model"])
        parts.append(Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
            _LEFT - 16, y + 4, score["skill"]))
        for who, mark in (("majority", "c3"), ("nearest", "c1")):
            upright = Markup('<g class="{}"><title>{}: {:.1%}</title><rect x="{:.1f}" y="{:.1f}" width="3" height="22" '
                             'fill="currentColor"/></g>')
            parts.append(upright.format(mark, say(who).plain, score[who], px(score[who]) - 1.5, y - 11))
        dot = Markup('<g class="{}"><title>{}: {:.1%}</title><path d="M{:.1f} {y:.1f}H{:.1f}" stroke="currentColor" '
                     'stroke-width="2"/><circle cx="{:.1f}" cy="{y:.1f}" r="6" fill="currentColor"/></g>')
        parts.append(dot.format(colour, say("model").plain, score["model"], px(low), px(high), px(score["model"]), y=y))
        parts.append(Markup('<text class="tick" x="{}" y="{:.1f}">{}</text>').format(
            _WIDTH - _RIGHT + 16, y + 4, percent(score["model"]).en))
    return Markup('<svg viewBox="0 0 {} {}" role="img">{}</svg>').format(_WIDTH, height, Markup("").join(parts))

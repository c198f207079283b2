"""What fine-tuning changed: held-out losses of start and result, answers that are right, replies side by side."""

from dataclasses import dataclass
from typing import Any

from dougong.report.baselines import pair
from dougong.report.facts import RunFacts
from dougong.report.numbers import Text, fixed, is_number, percent
from dougong.report.words import say, word


@dataclass(frozen=True)
class Replies:
    """One question and what was said to it, as (who, text) pairs; `asked` is (role, text)."""

    skill: str
    asked: list[tuple[str, str]]
    said: list[tuple[Text, str, str]]


@dataclass(frozen=True)
class BeforeAfter:
    """`rows` are (measure, before, after)."""

    note: Text
    rows: list[tuple[Text, Text, Text]]
    difference: Text | None
    replies: list[Replies]


def read_before_after(run: RunFacts) -> BeforeAfter | None:
    """What the newest `before_after` event tells; None where there is none."""
    event = run.before_after
    if not event:
        return None
    loss = event.get("loss") or {}
    rows = []
    if is_number(loss.get("before")) and is_number(loss.get("after")):
        rows.append((say("reply_loss"), fixed(loss["before"]), fixed(loss["after"])))
    interval = pair(loss.get("interval"))
    difference = say("reply_loss_difference", difference=signed(loss["difference"]), low=signed(interval[0]),
                     high=signed(interval[1]), n=loss.get("conversations", "–")) \
        if interval and is_number(loss.get("difference")) else None
    return BeforeAfter(
        say("before_after_note", start=event.get("start", "–"), split=word(event.get("split", "–"))),
        rows + _matches(event.get("exact_match") or {}), difference,
        [_replies(one) for one in event.get("replies") or [] if isinstance(one, dict)])


def signed(value: float) -> Text:
    return Text.same(f"{value:+.3f}".replace("-", "−"))


def _matches(found: dict[str, Any]) -> list[tuple[Text, Text, Text]]:
    """The share of answers that are right, in all and, where there are several, by skill."""
    before, after = found.get("before") or {}, found.get("after") or {}
    if not is_number(before.get("exact_match")) or not is_number(after.get("exact_match")):
        return []
    rows = [(say("answers_right"), percent(before["exact_match"], 1), percent(after["exact_match"], 1))]
    skills = before.get("exact_match_by_skill") or {}
    if len(skills) > 1:
        later = after.get("exact_match_by_skill") or {}
        rows += [(Text.same(f"· {skill}"), percent(value, 1), percent(later.get(skill, 0.0), 1))
                 for skill, value in skills.items()]
    return rows


def _replies(one: dict[str, Any]) -> Replies:
    asked = [(str(m.get("role")), str(m.get("content"))) for m in one.get("asked", [])]
    return Replies(str(one.get("skill") or ""), asked,
                   [(say(key), key, str(one.get(key) or "")) for key in ("before", "after", "reference")])

"""How often a model answers rightly, skill by skill, beside two answers that need no model.

The majority answer is the commonest of the training items of a skill; the nearest neighbour's is that of the training
item whose question is most alike (cosine of TF-IDF over character n-grams). A skill is claimed where the model beats
both with a paired interval that excludes 0. Questions outside every skill should be declined, those inside should not.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dougong.evaluate.statistics import bootstrap_ratio, wilson_interval

_SIZES = (3, 4, 5)
OUTSIDE = "declining"
"""the skill of questions that should be declined"""


class Item(Protocol):
    """A question with the one answer that counts as right."""

    @property
    def skill(self) -> str: ...

    @property
    def prompt(self) -> str: ...

    @property
    def answer(self) -> str: ...


@dataclass(frozen=True)
class Answered:
    """One held-out item with every answer given to it."""

    skill: str
    prompt: str
    answer: str
    reply: str
    majority: str
    nearest: str

    @property
    def right(self) -> bool:
        return same(self.reply, self.answer)


@dataclass(frozen=True)
class SkillScore:
    """Shares of right answers, each of `items`; the differences are paired over items, with 95 % intervals."""

    skill: str
    items: int
    model: float
    interval: tuple[float, float] | None
    majority: float
    nearest: float
    over_majority: tuple[float, float] | None
    over_nearest: tuple[float, float] | None

    @property
    def claimed(self) -> bool:
        """Whether the model is better than both by more than chance."""
        return all(pair is not None and pair[0] > 0 for pair in (self.over_majority, self.over_nearest))

    def to_dict(self) -> dict[str, Any]:
        return {"skill": self.skill, "items": self.items, "model": self.model, "interval": self.interval,
                "majority": self.majority, "nearest": self.nearest, "over_majority": self.over_majority,
                "over_nearest": self.over_nearest, "claimed": self.claimed}


def same(reply: str, answer: str) -> bool:
    """Equal but for white space."""
    return re.sub(r"\s+", " ", reply).strip() == re.sub(r"\s+", " ", answer).strip()


def answer_all(items: Sequence[Item], training: Sequence[Item],
               reply: Callable[[Sequence[str]], Sequence[str]]) -> list[Answered]:
    """Every held-out item with the model's reply and the two without a model; `reply` answers prompts in order."""
    replies = reply([item.prompt for item in items])
    found: list[Answered | None] = [None] * len(items)
    for skill in dict.fromkeys(item.skill for item in items):
        known = [item for item in training if item.skill == skill]
        places = [number for number, item in enumerate(items) if item.skill == skill]
        commonest = Counter(item.answer for item in known).most_common(1)[0][0] if known else ""
        near = nearest_answers([items[n].prompt for n in places], known)
        for number, neighbour in zip(places, near):
            item = items[number]
            found[number] = Answered(skill, item.prompt, item.answer, replies[number], commonest, neighbour)
    return [one for one in found if one is not None]


def scores(answered: Sequence[Answered], *, seed: int = 0) -> list[SkillScore]:
    """One score for each skill, in order of appearance."""
    return [_score(skill, [one for one in answered if one.skill == skill], seed)
            for skill in dict.fromkeys(one.skill for one in answered)]


def _score(skill: str, own: list[Answered], seed: int) -> SkillScore:
    model, majority, nearest = (np.array([same(getattr(one, who), one.answer) for one in own], float)
                                for who in ("reply", "majority", "nearest"))
    ones = np.ones(len(own))
    return SkillScore(skill, len(own), float(model.mean()), wilson_interval(int(model.sum()), len(own)),
                      float(majority.mean()), float(nearest.mean()),
                      bootstrap_ratio(model - majority, ones, seed=seed),
                      bootstrap_ratio(model - nearest, ones, seed=seed))


def nearest_answers(prompts: Sequence[str], known: Sequence[Item]) -> list[str]:
    """The answer of the known item whose question is most alike; the first of equals."""
    if not known:
        return [""] * len(prompts)
    places: dict[str, list[int]] = {}
    counts: dict[str, list[int]] = {}
    for number, item in enumerate(known):
        for gram, count in _grams(item.prompt).items():
            places.setdefault(gram, []).append(number)
            counts.setdefault(gram, []).append(count)
    rarity = {gram: math.log((1 + len(known)) / (1 + len(held))) + 1 for gram, held in places.items()}
    where = {gram: np.array(held) for gram, held in places.items()}
    weight = {gram: rarity[gram] * np.array(held, np.float64) for gram, held in counts.items()}
    lengths = np.zeros(len(known))
    for gram, held in where.items():
        lengths[held] += weight[gram] ** 2
    lengths = np.sqrt(np.maximum(lengths, 1e-24))
    return [known[_nearest(_grams(prompt), where, weight, rarity, lengths)].answer for prompt in prompts]


def _nearest(grams: Counter[str], where: dict[str, np.ndarray], weight: dict[str, np.ndarray],
             rarity: dict[str, float], lengths: np.ndarray) -> int:
    alike = np.zeros(len(lengths))
    for gram, count in grams.items():
        if gram in where:
            alike[where[gram]] += count * rarity[gram] * weight[gram]
    return int((alike / lengths).argmax())


def _grams(text: str) -> Counter[str]:
    """Character n-grams and how often each occurs."""
    text = " " + re.sub(r"\s+", " ", text).strip() + " "
    return Counter(text[at:at + size] for size in _SIZES for at in range(max(0, len(text) - size + 1)))

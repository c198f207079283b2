"""Tasks that are made, not collected: seeded, of any difficulty, each with the one answer that is right.

A prompt's own hash says whether it is for training, validation or test, so no held-out prompt is ever trained on,
whatever the seed and however many are drawn. `tasks(skill, split)` is a sequence to index; as a source of conversations
(`{kind: tasks}`) each item becomes a question and its answer.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from dougong.core.config import config
from dougong.core.errors import ConfigError, did_you_mean
from dougong.data.chat_sources import ChatSource, Found
from dougong.data.conversations import Conversation
from dougong.data.split import SPLITS
from dougong.runtime.seeds import derive

REFUSAL = "I cannot help with that. I know some of Python's own functions, and small puzzles."
"""what a model is to say to questions outside its skills"""
_BORDERS = (0.8, 0.9)       # of the hash: training below the first, validation below the second, then test
_HELD_OUT_SHARE = 0.1
_LEVELS = (1, 3)


@dataclass(frozen=True)
class TaskItem:
    """One task. `difficulty` is the level it was drawn at: digits, things to sort, depth of brackets, length."""

    id: str
    skill: str
    prompt: str
    answer: str
    difficulty: int

    def is_right(self, reply: str) -> bool:
        """Whether the reply is the answer, but for white space around it."""
        return reply.strip() == self.answer


Draw = Callable[[random.Random, int], tuple[str, str]]


def _number(source: random.Random, digits: int) -> int:
    return source.randrange(10 ** (digits - 1) if digits > 1 else 0, 10 ** digits)


def _addition(source: random.Random, level: int) -> tuple[str, str]:
    a, b = _number(source, level), _number(source, level)
    return f"What is {a} + {b}?", str(a + b)


def _reversed_addition(source: random.Random, level: int) -> tuple[str, str]:
    """The sum's last digit first: each digit then needs only what was written before it (Lee et al. 2023,
    arXiv:2307.03381, section 3)."""
    a, b = _number(source, level), _number(source, level)
    return f"{a}+{b}=", str(a + b)[::-1]


def _sorting(source: random.Random, level: int) -> tuple[str, str]:
    numbers = [source.randrange(100) for _ in range(level + 2)]
    return f"Sort: {' '.join(map(str, numbers))}", " ".join(map(str, sorted(numbers)))


def _largest(source: random.Random, level: int) -> tuple[str, str]:
    numbers = [source.randrange(100) for _ in range(level + 2)]
    return f"Largest: {' '.join(map(str, numbers))}", str(max(numbers))


def _brackets(source: random.Random, level: int) -> tuple[str, str]:
    """Half of them balanced; the others are one change away from it."""
    text = _balanced(source, 2 * level)
    if source.random() < 0.5:
        place = source.randrange(len(text))
        text = text[:place] + source.choice([sign for sign in "()[]{}" if sign != text[place]]) + text[place + 1:]
    return f"Balanced? {text}", "yes" if is_balanced(text) else "no"


def _balanced(source: random.Random, pairs: int) -> str:
    if not pairs:
        return ""
    inside = source.randrange(pairs)
    opening, closing = source.choice(("()", "[]", "{}"))
    return opening + _balanced(source, inside) + closing + _balanced(source, pairs - 1 - inside)


def is_balanced(text: str) -> bool:
    """Whether every bracket in the text is closed by its own kind, in order."""
    open_ones: list[str] = []
    for sign in text:
        if sign in "([{":
            open_ones.append(sign)
        elif sign in ")]}" and (not open_ones or open_ones.pop() + sign not in ("()", "[]", "{}")):
            return False
    return not open_ones


def _word(source: random.Random, length: int, letters: str = "abcdefghijklmnopqrstuvwxyz") -> str:
    return "".join(source.choice(letters) for _ in range(length))


def _counting(source: random.Random, level: int) -> tuple[str, str]:
    letters = source.sample("abcdefghijklmnopqrstuvwxyz", 3)
    word, asked = _word(source, 4 * level, "".join(letters)), source.choice(letters)
    return f"How many {asked} are in {word}?", str(word.count(asked))


def _copying(source: random.Random, level: int) -> tuple[str, str]:
    words = " ".join(_word(source, source.randint(2, 6)) for _ in range(2 * level))
    return f"Repeat: {words}", words


_OUTSIDE = (
    "What will the weather be like in {place} {day}?", "Book me a {thing} in {place} for {day}.",
    "How much is a {thing} in {place}?", "Who is the mayor of {place}?", "Call {name} and say that I am late {day}.",
    "What did {name} eat {day}?", "Which {thing} does {name} like best?", "Should I marry {name}?",
    "When does the train from {place} leave {day}?", "Is {name} at home {day}?",
    "Send the {thing} to {name} in {place}.", "Who won the match in {place} {day}?",
    "What is the phone number of {name} in {place}?")
_FILL = {
    "place": ("Amsterdam", "Bergen", "Cairo", "Dakar", "Dublin", "Geneva", "Havana", "Kyoto", "Lagos", "Lima", "Lisbon",
              "Madrid", "Nairobi", "Oslo", "Porto", "Quito", "Riga", "Seoul", "Tunis", "Wuhan"),
    "day": ("today", "tomorrow", "on Monday", "on Friday", "next week", "at noon", "tonight", "this evening"),
    "thing": ("bicycle", "book", "boat", "cake", "camera", "coat", "concert", "hotel", "lamp", "mirror", "phone",
              "piano", "room", "table", "ticket", "watch"),
    "name": ("Ada", "Bao", "Chidi", "Dana", "Elif", "Farid", "Grace", "Hana", "Ivan", "Jun", "Kofi", "Lena", "Mei",
             "Nadia", "Omar", "Priya", "Rosa", "Sami", "Tao", "Yuki"),
}


def _declining(source: random.Random, _level: int) -> tuple[str, str]:
    return source.choice(_OUTSIDE).format(**{key: source.choice(values) for key, values in _FILL.items()}), REFUSAL


SKILLS: dict[str, Draw] = {
    "addition": _addition, "reversed_addition": _reversed_addition, "sorting": _sorting, "largest": _largest,
    "brackets": _brackets, "counting": _counting, "copying": _copying, "declining": _declining}


def tasks(skill: str, split: str = "train", seed: int = 0, *, items: int = 1000,
          levels: tuple[int, int] = _LEVELS) -> "TaskSequence":
    """`items` tasks of one skill at levels from the first to the second. Raises ConfigError for an unknown skill."""
    if skill not in SKILLS:
        raise ConfigError(f"unknown skill {skill!r}.{did_you_mean(skill, SKILLS)}")
    if split not in SPLITS:
        raise ConfigError(f"no split {split!r}. Known: {', '.join(SPLITS)}.")
    if not 1 <= levels[0] <= levels[1] <= 12:
        raise ConfigError(f"levels {levels[0]} to {levels[1]}: give two from 1 to 12, the lower first.")
    return TaskSequence(skill, split, seed, items, levels)


@dataclass(frozen=True)
class TaskSequence(Sequence[TaskItem]):
    """Item i is drawn when it is asked for, from the seed, the split and i alone."""

    skill: str
    split: str
    seed: int
    items: int
    levels: tuple[int, int]

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[at] for at in range(*i.indices(self.items))]
        if not -self.items <= i < self.items:
            raise IndexError(i)
        i %= self.items
        source = random.Random(derive(self.seed, "tasks", self.skill, self.split, i))
        while True:
            level = source.randint(*self.levels)
            prompt, answer = SKILLS[self.skill](source, level)
            if split_of(prompt) == self.split:
                return TaskItem(f"{self.skill}/{self.split}/{i}", self.skill, prompt, answer, level)

    def __iter__(self) -> Iterator[TaskItem]:
        return (self[i] for i in range(self.items))


def split_of(prompt: str) -> str:
    """The split that a prompt belongs to, for ever."""
    place = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "little") / 2 ** 56
    return SPLITS[sum(place >= border for border in _BORDERS)]


@config
class Tasks(ChatSource):
    """Generated tasks as conversations of a question and its answer."""

    kind: Literal["tasks"] = "tasks"
    skills: tuple[str, ...] = tuple(SKILLS)
    """addition, reversed_addition, sorting, largest, brackets, counting, copying, declining"""
    items: int = Field(default=1000, ge=1)
    """of each skill for training; validation and test get a tenth as many"""
    levels: tuple[int, int] = _LEVELS
    """difficulty from … to: digits of a number, two less than the numbers to sort, half the pairs of brackets, …"""
    seed: int = Field(default=0, ge=0)

    @field_validator("skills")
    @classmethod
    def _known(cls, skills: tuple[str, ...]) -> tuple[str, ...]:
        for skill in skills:
            tasks(skill)
        return skills

    def inventory(self) -> Iterator[tuple[str, int, int]]:
        return iter(())

    def conversations(self, found: Found) -> Iterator[Conversation]:
        for skill in self.skills:
            for split in SPLITS:
                count = self.items if split == "train" else max(1, round(self.items * _HELD_OUT_SHARE))
                for item in tasks(skill, split, self.seed, items=count, levels=self.levels):
                    yield Conversation(item.id, self.label, ({"role": "user", "content": item.prompt},
                                                             {"role": "assistant", "content": item.answer}),
                                       skill=item.skill, answer=item.answer, split=split)

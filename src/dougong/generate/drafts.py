"""Guesses of what comes next, from what the text has said before (prompt lookup, Saxena 2023).

Such a guess is only ever compared with the token that is chosen anyway, so it changes no text and no distribution: the
chosen token equals guess x with the probability p(x), and where it differs it is a draw from p without x, which is what
speculative sampling prescribes for a draft that is certain (Leviathan et al. 2023, arXiv:2211.17192, algorithm 1).
Guesses of a model (`draft_model`) bring the law that they were drawn from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

_ORDERS = (4, 3, 2)   # tokens that must repeat; the longest repetition decides


@dataclass(slots=True)
class Guess:
    """Tokens that may follow. `laws[t]` (V): what token t was drawn from; none where it is certain."""

    tokens: list[int] = field(default_factory=list)
    laws: list[Tensor] = field(default_factory=list)


class Ahead:
    """How far ahead one row is guessed: further after success, less far after failure, as a wrong guess costs its
    share of a step."""

    def __init__(self, most: int) -> None:
        self.most = self.ahead = most

    def learn(self, guessed: int, right: int) -> None:
        self.ahead = min(self.most, 2 * self.ahead) if right == guessed else min(self.most, right + 1)

    def forget(self) -> None:
        """Drops what it holds, where the row goes back to waiting."""


class NGrams(Ahead):
    """Where each run of 2 to 4 tokens was last followed by another token."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self._after: dict[tuple[int, ...], int] = {}
        self._known = 0

    def guess(self, tokens: Sequence[int], room: int) -> list[int]:
        """At most `room` tokens that may follow; none where nothing repeats."""
        for end in range(max(self._known, 1), len(tokens)):   # tokens[end] follows the runs that end before it
            for order in _ORDERS:
                if end >= order:
                    self._after[tuple(tokens[end - order:end])] = end
        self._known = len(tokens)
        for order in _ORDERS:
            at = self._after.get(tuple(tokens[-order:])) if len(tokens) >= order else None
            if at is not None:
                return list(tokens[at:at + min(self.ahead, room)])
        return []

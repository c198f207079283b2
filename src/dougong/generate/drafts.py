"""Guesses of what comes next, from what the text has said before (prompt lookup, Saxena 2023).

A guess is only ever compared with the token that is chosen anyway, so it changes no text and no distribution: the
chosen token equals guess x with the probability p(x), and where it differs it is a draw from p without x, which is what
speculative sampling prescribes for a draft that is certain (Leviathan et al. 2023, arXiv:2211.17192, algorithm 1).
"""

from collections.abc import Sequence

_ORDERS = (4, 3, 2)   # tokens that must repeat; the longest repetition decides


class NGrams:
    """Where each run of 2 to 4 tokens was last followed by another token."""

    def __init__(self, most: int) -> None:
        self.most = self.ahead = most
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

    def learn(self, guessed: int, right: int) -> None:
        """Guesses further ahead after success, less far after failure: a wrong guess costs its share of a step."""
        self.ahead = min(self.most, 2 * self.ahead) if right == guessed else min(self.most, right + 1)

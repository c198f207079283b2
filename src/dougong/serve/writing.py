"""Tokens to a reply's text: whole characters, stop strings cut exactly, each token's probability beside its text."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dougong.generate.engine import Token
from dougong.generate.text import Detokenizer, StopStrings


@dataclass(frozen=True, slots=True)
class Told:
    """A token of a reply: where its text begins (characters), its log-probability and its rivals (nats)."""

    id: int
    start: int
    logprob: float | None
    alternatives: list[tuple[int, float]]


@dataclass(slots=True)
class Piece:
    """What became certain: text, the tokens that it came from, and at the end why it ends."""

    text: str
    tokens: list[Told]
    finish: str | None = None
    stop: str | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    """what it tells of tool calls (`calls.CallReader`)"""


class Writer:
    """One reply in the making. `text` is all of it so far, `count` the tokens drawn, the stop included."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = (), *,
                 hidden: frozenset[int] = frozenset(), strip: bool = False) -> None:
        """`hidden` ids end a reply and are no part of it; `strip` drops blanks before the first character."""
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stops = StopStrings(stops)
        self._hidden, self._strip = hidden, strip
        self._raw = 0                            # characters decoded, those held back included
        self._told: deque[Told] = deque()        # tokens whose text is held back
        self.text, self.count, self.finish = "", 0, None

    def write(self, token: Token) -> Piece:
        """Adds a token; the piece may be empty."""
        self.count += 1
        ends = token.finish == "stop" and token.id in self._hidden
        text = "" if ends else self._detokenizer.push(token.id)
        if not ends:
            self._told.append(Told(token.id, self._raw, token.logprob, token.alternatives or []))
        if token.finish:
            text += self._detokenizer.end()
        if self._strip and not self._raw:
            text = text.lstrip()
        self._raw += len(text)
        return self._certain(text, token.finish)

    def close(self, finish: str) -> Piece:
        """Ends the reply from outside; what was held back is given."""
        return self._certain(self._detokenizer.end(), finish)

    def _certain(self, text: str, finish: str | None) -> Piece:
        text, stop = self._stops.push(text)
        if stop is not None:
            finish = "stop"
        elif finish:
            text += self._stops.end()
        self.text += text
        self.finish = finish
        tokens = []
        while self._told and (self._told[0].start < len(self.text) or (finish and stop is None)):
            tokens.append(self._told.popleft())
        return Piece(text, tokens, finish, stop)

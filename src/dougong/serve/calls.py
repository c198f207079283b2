"""A reply that may call tools, read as it is written: content, then each call's name and arguments."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from dougong.generate.text import StopStrings
from dougong.serve.tools import Spelling
from dougong.serve.writing import Piece


@dataclass
class Call:
    """One call; `arguments` is JSON text, whole where the reply was not cut."""

    name: str
    arguments: str = ""
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def told(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class CallReader:
    """Reads what a grammar of `tools.grammar_of` lets a model write. `content` and `calls` are what came so far."""

    def __init__(self, spelling: Spelling, *, free: bool, stops: tuple[str, ...] = ()) -> None:
        """`free`: text may come before the calls; `stops` end that text, and never a call."""
        whole = spelling.begin + spelling.opening
        self._spelling, self._next = spelling, whole[len(spelling.mark):] if free else whole
        self._state = "text" if free else "opening"
        self._finder = StopStrings((spelling.mark, *stops))
        self._held, self._blank = "", ""    # not yet read; blanks that may stand before a call
        self._json = _Object()
        self.content, self.calls = "", list[Call]()

    def read(self, piece: Piece) -> None:
        """Replaces the piece's text by what of it is content, and adds what it tells of calls."""
        self._held += piece.text
        piece.text = ""
        while self._step(piece):
            pass
        if piece.finish and self._state == "text":
            piece.text += self._blank + self._finder.end()
        self.content += piece.text

    def _step(self, piece: Piece) -> bool:
        """Goes on by one part; False where more must come first."""
        if self._state == "text":
            return self._text(piece)
        if self._state == "ended":
            return False
        if self._state in ("opening", "closing"):
            return self._literal()
        if self._state == "name":
            name, middle, rest = self._held.partition(self._spelling.middle)
            if middle:
                self.calls.append(Call(name))
                piece.calls.append({"index": len(self.calls) - 1, **self.calls[-1].told()})
                self._state, self._held, self._json = "arguments", rest, _Object()
            return bool(middle)
        size = self._json.read(self._held)
        given, self._held = self._held[:size], self._held[size:]
        if given:
            self.calls[-1].arguments += given
            piece.calls.append({"index": len(self.calls) - 1, "function": {"arguments": given}})
        if self._json.ended:
            self._state, self._next = "closing", self._spelling.closing
        return self._json.ended

    def _text(self, piece: Piece) -> bool:
        certain, found = self._finder.push(self._held)
        self._held, text = "", self._blank + certain
        self._blank = text[len(text.rstrip()):]
        piece.text += text.rstrip()
        if found is None:
            return False
        if found != self._spelling.mark:
            piece.text, self._blank = piece.text + self._blank, ""
            piece.stop, piece.finish, self._state = found, "stop", "ended"
            return False
        self._state, self._held = "opening", self._finder.rest
        return True

    def _literal(self) -> bool:
        if len(self._held) < len(self._next) or not self._held:
            return False
        self._held = self._held[len(self._next):]
        if self._state == "opening":
            self._state = "name"
        else:
            self._state, self._next = "opening", self._spelling.between + self._spelling.opening
        return True


class SpelledOut:
    """A tokenizer that writes special tokens by their names: a template may spell calls with some."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._names = {id: name for name, id in tokenizer.special_tokens.items()}
        self.document_id, self.vocab_size, self.encode = tokenizer.document_id, tokenizer.vocab_size, tokenizer.encode

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._names[key] * len(list(run)) if key >= 0 else self._tokenizer.decode(list(run))
                       for key, run in groupby(ids, lambda id: id if id in self._names else -1))


class _Object:
    """Finds the end of a JSON object."""

    def __init__(self) -> None:
        self._depth, self._quoted, self._escaped, self.ended = 0, False, False, False

    def read(self, text: str) -> int:
        """How many of these characters belong to the object."""
        for at, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = character == "\\", character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.ended = True
                    return at + 1
        return len(text)

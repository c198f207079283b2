"""Structured output: a text that cannot leave a JSON schema, a regular expression, a choice or a grammar.

The parser is llguidance's. A `Grammars` knows a tokenizer's bytes; each of its methods compiles one constraint, or
raises ConfigError, before a request is made of it: nobody else is concerned. Parsers have limits on work and memory, so
a pattern that explodes ends as an error too.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from dougong.core.errors import ConfigError, DataError, MissingExtraError

ONE_BLANK = {"whitespace_pattern": r"[\x20\x0A]"}   # at most, between tokens: a model may love spaces too much
_BEFORE = "\x02"   # merges with nothing; SentencePiece puts a blank of its own before it, and none behind
Encode = Callable[[str], Sequence[int]]


class Grammars:
    """Compiles constraints for one tokenizer. Building it reads the whole vocabulary; keep it.

    `pieces[id]` is what a token adds to the text, in bytes; of special tokens (`special_ids`), which are no text and
    never allowed but for `stop_id`, it is their name. Text that a constraint leaves no choice about is written in the
    tokens of `encode`, in which the model has read it. Raises MissingExtraError without llguidance.
    """

    def __init__(self, pieces: Sequence[bytes], encode: Encode, *, stop_id: int, special_ids: Sequence[int] = (),
                 ) -> None:
        try:
            import llguidance
        except ImportError:
            raise MissingExtraError("llguidance", "serve", "Structured output (JSON schema, regex, choice)") from None
        self._matcher, self._limits = llguidance.LLMatcher, llguidance.LLParserLimits(verbose_errors=False)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(pieces, encode, stop_id, special_ids)))  # type: ignore[arg-type]

    def json_schema(self, schema: Mapping[str, Any] | str) -> "Grammar":
        """A JSON value that the schema allows; `{}` allows any. A keyword that cannot be held to is refused."""
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema)
            if not isinstance(json.loads(text), dict):
                raise ValueError("a schema is a JSON object, such as {\"type\": \"object\"}")
            grammar = self._matcher.grammar_from_json_schema(text, defaults=ONE_BLANK)  # type: ignore[arg-type]
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"the JSON schema cannot be read: {error}") from None
        return self._compile(grammar, "JSON schema")

    def regex(self, pattern: str) -> "Grammar":
        """A text that the whole pattern matches (syntax: that of Rust's `regex`, without look-around)."""
        return self._compile(self._matcher.grammar_from_regex(pattern), "regular expression")

    def choice(self, options: Sequence[str]) -> "Grammar":
        """One of these texts."""
        if not options or any(not option for option in options):
            raise ConfigError("a choice needs at least one text, and none may be empty.")
        lark = "start: " + " | ".join(json.dumps(option, ensure_ascii=False) for option in options)
        return self._compile(self._matcher.grammar_from_lark(lark), "choice")

    def lark(self, grammar: str) -> "Grammar":
        """A text of a context-free grammar in llguidance's dialect of Lark."""
        return self._compile(self._matcher.grammar_from_lark(grammar), "grammar")

    def _compile(self, grammar: str, kind: str) -> "Grammar":
        try:
            matcher = self._matcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        except Exception as error:   # the binding's own
            raise ConfigError(f"the {kind} cannot be used: {error}") from None
        if matcher.is_error():
            raise ConfigError(f"the {kind} cannot be used: {matcher.get_error()}")
        return Grammar(matcher)


class Grammar:
    """One reply's constraint (`request.Constraint`); `copy` gives another reply of the same kind its own."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> "Grammar":
        """A constraint in the same state."""
        return Grammar(self._matcher.deep_copy())

    def allowed(self) -> Bool[Tensor, "V"]:
        """The tokens that may come next; the stop token among them where the text is complete."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, bitorder="little").view(np.bool_))

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            self._check()
            raise ValueError(f"token {token} does not continue the structured text")

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the structured text cannot go on: {self._matcher.get_error()}")


class _Vocabulary:
    """A tokenizer as llguidance asks for one, which lets only the first token of a forced text pass."""

    def __init__(self, pieces: Sequence[bytes], encode: Encode, stop_id: int, special_ids: Sequence[int]) -> None:
        self._encode = encode
        self.tokens, self.eos_token_id, self.bos_token_id = list(pieces), stop_id, None
        self.special_token_ids = sorted({stop_id, *special_ids})
        special = set(self.special_token_ids)
        self._single = {piece: id for id, piece in enumerate(pieces) if len(piece) == 1 and id not in special}

    def __call__(self, text: bytes) -> list[int]:
        """Its tokens within a longer text; byte by byte where the tokenizer would change it, or lacks a character."""
        for before in ("", _BEFORE):
            try:
                ids = [int(id) for id in self._encode(before + text.decode())][len(self._encode(before)):]
            except DataError:
                break
            if b"".join(self.tokens[id] for id in ids) == text:
                return ids
        return [self._single[bytes([byte])] for byte in text if bytes([byte]) in self._single]

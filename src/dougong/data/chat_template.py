"""Conversations to token ids: the run's chat template in a sandbox, or a plain one for a model that has none.

A template spells its turns with special tokens, and what people write must never become one. So a special token's name
inside a message is broken by a mark before the template sees it; what the template wrote is cut at the names that are
left, and the mark is taken out again.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from dougong.core.errors import ConfigError

PLAIN = """\
{%- for message in messages -%}
{%- if message.role == "system" -%}{{ message.content | trim }}{{ "\\n\\n" }}
{%- elif message.role == "user" -%}User: {{ message.content | trim }}{{ "\\n" }}
{%- else -%}Assistant: {{ message.content | trim }}{{ "\\n" }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}Assistant:{%- endif -%}
"""
"""For a base model: turns named by words, as a text of the web would. It was not trained on, so replies are rough."""

_PLAIN_STOPS = ("\nUser:",)
_SECONDS = 1.0
_CHARACTERS = 4 << 20
_REPEATS = 1 << 20
_MARK = "\ufdd0"   # a code point that Unicode promises never to give a meaning


class ChatTemplate:
    """A model's way to spell a conversation. `own` says whether it is the run's, `stop_ids` and `stops` end a reply."""

    def __init__(self, tokenizer: Any, source: str | None = None, *, day: datetime | None = None) -> None:
        """`source` defaults to the tokenizer's template, `day` (what a template that writes the date takes for today)
        to the clock. Raises ConfigError where it is no template."""
        source = source or getattr(tokenizer, "chat_template", None)
        self.own, self.source = source is not None, source or PLAIN
        self._tokenizer, self._day = tokenizer, day
        self._names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, self._names))})") if self._names else None
        try:
            self._template = _environment().from_string(self.source)
        except TemplateError as error:
            raise ConfigError(f"the chat template cannot be read: {error}.") from None
        self.stops = () if self.own else _PLAIN_STOPS
        self.stop_ids = self._turn_ends() if self.own else frozenset()

    @property
    def special_tokens(self) -> dict[str, int]:
        return self._tokenizer.special_tokens

    def encode(self, messages: Sequence[dict[str, Any]], *, reply: bool = True,
               tools: Sequence[dict[str, Any]] | None = ()) -> list[int]:
        """The ids of a conversation, with the beginning of the reply. Raises ConfigError where the template does.

        What may stand in messages and `tools`, names and arguments of calls included, becomes no special token.
        """
        ids: list[int] = [] if self.own or self._begin is None else [self._begin]
        return ids + self.ids(*self.spell(messages, reply=reply, tools=tools or ()))

    def spell(self, messages: Sequence[dict[str, Any]], *, reply: bool, tools: Sequence[dict[str, Any]] = (),
              mark: str | None = None) -> tuple[str, str]:
        """The text of a conversation, special tokens' names that people wrote being broken, and what breaks them.
        Raises ConfigError where the template does."""
        sign = mark or self.mark_for([messages, tools])
        broken, theirs = (_each_text(value, lambda text: self._break(text, sign)) for value in (messages, tools))
        return self.render(broken, reply=reply, tools=theirs), sign

    def mark_for(self, value: Any) -> str:
        """A text that occurs in none of the texts within."""
        mark, found = _MARK, json.dumps(value, ensure_ascii=False, default=str)
        while mark in found:
            mark += _MARK
        return mark

    def ids(self, text: str, mark: str) -> list[int]:
        """The ids of what `spell` wrote, or of a part of it."""
        ids: list[int] = []
        for part in self.split(text):
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
            elif part:
                ids += [int(id) for id in self._tokenizer.encode(part.replace(mark, ""))]
        return ids

    @property
    def _begin(self) -> int | None:
        return getattr(self._tokenizer, "begin_id", self._tokenizer.document_id)

    @property
    def stop_names(self) -> list[str]:
        """The names of `stop_ids`."""
        return [name for name in self._names if self._tokenizer.special_tokens[name] in self.stop_ids]

    def split(self, text: str) -> list[str]:
        """The text cut at the names of special tokens, which are parts of their own."""
        return self._cut.split(text) if self._cut else [text]

    def _break(self, text: str, mark: str) -> str:
        return text if self._cut is None else self._cut.sub(lambda found: found[0][:1] + mark + found[0][1:], text)

    def render(self, messages: Sequence[dict[str, Any]], *, reply: bool,
               tools: Sequence[dict[str, Any]] | None = None) -> str:
        """The conversation as text; `reply` adds what an assistant's turn begins with."""
        def name(id: int | None) -> str:
            return next((name for name, held in self._tokenizer.special_tokens.items() if held == id), "")

        def refuse(message: str) -> None:
            raise ConfigError(f"the chat template refuses this conversation: {message}")

        pieces, size = [], 0
        try:
            with _deadline(_SECONDS):
                for piece in self._template.generate(
                        messages=messages, add_generation_prompt=reply, tools=tools or None, raise_exception=refuse,
                        bos_token=name(self._begin), eos_token=name(self._tokenizer.document_id),
                        strftime_now=lambda form: (self._day or datetime.now()).strftime(form)):
                    pieces.append(piece)
                    size += len(piece)
                    if size > _CHARACTERS:
                        raise ConfigError(f"the chat template writes more than {_CHARACTERS:,} characters.")
        except TimeoutError:
            raise ConfigError(f"the chat template did not end within {_SECONDS:g} s.") from None
        except SecurityError as error:
            raise ConfigError(f"the chat template reaches outside its sandbox: {error}.") from None
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError,
                RecursionError) as error:
            raise ConfigError(f"the chat template cannot spell this conversation: {error}.") from None
        return "".join(pieces)

    def _turn_ends(self) -> frozenset[int]:
        """The special token that the template writes behind an assistant's words."""
        word = "dougong"
        try:
            text = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": word}], reply=False)
        except ConfigError:
            return frozenset()
        found = self._cut.search(text, text.rfind(word) + len(word)) if self._cut and word in text else None
        return frozenset() if found is None else frozenset({self._tokenizer.special_tokens[found[0]]})


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Messages with every text in them changed, those inside tool calls too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_each_text(key, change): _each_text(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(inner, change) for inner in value]
    return value


def _environment() -> ImmutableSandboxedEnvironment:
    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """Text and lists may be repeated, memory may not be filled with them."""
            numbers = [value for value in (left, right) if isinstance(value, int)]
            if operator == "**" or any(abs(number) > _REPEATS for number in numbers):
                raise SecurityError(f"{operator} with such numbers")
            return super().call_binop(context, operator, left, right)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment


class _deadline:
    """Stops Python code of this thread that runs longer, a loop without output included: it is traced line by line,
    which a template of some dozen lines does not notice."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, _frame: Any, _event: str, _value: Any) -> Any:
        if time.monotonic() > self._end:
            raise TimeoutError
        return self._trace

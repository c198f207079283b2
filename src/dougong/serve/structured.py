"""`response_format`: from OpenAI's words, and a few more, to a constraint of the engine."""

import asyncio
from collections.abc import Callable
from typing import Any

from dougong.core.errors import ConfigError, MissingExtraError
from dougong.generate.grammar import Grammar, Grammars
from dougong.serve.bodies import ResponseFormat
from dougong.serve.errors import ApiError

_SECONDS = 5.0   # to compile one constraint; beside the event loop, so that only its own client waits
_NEEDS = {"json_schema": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}


class Structured:
    """The constraints of one model; its vocabulary is read at the first one asked for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._grammars: dict[int, Grammars] = {}

    async def compile(self, form: ResponseFormat | None, stop_id: int | None) -> Grammar | None:
        """None for plain text. Raises ApiError 400 that says what is wrong with the constraint."""
        if form is None:
            return None
        for name in ("json_schema", "regex", "choice", "grammar"):
            if (getattr(form, name) is not None) != (_NEEDS.get(form.type) == name):
                said = "is missing" if _NEEDS.get(form.type) == name else f"has no effect with type {form.type!r}"
                raise _wrong(f"{name} {said}", f"response_format.{name}")
        if form.type == "text":
            return None
        if stop_id is None:
            raise _wrong("this model has no token that ends a text, so none can be held to a form")
        return await _beside(lambda: self._compile(form, stop_id), "response_format")

    async def lark(self, grammar: Callable[[], str], stop_id: int, param: str) -> Grammar:
        """A grammar that the server writes itself, for a request's `param`. Raises as `compile`."""
        return await _beside(lambda: self._of(stop_id).lark(grammar()), param)

    def _compile(self, form: ResponseFormat, stop_id: int) -> Grammar:
        grammars = self._of(stop_id)
        makers: dict[str, Callable[[], Grammar]] = {
            "json_object": lambda: grammars.json_schema({"type": "object"}),
            "json_schema": lambda: grammars.json_schema(_schema(form.json_schema or {})),
            "regex": lambda: grammars.regex(form.regex or ""), "choice": lambda: grammars.choice(form.choice or []),
            "grammar": lambda: grammars.lark(form.grammar or "")}
        return makers[form.type]()

    def _of(self, stop_id: int) -> Grammars:
        if stop_id not in self._grammars:
            codec = self._tokenizer
            self._grammars[stop_id] = Grammars(codec.pieces, codec.encode, stop_id=stop_id,
                                               special_ids=sorted(codec.special_tokens.values()))
        return self._grammars[stop_id]


async def _beside(compile: Callable[[], Grammar], param: str) -> Grammar:
    """Compiled in a thread."""
    try:
        async with asyncio.timeout(_SECONDS):
            return await asyncio.to_thread(compile)
    except TimeoutError:
        raise _wrong(f"the constraint could not be compiled within {_SECONDS:g} s", param) from None
    except (MissingExtraError, ConfigError) as error:
        raise _wrong(str(error), param) from None


def _schema(wrapped: dict[str, Any]) -> dict[str, Any]:
    """The schema in `{"name": …, "schema": …, "strict": …}`. What holds here is always strict."""
    unknown = set(wrapped) - {"name", "schema", "strict", "description"}
    if unknown or not isinstance(wrapped.get("schema"), dict):
        raise ConfigError(f"json_schema has a 'schema' (an object), and may have name, description and strict"
                          f"{'; not ' + repr(min(unknown))[:60] if unknown else ''}")
    return wrapped["schema"]


def _wrong(message: str, param: str = "response_format") -> ApiError:
    field = param.partition(".")[0]
    return ApiError(400, f"{field}: {message}"[:900].rstrip(".") + ".", param=param, code=f"invalid_{field}")

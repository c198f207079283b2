"""Tool calls as a model's own chat template spells them, and the grammar that holds a reply to that spelling.

Nothing is guessed from free text: a conversation with known names and arguments is rendered once, and what stands
around them is the spelling. A reply is then constrained to it by token, so what comes back is read, not parsed.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dougong.core.errors import ConfigError
from dougong.data.chat_template import ChatTemplate
from dougong.generate.grammar import ONE_BLANK

_WORD, _FIRST, _SECOND, _ID = "dougong_word", "dougong_first", "dougong_second", "dougongid"
_ARGUMENTS = ({"dougong_key": "dougong_one"}, {"dougong_key": "dougong_two"})


@dataclass(frozen=True)
class Spelling:
    """`begin`, then (`opening` NAME `middle` ARGUMENTS `closing`) once or with `between`, then `end`.

    `mark` is what no reply says unless it calls: a special token, or the text before the first JSON, or all of the
    opening where it is JSON from the first character on. `as_text`: the template wants the arguments of earlier calls
    as JSON text, not as an object.
    """

    begin: str
    opening: str
    middle: str
    closing: str
    between: str
    end: str
    mark: str
    as_text: bool


def spelling_of(template: ChatTemplate) -> Spelling:
    """Raises ConfigError that says why a template cannot spell calls."""
    if not template.own:
        raise _cannot("this model has none of its own (a base model, not trained on conversations)")
    if not template.stop_ids:
        raise _cannot("it writes no special token behind an assistant's turn")
    reasons = []
    for as_text in (False, True):
        try:
            return _derive(template, as_text)
        except ConfigError as error:
            reasons.append(str(error))
    raise ConfigError(reasons[0])


def _derive(template: ChatTemplate, as_text: bool) -> Spelling:
    user = {"role": "user", "content": "a"}
    tools = [{"type": "function", "function": {"name": name, "description": "d", "parameters": {
        "type": "object", "properties": {}}}} for name in (_FIRST, _SECOND)]
    calls = [{"id": f"{_ID}{i}", "type": "function", "function": {
        "name": name, "arguments": json.dumps(given) if as_text else given}}
        for i, (name, given) in enumerate(zip((_FIRST, _SECOND), _ARGUMENTS))]

    def rendered(content: str) -> str:
        turn = {"role": "assistant", "content": content, "tool_calls": calls}
        return template.render([user, turn], reply=False, tools=tools)

    text = rendered(_WORD)
    begin = text.find(_WORD) + len(_WORD) if _WORD in text else -1
    if begin < 0:     # content or calls, not both
        text, before = rendered(""), template.render([user], reply=True, tools=tools)
        if not text.startswith(before):
            raise _cannot("what it writes before a call is not what a reply begins after")
        begin = len(before)
    if _FIRST not in text[:begin]:
        raise _cannot("it does not show the tools to the model")
    turn = text[begin:]
    if _ID in turn:
        raise _cannot("it spells the ids of calls, which a model cannot know")
    one, two = (r"\{\s*" + r"\s*:\s*".join(re.escape(json.dumps(part)) for pair in given.items() for part in pair)
                + r"\s*\}" for given in _ARGUMENTS)
    found = re.fullmatch(f"(.*?){_FIRST}(.*?){one}(.*?){_SECOND}(.*?){two}(.*)", turn, re.DOTALL)
    if found is None or found[2] != found[4] or not found[2]:
        raise _cannot("it does not spell each call as its name and then its arguments as a JSON object")
    return _cut(template, found[1], found[2], found[3], found[5], as_text)


def _cut(template: ChatTemplate, first: str, middle: str, gap: str, rest: str, as_text: bool) -> Spelling:
    """Splits what stands before the first call, between the two, and behind the second."""
    ends = [at for name, id in template.special_tokens.items() if id in template.stop_ids
            and (at := rest.find(name)) >= 0]
    if not ends:
        raise _cannot("it writes no special token behind a turn with calls")
    rest = rest[:min(ends)]
    size = next((n for n in range(min(len(first), len(gap)), 0, -1) if first[-n:] == gap[-n:]), 0)
    opening, begin, gap = first[len(first) - size:], first[:len(first) - size], gap[:len(gap) - size]
    blank = len(opening) - len(opening.lstrip())
    gap, opening, begin = gap + opening[:blank], opening[blank:], begin.lstrip()
    same = next((n for n in range(min(len(gap), len(rest)), -1, -1) if gap[:n] == rest[:n]), 0)
    closing, between, end = gap[:same], gap[same:], rest[same:].strip()
    if not opening or not (begin + opening).strip():
        raise _cannot("nothing marks where a call begins")
    whole = begin + opening
    mark = next(part for part in template.split(whole.partition("{")[0].rstrip() or whole) if part)
    return Spelling(begin, opening, middle, closing, between, end, mark, as_text)


def grammar_of(spelling: Spelling, template: ChatTemplate, functions: Sequence[dict[str, Any]], *, free: bool,
               several: bool) -> str:
    """The grammar (llguidance's Lark) of a reply: one call or `several`; `free`: or text, or text and then calls."""
    def said(text: str) -> str:
        return " ".join(f"<[{template.special_tokens[part]}]>" if part in template.special_tokens
                        else json.dumps(part) for part in template.split(text) if part)

    mark, whole = spelling.mark, spelling.begin + spelling.opening
    lines = ["%llguidance {}"]
    more = f" ({said(spelling.between + spelling.opening)} named)*" if several else ""
    calls = f"named{more} {said(spelling.end)}"
    if free:
        special = mark in template.special_tokens
        lines += [f"start: TEXT | head {said(whole[len(mark):])} {calls}",
                  f"head{'' if special else '[lazy]'}: TEXT {said(mark)}",
                  "TEXT: /(.|\\n)*/" + (f" & ~/(.|\\n)*{_pattern(mark)}(.|\\n)*/" if special else "")]
    else:
        lines.append(f"start: {said(whole)} {calls}")
    named = [f"{said(function['name'] + spelling.middle)} arguments_{i} {said(spelling.closing)}"
             for i, function in enumerate(functions)]
    lines.append("named: " + " | ".join(named))
    for i, function in enumerate(functions):
        schema = {"x-guidance": ONE_BLANK, **schema_of(function)}
        lines.append(f"arguments_{i}: %json {json.dumps(schema)}")
    return "\n".join(lines) + "\n"


def schema_of(function: dict[str, Any]) -> dict[str, Any]:
    """The arguments' schema; a function that names no parameters takes none. Raises ConfigError for no object."""
    schema = function.get("parameters") or {"properties": {}, "additionalProperties": False}
    if schema.get("type", "object") != "object":
        raise ConfigError(f"the parameters of {function['name']!r} have the type {schema['type']!r}; arguments are "
                          "always an object. Write {\"type\": \"object\", \"properties\": {…}}.")
    return {"type": "object", **schema}


def _pattern(text: str) -> str:
    """As a regular expression between slashes."""
    return re.escape(text).replace("/", r"\/")


def _cannot(why: str) -> ConfigError:
    return ConfigError(f"this model's chat template cannot spell tool calls: {why}.")

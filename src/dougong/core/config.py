"""Recipes' building material: frozen typed configs, choices by `kind`, overrides, differences, JSON schema.

A config is a pydantic dataclass whose unknown keys are refused. A field that offers a choice is annotated
`Annotated[X, chosen_from(TABLE)]`: its value is a config found in the table by its `kind`, so nothing in a file can
name an import path. `None` in a derivable field means "derive it"; `dougong.recipes` fills it in and says why.
"""

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar, dataclass_transform

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as _pydantic_dataclass
from pydantic_core import core_schema

from dougong.core.errors import ConfigError, did_you_mean
from dougong.core.table import Table

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field, Field))
def config(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen, keyword-only, slotted, validated config that refuses unknown keys."""
    strict = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
    return _pydantic_dataclass(frozen=True, kw_only=True, slots=True, config=strict)(cls)  # type: ignore


@dataclasses.dataclass(frozen=True)
class chosen_from:
    """Marks a field whose value is a config found in `table` by its `kind`.

    Accepts a config, a mapping with `kind`, or just the kind as a string.
    """

    table: Table
    optional: bool = False

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> Any:
        return core_schema.with_info_plain_validator_function(self._choose)

    def __get_pydantic_json_schema__(self, _schema: Any, _handler: Any) -> Any:
        return {"type": "object"}  # spelled out by `json_schema`

    def _choose(self, value: Any, info: Any) -> Any:
        if value is None and self.optional:
            return None
        if isinstance(value, str):
            value = {"kind": value}
        if isinstance(value, Mapping):
            if "kind" not in value:
                raise ConfigError(f"{info.field_name!r} needs a 'kind'. Known: {', '.join(sorted(self.table))}.")
            return from_dict(self.table[str(value["kind"])], value, where=info.field_name or "")
        if getattr(value, "kind", None) not in self.table:
            raise ConfigError(f"{info.field_name}={value!r} is no {self.table.what}. "
                              f"Known: {', '.join(sorted(self.table))}.")
        return value


class _Once(yaml.SafeLoader):
    """YAML without repeated keys, of which the first would be dropped."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node, lines = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in lines:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands here again, first in line "
                                           f"{lines[key.value]}; keep one", problem_mark=key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node


def read_yaml(text: str) -> Any:
    """A YAML document as plain values. Raises yaml.YAMLError, for a repeated key too."""
    return yaml.load(text, Loader=_Once)


def yaml_problem(error: Exception) -> str:
    """What YAML does not like, and in which line where it knows."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error).splitlines()[0]


@cache
def _adapter(cls: type) -> TypeAdapter:
    return TypeAdapter(cls)


def from_dict(cls: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """Builds a config from plain values. Raises ConfigError naming each wrong key or value and what fits."""
    try:
        return _adapter(cls).validate_python(_settled(cls, values))
    except ValidationError as error:
        lines = [_explain(cls, problem, where) for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


@dataclasses.dataclass(frozen=True)
class _Written:
    """A value on the command line that YAML reads as something else than its text, and how it was written."""

    value: Any
    text: str

    def __str__(self) -> str:
        return self.text


class _WrittenSection(dict[str, Any]):
    """The same of keys and values, which are laid over others like any."""

    def __init__(self, value: Mapping[str, Any], text: str) -> None:
        super().__init__(value)
        self.text = text


def _settled(annotation: Any, value: Any) -> Any:
    """`value`, and all in it, as a field of this type takes it: what was written where that is text, else as YAML."""
    takes_text = getattr(annotation, "__origin__", annotation) in (str, str | None)
    if isinstance(value, _WrittenSection) and takes_text:
        return value.text
    if isinstance(value, _Written):
        cut = annotation is None and isinstance(value.value, str)
        return value.text if takes_text or cut else value.value
    if isinstance(value, Mapping) and _marker(annotation) is None:      # a choice settles its own
        section = _config_in(annotation)
        types = {field.name: field.type for field in dataclasses.fields(section)} if section else {}
        return {name: _settled(types.get(name), item) for name, item in value.items()}
    return value


def _explain(cls: type, problem: Mapping[str, Any], where: str) -> str:
    path = ".".join([*([where] if where else []), *(str(part) for part in problem["loc"])])
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        owner = _owner(cls, problem["loc"])
        names = [field.name for field in dataclasses.fields(owner)] if owner else []
        return f"unknown key {path!r}.{did_you_mean(str(problem['loc'][-1]), names)}"
    if problem["type"] == "missing":
        return f"{path!r} is required and was not given."
    message = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"{path or cls.__name__}={problem['input']!r}: {message}" if path else message


def _owner(cls: Any, loc: tuple) -> Any:
    """The config class in which the last part of `loc` was looked for, or None where that is not a config."""
    for part in loc[:-1]:
        if not dataclasses.is_dataclass(cls):
            return None
        cls = _config_in(next((f.type for f in dataclasses.fields(cls) if f.name == part), None))
    return cls if dataclasses.is_dataclass(cls) else None


def _config_in(annotation: Any) -> Any:
    """The config class that a field of this type holds, as of `X | None`; None without one."""
    return next((a for a in [annotation, *getattr(annotation, "__args__", ())] if dataclasses.is_dataclass(a)), None)


def to_dict(value: Any) -> Any:
    """A config as plain JSON values, `kind`s included; the inverse of `from_dict`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_dict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
    return value


replace = dataclasses.replace


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, mapping by mapping.

    A change of `kind` drops the old kind's other keys: they belong to another class.
    """
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, str):
            value = {"kind": value}
        if isinstance(old, str) and isinstance(value, Mapping) and not isinstance(value, _WrittenSection):
            old = {"kind": old}   # `optim=muon optim.lr=0.02`
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            same_kind = "kind" not in old or value.get("kind", old["kind"]) == old["kind"]
            merged[key] = merge(old if same_kind else {}, value)
        else:
            merged[key] = value
    return merged


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`["optim.lr=3e-4"]` as nested values for `from_dict`; the right-hand sides are YAML, and where a field takes text
    what was written, but for `null` and quotes. Raises ConfigError without `=` or a value."""
    nested: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        text = text.strip()
        if not equals or not key:
            raise ConfigError(f"{argument!r} is not an override. Write key=value, such as optim.lr=3e-4.")
        if not text:
            raise ConfigError(f"{argument!r} gives no value. Write one after the =, or {key}=null to leave it to the "
                              "recipe.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        quoted = isinstance(value, str) and text[0] == text[-1] and text[0] in "'\""
        if isinstance(value, Mapping):
            value = _WrittenSection(value, text)
        elif value != text and text != "null" and not quoted:
            value = _Written(value, text)
        for part in reversed(key.split(".")):
            value = {part: value}
        assert isinstance(value, dict)
        nested = merge(nested, value)
    return nested


def difference(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted keys on which two configs differ, as `{key: (old, new)}`; None where one lacks the key."""
    a, b = flatten(to_dict(old)), flatten(to_dict(new))
    return {key: (a.get(key), b.get(key)) for key in [*a, *(k for k in b if k not in a)]
            if a.get(key) != b.get(key)}


def json_schema(cls: type) -> dict[str, Any]:
    """JSON schema of a config for editors, each choice spelled out by the configs of its table."""
    definitions: dict[str, Any] = {}
    return {**_schema(cls, definitions), "$defs": definitions}


def field_docs(cls: type) -> dict[str, str]:
    """The string below each field, by the field's name. Read from the source when somebody asks: pydantic would read it
    at every start, for all configs."""
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(body, ast.ClassDef)
        for field, below in pairwise(body.body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(field.target, ast.Name):
                docs[field.target.id] = inspect.cleandoc(ast.literal_eval(below.value))
    return docs


def _schema(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    schema, docs = _adapter(cls).json_schema(ref_template="#/$defs/{model}"), field_docs(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        place = schema["properties"].get(field.name, {})
        if field.name in docs:
            place["description"] = docs[field.name]
        if marker := _marker(field.type):
            place.pop("type", None)
            place["anyOf"] = [*_options(marker, definitions), *([{"type": "null"}] if marker.optional else [])]
        for inner in (field.type, *getattr(field.type, "__args__", ())):
            if dataclasses.is_dataclass(inner):
                _define(inner, definitions)    # type: ignore[arg-type]
            elif inner is not field.type and (marker := _marker(inner)):   # a list of choices
                place["items"] = {"anyOf": _options(marker, definitions)}
    for name, definition in schema.pop("$defs", {}).items():
        definitions.setdefault(name, definition)
    return schema


def _define(cls: type, definitions: dict[str, Any]) -> None:
    if cls.__name__ not in definitions:
        definitions[cls.__name__] = {}
        definitions[cls.__name__] = _schema(cls, definitions)


def _marker(annotation: Any) -> chosen_from | None:
    return next((m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, chosen_from)), None)


def _options(marker: chosen_from, definitions: dict[str, Any]) -> list[dict[str, Any]]:
    """A reference to each kind's definition, which is added where it is not there yet; or the kind alone."""
    for kind in marker.table:
        _define(marker.table[kind], definitions)
    return [*({"$ref": f"#/$defs/{marker.table[kind].__name__}"} for kind in marker.table),
            {"enum": list(marker.table)}]


def dump_yaml(value: Any) -> str:
    """A config or plain values as YAML in field order."""
    return yaml.safe_dump(json.loads(json.dumps(to_dict(value))), sort_keys=False, allow_unicode=True)

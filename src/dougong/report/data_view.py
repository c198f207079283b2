"""The corpus's facts, laid out for people. What we have no place for is still shown, by its own name."""

from dataclasses import dataclass, field
from typing import Any

from dougong.report.facts import RunFacts
from dougong.report.numbers import Text, compact, data_size, exact, fixed, is_number, percent, significant
from dougong.report.words import say, word

_SPLITS = ("train", "validation", "test")
_COLUMNS = {
    "documents": exact,
    "files": exact,
    "examples": exact,
    "bytes": data_size,
    "tokens": compact,
    "bytes_per_token": fixed,
    "share": percent,
    "rows": exact,
    "documents_cut": exact,
    "padding_share": lambda v: percent(v, 1),
    "weight": significant,
    "passes_per_epoch": significant,
}
_PLACED = {
    "documents",
    "bytes",
    "tokens",
    "bytes_per_token",
    "duplicates",
    "skipped",
    "split",
    "splits",
    "split_rule",
    "packing",
    "sources",
    "per_source",
    "examples",
}


@dataclass(frozen=True)
class Table:
    heads: list[Text]
    rows: list[list[Text]]


@dataclass(frozen=True)
class DataView:
    numbers: list[tuple[Text, Text]] = field(default_factory=list)
    rule: Text | None = None
    splits: Table | None = None
    packing: list[tuple[Text, Text]] = field(default_factory=list)
    packing_sentence: Text | None = None
    duplicates: list[tuple[Text, Text, str]] = field(default_factory=list)
    skipped: list[tuple[Text, Text, str]] = field(default_factory=list)
    sources: Table | None = None
    other: list[tuple[Text, Text]] = field(default_factory=list)


def view_of(run: RunFacts) -> DataView | None:
    """None while the run has recorded nothing about its data."""
    facts = run.data
    if not facts:
        return None
    split = facts.get("splits", facts.get("split"))
    rule = facts.get("split_rule", facts.get("split"))
    packing = facts.get("packing")
    return DataView(
        numbers=_numbers(facts),
        rule=_rule(rule),
        splits=_splits(split, facts),
        packing=_pairs(packing) if isinstance(packing, dict) else [],
        packing_sentence=Text.same(packing) if isinstance(packing, str) else None,
        duplicates=_duplicates(facts.get("duplicates")),
        skipped=_counts(facts.get("skipped")),
        sources=_table(facts.get("sources", facts.get("per_source")), say("source"), shares=True),
        other=_pairs({k: v for k, v in facts.items() if k not in _PLACED}),
    )


def _numbers(facts: dict[str, Any]) -> list[tuple[Text, Text]]:
    tokens = facts.get("tokens")
    if isinstance(tokens, dict):
        tokens = sum(v for v in tokens.values() if is_number(v))
    found = []
    for key, value in (
        ("documents", facts.get("documents")),
        ("examples", facts.get("examples")),
        ("bytes", facts.get("bytes")),
        ("tokens", tokens),
        ("bytes_per_token", _bytes_per_token(facts, tokens)),
    ):
        if is_number(value):
            found.append((say("size" if key == "bytes" else key), _COLUMNS[key](value)))
    return found


def _bytes_per_token(facts: dict[str, Any], tokens: Any) -> float | None:
    given = facts.get("bytes_per_token")
    if is_number(given):
        return given
    return facts["bytes"] / tokens if is_number(tokens) and tokens and is_number(facts.get("bytes")) else None


_RULES = {"hash": "rule_hash", "documents": "rule_hash", "tail": "rule_tail"}


def _rule(rule: Any) -> Text | None:
    """The split in a sentence: the run's own in English, ours for the rules we know in Chinese."""
    sentence = rule.get("sentence") if isinstance(rule, dict) else None
    name = rule.get("rule") if isinstance(rule, dict) else rule
    if name is None and sentence is None:
        return None
    if is_number(name):
        return None
    known = say(_RULES[str(name)]) if str(name) in _RULES else Text.same(sentence or name)
    return Text(str(sentence or known.en), known.zh)


def _splits(split: Any, facts: dict[str, Any]) -> Table | None:
    """One row for each split; figures kept by split elsewhere (`tokens: {train: …}`) are joined to it."""
    rows = (
        {k: v | _dict(v.get("packing")) for k, v in split.items() if isinstance(v, dict)}
        if isinstance(split, dict)
        else {}
    )
    if isinstance(split, dict):
        for name in _SPLITS:
            if is_number(split.get(name)):
                rows[name] = {"documents": split[name]}
    for key in ("tokens", "bytes", "documents", "examples"):
        if isinstance(facts.get(key), dict):
            for name, value in facts[key].items():
                if is_number(value):
                    rows.setdefault(name, {})[key] = value
    return _table(rows, say("split")) if rows else None


def _table(value: Any, first: Text, *, shares: bool = False) -> Table | None:
    """A table from `{name: {column: number}}` or `[{"source": name, column: number}]`."""
    if isinstance(value, dict):
        rows = [(name, v if isinstance(v, dict) else {"documents": v}) for name, v in value.items()]
    elif isinstance(value, list):
        rows = [
            (v.get("source", v.get("name", v.get("path", "–"))), v) if isinstance(v, dict) else (v, {})
            for v in value
        ]
    else:
        return None
    if not rows:
        return None
    total = sum(v["bytes"] for _, v in rows if is_number(v.get("bytes")))
    if shares and total and len(rows) > 1 and not any("share" in v for _, v in rows):
        rows = [(n, v | {"share": v["bytes"] / total} if is_number(v.get("bytes")) else v) for n, v in rows]
    known = [c for c in _COLUMNS if any(is_number(v.get(c)) for _, v in rows)]
    further = list(
        dict.fromkeys(c for _, v in rows for c, x in v.items() if is_number(x) and c not in _COLUMNS)
    )[:4]
    names = [say("size") if c == "bytes" else word(c) for c in known]
    heads = [first, *names, *(Text.same(c.replace("_", " ")) for c in further)]
    body = [
        [
            word(name),
            *(_COLUMNS[c](v[c]) if is_number(v.get(c)) else Text.same("") for c in known),
            *(significant(v[c], 6) if is_number(v.get(c)) else Text.same("") for c in further),
        ]
        for name, v in rows
    ]
    return Table(heads, body)


def _counts(value: Any) -> list[tuple[Text, Text, str]]:
    """(reason, count, names) from a number, a list, `{reason: count}` or `{reason: {count, examples}}`."""
    if is_number(value):
        return [(say("total"), exact(value), "")]
    if isinstance(value, list):
        value = {str(v.get("reason", v.get("name", "–"))): v for v in value if isinstance(v, dict)}
    found = []
    for reason, count in value.items() if isinstance(value, dict) else ():
        names = count if isinstance(count, list) else []
        if isinstance(count, dict):
            names = count.get("examples", [])
            count = next(
                (count[k] for k in ("count", "documents", "files") if is_number(count.get(k))), len(names)
            )
        elif names:
            count = len(names)
        name = (
            word(reason)
            if reason in ("exact", "near", "documents", "bytes")
            else Text.same(str(reason).replace("_", " "))
        )
        shown = (
            data_size(count)
            if reason == "bytes" and is_number(count)
            else exact(count)
            if is_number(count)
            else Text.same(count)
        )
        examples = ", ".join(map(_example, names[:3])) if isinstance(names, list) else ""
        found.append((name, shown, examples + (" …" if examples and len(names) > 3 else "")))
    return found


def _example(value: Any) -> str:
    if isinstance(value, dict) and {"removed", "kept"} <= set(value):
        return f"{value['removed']} = {value['kept']}"
    return str(value)


def _duplicates(value: Any) -> list[tuple[Text, Text, str]]:
    """Counts by kind; a kind that was not searched for says so instead of claiming 0."""
    if not isinstance(value, dict):
        return _counts(value)
    searched = _dict(value.get("searched"))
    found = _counts({k: v for k, v in value.items() if k not in ("searched", "threshold")})
    named = [k for k in value if k not in ("searched", "threshold")]
    return [
        (name, say("not_searched"), "") if searched.get(kind) is False else (name, count, examples)
        for kind, (name, count, examples) in zip(named, found)
    ]


def _pairs(value: dict[str, Any]) -> list[tuple[Text, Text]]:
    """Names and values, one level of nesting deep; what lies deeper is named but not spelled out."""
    found = []
    for key, entry in value.items():
        inner = entry.items() if isinstance(entry, dict) else [("", entry)]
        for name, item in inner:
            label = f"{key} · {name}" if name else key
            if item not in (None, {}, [], ""):
                shown = list(item) if isinstance(item, dict) else item
                found.append((Text.same(str(label).replace("_", " ")), plain(shown)))
    return found


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def plain(value: Any) -> Text:
    """Any value of a run for people: numbers grouped, lists joined, yes and no."""
    if isinstance(value, bool):
        return say("yes" if value else "no")
    if is_number(value):
        return exact(value) if value == round(value) and abs(value) >= 1000 else significant(value, 6)
    if isinstance(value, list):
        words = [repr(v) if isinstance(v, str) and v != v.strip() else str(v) for v in value[:8]]
        return Text.same(", ".join(words) + (" …" if len(value) > 8 else ""))
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return Text.same(value[:16] + "…")  # a fingerprint is compared by its beginning
    return Text.same("–" if value is None else value)

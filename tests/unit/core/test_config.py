"""Configs: typos are caught with the nearest name, kinds are chosen from tables, values survive a round trip."""

import sys
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field

from dougong.core.config import (
    chosen_from,
    config,
    difference,
    dump_yaml,
    field_docs,
    from_dict,
    json_schema,
    merge,
    parse_overrides,
    read_yaml,
    to_dict,
)
from dougong.core.errors import ConfigError
from dougong.core.table import Table


@config
class Slow:
    """Gradient descent."""

    kind: Literal["slow"] = "slow"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """the rate"""


@config
class Fast:
    kind: Literal["fast"] = "fast"
    betas: tuple[float, float] = (0.9, 0.95)
    mark: Annotated[str, Field(min_length=1)] = "a"


TABLE = Table("optimizer", {"slow": f"{__name__}:Slow", "fast": f"{__name__}:Fast"})
sys.modules.setdefault(__name__, sys.modules[Slow.__module__])


@config
class Inner:
    number: int | None = None
    name: str | None = None


@config
class Outer:
    optim: Annotated[Slow | Fast, chosen_from(TABLE)] = Slow()
    other: Annotated[Slow | Fast | None, chosen_from(TABLE, optional=True)] = None
    inner: Inner = Inner()
    maybe: Inner | None = None


def override(*arguments: str) -> Outer:
    return from_dict(Outer, merge(to_dict(Outer()), parse_overrides(list(arguments))))


@pytest.mark.parametrize(("argument", "message"), [
    ("optim.lrr=3", r"unknown key 'optim\.lrr'\. Did you mean 'lr'"),
    ("optm=3", r"unknown key 'optm'\. Did you mean 'optim'"),
    ("inner.numbr=3", r"unknown key 'inner\.numbr'\. Did you mean 'number'"),
    ("optim.kind=fas", r"unknown optimizer 'fas'\. Did you mean 'fast'"),
    ("optim=3", "is no optimizer"),
    ("optim.lr=-1", r"optim\.lr=-1: .*greater than 0"),
    ("optim.lr=.nan", r"optim\.lr"),
    ("inner.number=1.5", r"inner\.number=1\.5"),
    ("inner.number", "key=value"),
    ("inner.name=", r"inner\.name=null"),
    ("inner.name= ", r"inner\.name=null"),
    ("optim.kind=[1]", r"unknown optimizer '\[1\]'"),
])
def test_a_wrong_override_says_what_came_and_what_fits(argument, message):
    with pytest.raises(ConfigError, match=message):
        override(argument)


def test_overrides_reach_nested_values_and_change_kinds():
    assert override("optim.lr=3e-4").optim.lr == 3e-4
    assert override("optim=fast", "optim.betas=[0.5, 0.6]").optim == Fast(betas=(0.5, 0.6))
    assert override("other=slow").other == Slow()
    assert override("inner.number=null").inner.number is None


def test_a_change_of_kind_drops_the_old_kinds_keys():
    assert merge({"optim": {"kind": "slow", "lr": 1}}, {"optim": {"kind": "fast"}}) == {"optim": {"kind": "fast"}}


def test_round_trip_and_difference():
    changed = override("optim.lr=0.5", "inner.number=7")
    assert from_dict(Outer, to_dict(changed)) == changed
    assert difference(Outer(), changed) == {"optim.lr": (1e-3, 0.5), "inner.number": (None, 7)}
    assert "lr: 0.5" in dump_yaml(changed)


def test_configs_are_frozen():
    with pytest.raises(AttributeError):
        Inner().number = 3  # type: ignore[misc]


def test_the_schema_spells_out_every_choice():
    schema = json_schema(Outer)
    assert schema["$defs"]["Slow"]["properties"]["lr"]["description"] == "the rate"
    assert {"$ref": "#/$defs/Fast"} in schema["properties"]["optim"]["anyOf"]
    assert schema["additionalProperties"] is False


def test_the_strings_below_fields_describe_them_where_they_are_inherited_too():
    from dougong.objectives.policy import RejectionConfig
    from dougong.recipes.recipe import Recipe
    from dougong.train.config import TrainConfig

    docs = field_docs(RejectionConfig)
    assert docs["samples"].startswith("drawn for each prompt") and "\n " not in docs["samples"]
    assert json_schema(RejectionConfig)["properties"]["samples"]["description"] == docs["samples"]
    nested = json_schema(Recipe)["$defs"]["TrainConfig"]["properties"]
    assert nested["rows"]["description"] == field_docs(TrainConfig)["rows"]


def test_a_kind_given_after_its_keys_keeps_them():
    assert override("optim.betas=[0.5, 0.6]", "optim.kind=fast").optim == Fast(betas=(0.5, 0.6))
    assert override("optim.betas=[0.5, 0.6]", "optim=fast").optim == Fast(betas=(0.5, 0.6))


@pytest.mark.parametrize("text", ["2024", "007", "1_000", "[SEP]", "2024-01-01", "no", "~/texts", "1.50", "~",
                                  "t2/[raw] dir/x y #1", "t2/a: b", "{a, b}", "'a' #1"])
def test_text_is_taken_as_it_was_written(text):
    assert override(f"inner.name={text}").inner.name == text
    assert override("inner.name=before", f"inner.name={text}").inner.name == text
    assert override(f"maybe.name={text}").maybe == Inner(name=text)
    assert override("optim=fast", f"optim.mark={text}").optim == Fast(mark=text)


def test_keys_and_values_in_one_override_are_laid_over_others():
    assert override("optim={kind: fast, betas: [0.5, 0.6]}", "optim.mark=b").optim == Fast(betas=(0.5, 0.6), mark="b")
    assert override("inner.number=3", "inner={name: x}").inner == Inner(number=3, name="x")
    assert override("other={kind: slow, lr: 0.5}", "maybe={number: 3}").other == Slow(lr=0.5)


@pytest.mark.parametrize("text", ["a: 1\nb: {}\na: 2\n", "s:\n  a: {b: 1,\n    c: 2}\n  a: 3\n", "1: a\n1: b\n"])
def test_a_repeated_key_is_refused_with_its_line(text):
    with pytest.raises(yaml.YAMLError, match=r"key '[a1]' stands here again, first in line \d"):
        read_yaml(text)


def test_a_key_may_replace_one_that_was_merged_in():
    assert read_yaml("x: &x {a: 1, b: 2}\ny: {<<: *x, a: 3}\n")["y"] == {"a": 3, "b": 2}


def test_text_may_be_null_or_quoted():
    assert override("inner.name=null").inner.name is None
    assert override("inner.name='null'").inner.name == "null"

"""The `Recipe`: one frozen value that says what to build, and how it is read from a name, a file and overrides."""

import re
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from dougong.adapt import ADAPTERS
from dougong.core.config import (
    chosen_from,
    config,
    from_dict,
    merge,
    parse_overrides,
    read_yaml,
    to_dict,
    yaml_problem,
)
from dougong.core.errors import ConfigError, did_you_mean
from dougong.data import DATA, TOKENIZERS
from dougong.models import FAMILIES
from dougong.objectives import OBJECTIVES
from dougong.optim import OPTIMIZERS, SCHEDULES
from dougong.recipes import RECIPES
from dougong.runtime.device import RuntimeConfig
from dougong.runtime.layout import LAYOUTS, LayoutConfig
from dougong.train import TrainConfig

_HORIZONS = ("steps", "minutes", "epochs")
Positive = Annotated[int, Field(gt=0)]


@config
class EvaluateConfig:
    """How the held-out text is scored: in training on a part of the validation split, at the end on all of a split."""

    split: Literal["validation", "test"] = "test"
    """the split scored at the end: validation or test (validation where the data has no test split)"""
    tokens: Positive = 65_536
    """tokens of the validation split scored at each evaluation during training; the whole split when it holds fewer"""
    stride: Positive | None = None
    """derived: the context (windows do not overlap)"""
    baselines: bool = True
    """compare with an interpolated byte 5-gram trained on the same split and with xz"""


@config
class SampleConfig:
    """What the model writes while it is trained and, by default, afterwards."""

    prompts: tuple[str, ...] = ()
    tokens: Positive = 96
    temperature: Annotated[float, Field(ge=0)] = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95


@config
class StartConfig:
    """A model that exists, to begin from instead of first weights."""

    path: str
    """a run, a checkpoint in one, a Hugging Face directory, or hf:OWNER/NAME"""
    checkpoint: str = "best"
    """of a run: best, last, or a step"""


@config
class Recipe:
    """Everything a run is made from. `None` in a field means that it is derived, printed with its reason, and saved."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[\w.\-]+$")]
    about: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    size: str | None = None
    """the dial: parameters wanted, such as 2M or 124M; sets width, depth, batch, rate and horizon. fit: what this
    machine trains well in train.minutes"""
    data: Annotated[Any, chosen_from(DATA)]
    tokenizer: Annotated[Any, chosen_from(TOKENIZERS, optional=True)] = None
    start: StartConfig | None = None
    """None: the weights are drawn"""
    model: Annotated[Any, chosen_from(FAMILIES, optional=True)] = None
    """derived: that of `start`"""
    adapt: Annotated[Any, chosen_from(ADAPTERS, optional=True)] = None
    """what is trained in place of the weights of `start`; None: those weights themselves"""
    objective: Annotated[Any, chosen_from(OBJECTIVES)]
    optim: Annotated[Any, chosen_from(OPTIMIZERS)]
    schedule: Annotated[Any, chosen_from(SCHEDULES)]
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    sample: SampleConfig = SampleConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    layout: Annotated[Any, chosen_from(LAYOUTS)] = LayoutConfig()
    """how each step is divided between processes: sizes of the axes, or auto"""

    @property
    def is_language_model(self) -> bool:
        return self.tokenizer is not None or self.start is not None or self.objective.kind == "distil"

    @property
    def adapter(self) -> Any:
        """What is trained in place of the weights; None where those are trained themselves, be it in another way."""
        return None if self.adapt is None or self.adapt.whole else self.adapt

    @property
    def row_tokens(self) -> int:
        """Tokens of a row: as many as the data say, else the model's context."""
        return getattr(self.data, "row_tokens", None) or self.model.context


def load_recipe(source: str, overrides: list[str] | None = None, *,
                changes: Mapping[str, Any] | None = None) -> tuple[Recipe, Recipe]:
    """Reads a shipped recipe by name or a YAML file by path, then lays `changes` (nested) and `key=value` overrides
    over it.

    Returns the recipe and the base it differs from. A YAML file names its base with `base:` and gives only what it
    changes. Raises ConfigError for unknown recipes, keys and values.
    """
    base = _base_of(source)
    return laid_over(base, _read_file(source) if _is_file(source) else {}, changes or {},
                      parse_overrides(overrides or [])), base


def check_stage(source: str, changes: Mapping[str, Any]) -> None:
    """Raises ConfigError for what `load_recipe` will not take from a stage whose start is a run still to be made."""
    asked = merge(changes, {"start": {"path": "."}})
    start = asked.pop("start")
    values = _values(_base_of(source), _read_file(source) if _is_file(source) else {}, asked) | {"start": start}
    for name in ("model", "tokenizer"):
        if isinstance(values[name], Mapping) and "kind" not in values[name]:     # laid over those of the start
            values[name] = None
    from_dict(Recipe, values)


def laid_over(base: Recipe, *changes: Mapping[str, Any]) -> Recipe:
    """`base` with nested changes laid over it one after another, as the command line lays its own: another start brings
    its model and tokenizer, and another length of training takes back the one before."""
    return from_dict(Recipe, _values(base, *changes))


def _values(base: Recipe, *changes: Mapping[str, Any]) -> dict[str, Any]:
    values, where = to_dict(base), None
    for over in changes:
        if isinstance(over.get("start"), dict):
            before = values.get("start") or {}
            start = merge(before, over["start"])
            if start.get("path") != before.get("path"):
                of_start, where = _of_start(start)
                values |= of_start
        values = merge(values, one_horizon(over))
    if where is not None and isinstance(values.get("start"), dict):
        values["start"] = {**values["start"], "path": where}
    return values


def _of_start(start: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Whoever names a model to begin from takes its shape and its tokenizer, and may still say more of them; and where
    that model is, with its revision where it was fetched from a hub."""
    from dougong.interop.hub import at_revision
    from dougong.recipes.start import shape_of_start

    begun = from_dict(StartConfig, start, where="start")
    model, tokenizer = shape_of_start(begun)
    values = {"size": None, "model": to_dict(model), "tokenizer": to_dict(tokenizer)}
    return values, at_revision(begun.path, Path(tokenizer.path))


def one_horizon(changes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Whoever says how many steps (or minutes, or epochs) to train takes back what the base says in other words. Raises
    ConfigError for two of them."""
    train = changes.get("train")
    if not isinstance(train, dict):
        return changes
    given = [word for word in _HORIZONS if train.get(word) is not None]
    if len(given) > 1:
        both = " and ".join(f"train.{word}={train[word]}" for word in given)
        raise ConfigError(f"{both} each say how long to train, and one run has one length.\nGive one of them.")
    if len(given) == 1:
        return merge(changes, {"train": {word: None for word in _HORIZONS if word != given[0]}})
    return changes


def recipe_from_run(path: Path) -> tuple[Recipe, dict[str, Any]]:
    """The resolved recipe of a run and what was recorded beside it (versions, fingerprints)."""
    values = read_values(path)
    resolved = values.pop("resolved", {})
    return from_dict(Recipe, values), resolved


def _is_file(source: str) -> bool:
    return source.endswith((".yaml", ".yml"))


def _base_of(source: str, above: tuple[Path, ...] = ()) -> Recipe:
    from dougong.recipes.journey import JOURNEYS, is_journey

    if not above and is_journey(source):
        stages = {} if _is_file(source) else JOURNEYS[source]().stages
        recipes = ", ".join(stage.recipe for stage in stages.values() if stage.kind == "train")
        raise ConfigError(f"{source} is a journey of several recipes. Train them all: dougong train {quote(source)}\n"
                          f"Here name the recipe of one of its stages{f': {recipes}' if recipes else ''}.")
    if not _is_file(source):
        if source not in RECIPES:
            raise ConfigError(f"unknown recipe {source!r}.{did_you_mean(source, RECIPES)}\n"
                              "`dougong recipes` lists what ships; a recipe of your own is a .yaml file.")
        return RECIPES[source]()
    way = (*above, Path(source).resolve())
    if way[-1] in above:
        raise ConfigError(f"{source} is its own base: {' → '.join(path.name for path in way)}.\nBegin one of them with "
                          "a shipped recipe, such as `base: first`.")
    values = read_values(Path(source))
    recorded = values.get("resolved")
    name = values.get("base")
    if name is None and isinstance(recorded, dict) and isinstance(recorded.get("base"), str):
        name = recorded["base"]
        if name not in RECIPES:      # a file's name; what a run has saved is whole without it
            return recipe_from_run(Path(source))[0]
    if not isinstance(name, str):
        raise ConfigError(f"{source} names no base recipe. Begin it with `base: first` "
                          f"(or {', '.join(n for n in RECIPES if n != 'first')}).")
    if _is_file(name):
        nested = str(Path(source).parent / name)
        return laid_over(_base_of(nested, way), _read_file(nested))
    return _base_of(name)


def name_of(source: str) -> str:
    """What a recipe's, or a journey's, run is called: the file's own name for it, else that of the file."""
    return str(_read_file(source)["name"]) if _is_file(source) else source


def _read_file(source: str) -> dict[str, Any]:
    values = read_values(Path(source))
    values.pop("base", None)
    train = values.get("train")
    if values.pop("resolved", None) and isinstance(train, dict) and train.get("steps"):
        values["train"] = {**train, "minutes": None, "epochs": None}     # from which its run derived the steps
    return {"name": re.sub(r"[^\w.\-]+", "-", Path(source).stem), **values}


def read_values(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises ConfigError for one that holds none, or a key twice."""
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no recipe file at {path}.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {yaml_problem(error)}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} should hold keys and values; it holds {type(values).__name__}.")
    return values


def with_values(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """`recipe` with dotted keys replaced, such as `{"model.dim": 256}`."""
    values = to_dict(recipe)
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        section[leaf] = value
    return from_dict(Recipe, values)

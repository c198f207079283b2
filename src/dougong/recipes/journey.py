"""Several stages in one command, each beginning from what the one before left: pretrain, adapt, compress, judge.

```
runs/assistant/  journey.yaml        the stages, resolved: what was asked for
                 1-pretrain/  2-sft/ …   a whole run each, which every command opens
```
A stage that is done is passed over, one that was stopped goes on, so the same command ends what was begun.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from dougong.adapt import METHODS
from dougong.core.config import (
    chosen_from,
    config,
    dump_yaml,
    from_dict,
    merge,
    parse_overrides,
    read_yaml,
    to_dict,
)
from dougong.core.errors import CheckpointError, ConfigError, did_you_mean
from dougong.core.files import explained_disk_errors, lock, write_text
from dougong.core.run import RunDirectory
from dougong.core.table import Table
from dougong.recipes.recipe import check_stage, load_recipe, one_horizon, read_values
from dougong.runtime.processes import launched

FILE = "journey.yaml"
STAGES = Table("stage", {
    "train": "dougong.recipes.journey:TrainStage",
    "compress": "dougong.recipes.journey:CompressStage",
})
JOURNEYS = Table("journey", {
    "assistant": "dougong.recipes.shipped.assistant:assistant",
})


@config
class TrainStage:
    """A recipe that begins from the run of the stage before; the first one, from nothing."""

    kind: Literal["train"] = "train"
    recipe: str
    """a shipped recipe, or a .yaml file"""
    changes: dict[str, Any] = Field(default_factory=dict)
    """sections to lay over it, as a recipe file's"""

    def check(self, *, first: bool) -> None:
        """Raises ConfigError for what its recipe does not take, before anything is trained."""
        if first:
            load_recipe(self.recipe, changes=self.changes)
        else:
            check_stage(self.recipe, self.changes)

    def run(self, before: Path | None, path: Path, progress: Any) -> tuple[Path, str]:
        """Begins or goes on; returns its run and why it ended ("done", "early stop", "interrupted")."""
        from dougong.recipes.train import resume_run, train_run

        if (path / "recipe.yaml").is_file():
            finished = resume_run(path, progress=progress)
        else:
            shutil.rmtree(path, ignore_errors=True)     # killed before it was a run
            start = {"start": {"path": str(before)}} if before is not None else {}
            asked, base = load_recipe(self.recipe, changes=merge(self.changes, start))
            finished = train_run(asked, base, path=path, progress=progress)
        return finished.directory.path, finished.reason


@config
class CompressStage:
    """The run of the stage before with smaller weights."""

    kind: Literal["compress"] = "compress"
    to: Literal["int8", "int4"] = "int8"
    method: str = "rtn"

    def check(self, *, first: bool) -> None:
        """Raises ConfigError for an unknown method."""
        METHODS[self.method]

    def run(self, before: Path | None, path: Path, progress: Any) -> tuple[Path, str]:
        from dougong.recipes.compress import compress_run, form_for
        from dougong.recipes.open_run import open_run

        if before is None:
            raise ConfigError("compress is the first stage of this journey, and there is nothing yet to compress.")
        if not (path / "recipe.yaml").is_file():
            shutil.rmtree(path, ignore_errors=True)
            compress_run(open_run(before), path, form_for(self.to, group=None, activations="float"),
                         method=self.method)
        return path, "done"


@config
class Journey:
    """Stages by name, in order."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[\w.\-]+$")]
    about: str = ""
    stages: Annotated[dict[str, Annotated[Any, chosen_from(STAGES)]], Field(min_length=1)]


@dataclass(frozen=True)
class Travelled:
    """How far a journey came: each stage with its directory and how it ended; `stopped` names one not finished."""

    path: Path
    stages: dict[str, tuple[Path, str]]
    stopped: str | None

    @property
    def last(self) -> Path:
        return list(self.stages.values())[-1][0]

    def to_dict(self) -> dict[str, Any]:
        return {"run": str(self.path), "reason": "interrupted" if self.stopped else "done", "stopped": self.stopped,
                "stages": {name: {"run": str(path), "reason": reason} for name, (path, reason) in self.stages.items()}}


def is_journey(source: str) -> bool:
    """Whether this names a journey: a shipped one, or a .yaml file with stages or a journey as its base."""
    if source in JOURNEYS:
        return True
    path = Path(source)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return False
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return False        # whoever reads it as a recipe will say what is wrong
    return isinstance(values, dict) and ("stages" in values or str(values.get("base")) in JOURNEYS)


def load_journey(source: str, overrides: list[str] | None = None) -> Journey:
    """A shipped journey or a YAML file, with `STAGE.key=value` overrides laid over its stages.

    Raises ConfigError for unknown journeys, stages and keys, those of each stage's recipe too.
    """
    if source in JOURNEYS:
        values = to_dict(JOURNEYS[source]())
    else:
        path = Path(source)
        given = read_values(path)
        base = given.pop("base", None)
        values = to_dict(JOURNEYS[str(base)]()) if base else {"stages": {}}
        changes = given.pop("stages", {})
        if not isinstance(changes, Mapping):
            raise ConfigError(f"stages in {path} should hold stages by name, such as `pretrain: {{kind: train, recipe: "
                              f"first}}`, and {changes!r} came.")
        values = {**values, "name": re.sub(r"[^\w.\-]+", "-", path.stem), **given}
        values["stages"] = _laid_over(values["stages"], changes, new=True)
        values = to_dict(from_dict(Journey, values))
    values["stages"] = _laid_over(values["stages"], parse_overrides(overrides or []), new=False)
    journey = from_dict(Journey, values)
    for number, (name, stage) in enumerate(journey.stages.items()):
        try:
            stage.check(first=number == 0)
        except ConfigError as error:
            raise ConfigError(f"stage {name}: {error}") from None
    return journey


def _laid_over(stages: Mapping[str, Any], changes: Mapping[str, Any], *, new: bool) -> dict[str, Any]:
    """Changes to stages by name: of a training stage to its recipe, of another to its own keys; null leaves one out."""
    found = dict(stages)
    for name, change in changes.items():
        if change is None:
            found.pop(name, None)
        elif name not in found and new:
            found[name] = change
        elif name not in found:
            raise ConfigError(f"no stage {name!r}.{did_you_mean(name, found)}\nWrite STAGE.key=value, such as "
                              f"{next(iter(found), 'pretrain')}.train.minutes=2.")
        elif not isinstance(change, Mapping):
            raise ConfigError(f"stage {name} should hold keys and values, and {change!r} came.")
        elif found[name].get("kind") == "train" and not {"recipe", "changes", "kind"} & change.keys():
            found[name] = {**found[name], "changes": merge(found[name].get("changes", {}), one_horizon(change))}
        else:
            found[name] = merge(found[name], change)
    return found


def travel(journey: Journey, path: Path | None = None, *, out: Any, progress: Any = None) -> Travelled:
    """Goes the whole way in a new directory (`path`, or runs/<name>; taken names get a number)."""
    path = path or Path("runs") / journey.name
    with explained_disk_errors(f"the journey {path}"):
        made = RunDirectory.create(path.parent, path.name).path
        write_text(made / FILE, dump_yaml(journey))
    return _go(journey, made, out=out, progress=progress)


def travel_on(path: Path, *, out: Any, progress: Any = None) -> Travelled:
    """Goes on where a journey was stopped; stages that are done stay as they are."""
    return _go(read_journey(path), path, out=out, progress=progress)


def read_journey(path: Path) -> Journey:
    """The journey whose directory this is. Raises CheckpointError where its file cannot be read."""
    try:
        return from_dict(Journey, read_values(path / FILE))
    except ConfigError as error:
        raise CheckpointError(f"the journey in {path} cannot be read: {error}") from None


def _go(journey: Journey, path: Path, *, out: Any, progress: Any) -> Travelled:
    from rich.markup import escape

    if launched() > 1:
        stages = [f"dougong train {quote(stage.recipe)}" for stage in journey.stages.values() if stage.kind == "train"]
        raise ConfigError(f"a journey runs in one process, and {launched()} were launched. Launch its stages one by "
                          f"one: {', '.join(stages)}")
    done: dict[str, tuple[Path, str]] = {}
    before: Path | None = None
    with lock(RunDirectory(path).lock, owner="dougong train"):
        for number, (name, stage) in enumerate(journey.stages.items(), start=1):
            here = path / f"{number}-{name}"
            out.print(f"[bold]stage {number} of {len(journey.stages)}: {escape(name)}[/]  [dim]{escape(str(here))}[/]")
            before, reason = done[name] = stage.run(before, here, progress)
            if reason == "interrupted":
                return Travelled(path, done, name)
    return Travelled(path, done, None)


def stage_runs(path: Path) -> list[Path]:
    """The runs of a journey's stages that were begun, in order."""
    names = [f"{number}-{name}" for number, name in enumerate(read_journey(path).stages, start=1)]
    return [path / name for name in names if (path / name / "recipe.yaml").is_file()]


def last_run(path: Path) -> Path:
    """The run that a journey's directory stands for: that of its last stage begun. Any other path stands for itself."""
    if not (path / FILE).is_file():
        return path
    found = stage_runs(path)
    if not found:
        raise CheckpointError(f"{path} is a journey that has not begun its first stage.\nGo on with it: "
                              f"dougong train --resume --run {quote(str(path))}")
    return found[-1]



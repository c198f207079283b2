"""The main commands as functions: `dougong.train`, `dougong.open_run`, `dougong.generate`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dougong.core.config import from_dict, merge, parse_overrides, to_dict
from dougong.generate import Generation, SamplingConfig
from dougong.recipes.open_run import OpenRun, open_run
from dougong.recipes.recipe import Recipe, laid_over, load_recipe
from dougong.recipes.train import Finished, resume_run, train_run
from dougong.report import write_report

__all__ = ["Finished", "OpenRun", "Recipe", "SamplingConfig", "generate", "load_recipe", "open_run", "resume_run",
           "train", "write_report"]


def train(recipe: str | Recipe = "first", *overrides: str, run: str | Path | None = None, **sections: Any) -> Finished:
    """Trains a recipe in a new run directory and returns where it is and how it ended.

    `recipe` is a shipped name, a .yaml file or a Recipe; `overrides` are those of the command line
    (`"optim.lr=3e-4"`), `sections` the same as values (`data={"path": "~/texts"}`, `seed=1`), and what both say is the
    sections'. `start={"path": RUN}` is the command line's `--model RUN`. Raises ConfigError for what is no recipe, no
    key or no value.
    """
    changes = merge(parse_overrides(list(overrides)), _plain(to_dict(sections)))
    asked, base = load_recipe(recipe, changes=changes) if isinstance(recipe, str) else \
        (laid_over(recipe, changes), recipe)
    finished = train_run(asked, base, path=None if run is None else Path(run))
    write_report([finished.directory], finished.directory.report)
    return finished


def _plain(value: Any) -> Any:
    """Paths as the texts that recipes hold."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def generate(run: str | Path | OpenRun, prompts: str | list[str], *, draft: str | Path | OpenRun | None = None,
             speculate: int | None = None, **sampling: Any) -> list[Generation]:
    """Continues prompts with a run's model; `sampling` are the fields of `SamplingConfig`. `draft`, a smaller run with
    the same tokenizer, guesses `speculate` tokens ahead."""
    opened = run if isinstance(run, OpenRun) else open_run(run)
    guesses = draft if draft is None or isinstance(draft, OpenRun) else open_run(draft)
    return opened.generate([prompts] if isinstance(prompts, str) else prompts, from_dict(SamplingConfig, sampling),
                           draft=guesses, speculate=speculate)

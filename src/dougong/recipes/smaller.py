"""From a run to a smaller one of the same family: parts pruned, or tokens left out. An ordinary run, to train on, to
round, to export.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dougong.adapt.prune import prune
from dougong.adapt.quantize import refuse_integers
from dougong.adapt.vocabulary import with_vocabulary
from dougong.core.config import replace
from dougong.core.errors import ConfigError
from dougong.core.run import RunDirectory
from dougong.data.tokenizer import FileConfig, Tokenizer
from dougong.data.trim import token_counts, trim
from dougong.models import count
from dougong.recipes.assemble import prepare_data
from dougong.recipes.calibration import calibration
from dougong.recipes.made_run import fill, made_run, refuse_existing
from dougong.recipes.open_run import OpenRun
from dougong.recipes.recipe import Recipe
from dougong.recipes.start import fingerprint
from dougong.train.shadow import tracked

Say = Callable[[str], None]
_READ_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Smaller:
    """The run that was made, and what is worth knowing of it."""

    directory: RunDirectory
    how: str
    """pruned or trimmed"""
    parameters: int
    parameters_before: int
    facts: dict[str, Any]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"run": str(self.directory.path), "how": self.how, "parameters": self.parameters,
                "parameters_before": self.parameters_before, **self.facts, "notes": list(self.notes)}


def prune_run(opened: OpenRun, path: Path, *, ratio: float, text: OpenRun | None = None,
              say: Say = lambda text: None) -> Smaller:
    """Writes a run with at most `1 - ratio` of the parameters; `text` is the run on other data to look at. Raises
    ConfigError where that cannot be."""
    _check(opened, path)
    batches, notes = calibration(text or opened)
    found = prune(opened.model, batches, ratio=ratio, say=say)
    facts = {"ratio": ratio, "layers": list(found.layers), "groups": found.shape.groups,
             "channels": found.shape.channels, "loss": found.loss, "loss_before": found.loss_before}
    own = isinstance(opened.recipe.tokenizer, FileConfig)
    recipe = replace(_ordinary(opened.recipe), model=found.model.config,
                     tokenizer=_of(path) if own else opened.recipe.tokenizer)
    return _write(path, opened, recipe, found.model, opened.tokenizer, "pruned", facts, notes)


def trim_run(opened: OpenRun, path: Path, *, least: int = 1, text: OpenRun | None = None) -> Smaller:
    """Writes a run without the tokens that its training data (or those of `text`) use fewer than `least` times. Raises
    ConfigError for tokenizers of which that cannot be told, or where no token would go."""
    _check(opened, path)
    corpus = (text or opened).corpus
    if not hasattr(corpus, "tokens"):
        raise ConfigError(f"{opened.directory.path} was trained on data.kind={opened.recipe.data.kind}, and tokens are "
                          "counted in running text. Name some: --data FOLDER.")
    split = corpus.tokens("train")
    parts = (split.read(at, min(at + _READ_AT_ONCE, split.tokens)) for at in range(0, split.tokens, _READ_AT_ONCE))
    found = trim(opened.tokenizer, token_counts(opened.tokenizer, parts), least=least)
    before = opened.recipe.model.vocab_size
    if len(found.kept) >= before:
        raise ConfigError(f"all {before:,} tokens are used at least {least} times or are part of others, so none goes. "
                          f"Try --least {max(10, 10 * least)}: rarer ones are then spelled by their parts.")
    model = with_vocabulary(opened.model, found.kept.tolist())
    facts = {"least": least, "vocabulary": len(found.kept), "vocabulary_before": before, "used": found.used}
    recipe = replace(_ordinary(opened.recipe), model=model.config, tokenizer=_of(path))
    return _write(path, opened, recipe, model, found.tokenizer, "trimmed", facts, ())


def _check(opened: OpenRun, path: Path) -> None:
    refuse_existing(path, option="--out")
    if opened.tokenizer is None or not hasattr(opened.model, "stack"):
        raise ConfigError(f"{opened.directory.path} holds no language model of layers (model.kind="
                          f"{opened.recipe.model.kind}), and only such are made smaller so.")
    refuse_integers(opened.model)


def _ordinary(recipe: Recipe) -> Recipe:
    """The recipe of weights that are whole by themselves."""
    return replace(recipe, size=None, start=None, adapt=None, train=replace(recipe.train, ema=None))


def _of(path: Path) -> FileConfig:
    return FileConfig(path=str(RunDirectory(path.absolute()).tokenizer))


def _write(path: Path, opened: OpenRun, recipe: Recipe, model: Any, tokenizer: Tokenizer, how: str,
           facts: dict[str, Any], notes: Sequence[str]) -> Smaller:
    """The run, whole or not at all."""
    with made_run(path) as run:
        data = opened.recorded.get("data_fingerprint")
        if data and tokenizer.fingerprint != opened.tokenizer.fingerprint:
            tokenizer.save(run.tokenizer)
            data = prepare_data(replace(recipe, tokenizer=_of(run.path))).fingerprint
        recorded = {**opened.recorded, "tokenizer_fingerprint": tokenizer.fingerprint, "data_fingerprint": data,
                    "smaller": {"how": how, "run": opened.name, "step": opened.step,
                                "fingerprint": fingerprint(tracked(opened.model)), **facts}}
        recorded.pop("start_fingerprint", None)
        fill(run, recipe, recorded, tracked(model), reason=how, tokenizer=tokenizer)
    return Smaller(RunDirectory(path), how, count.parameters(recipe.model)["total"],
                   count.parameters(opened.recipe.model)["total"], facts, tuple(notes))

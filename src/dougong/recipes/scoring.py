"""Scores of a model on held-out data: quick ones during training, the whole split with baselines at the end."""

from collections.abc import Callable
from typing import Any

from torch import nn

from dougong.core.errors import ConfigError
from dougong.data.dedup import DedupConfig
from dougong.data.split import SplitConfig
from dougong.objectives.objective import Objective
from dougong.recipes import array_scores
from dougong.recipes.companions import accompany
from dougong.recipes.held_out import held_out, held_out_together
from dougong.recipes.recipe import Recipe
from dougong.runtime.device import Runtime

Score = Callable[[nn.Module], dict[str, Any]]


def quick_score(recipe: Recipe, corpus: Any, runtime: Runtime, *, objective: Objective | None = None,
                divided: Any = None, poll: Callable[[], None] = lambda: None) -> Score | None:
    """What an evaluation during training computes, always on the same documents; None where the data allow none.

    Of a language model bits per byte of text, and on other data (conversations, pairs, tasks) what the corpus itself
    or the objective measures. `divided` (`parallel.Parallel`): the processes that share the model score together, each
    its rows. `poll` is called now and then, equally often by all of them, and may raise to end the work.

    The figures are process 0's on every process: what is the best, and when patience ends, hangs on them, and where
    each scores by itself a clock may decide otherwise (`reward=tests`).
    """
    own = _own_score(recipe, corpus, runtime, objective, divided, poll)
    return own and (lambda model: runtime.from_first(own(model)))


def _own_score(recipe: Recipe, corpus: Any, runtime: Runtime, objective: Objective | None, divided: Any,
               poll: Callable[[], None]) -> Score | None:
    """What this process computes."""
    if recipe.is_language_model and recipe.data.kind == "text":
        return _language_model(recipe, corpus, runtime, divided, poll)
    if recipe.is_language_model:
        # a test split alone is for the end: the best checkpoint must not be chosen on it
        there = "validation" in held_out_splits(corpus)
        return _rows(recipe, corpus, runtime, objective, divided, poll) if there else None
    return _SCORES.get(recipe.objective.kind, lambda *_: None)(recipe, corpus, runtime)


def check_scores(recipe: Recipe, corpus: Any) -> None:
    """Raises ConfigError or DataError, before the first step, for what would end the run at an evaluation or at its
    final score, where nothing can be changed any more."""
    splits, stride = held_out_splits(corpus), recipe.evaluate.stride
    if splits:
        _existing(recipe.evaluate.split, recipe, corpus, asked=False)
    if recipe.is_language_model and stride is not None and stride > recipe.model.context:
        raise ConfigError(f"evaluate.stride={stride} must lie between 1 and the context of {recipe.model.context}: a "
                          "longer one would leave tokens unscored.")
    if hasattr(corpus, "tasks"):
        for split in splits:
            corpus.tasks(split)


def score(opened: Any, *, data: str | None = None, split: str | None = None, stride: int | None = None,
          baselines: bool = True, progress: Any = None) -> dict[str, Any]:
    """Scores an open run on a whole split, or on all of a text that it was not trained on: `data`, or what an imported
    model was given. Returns the fields of a `result` event."""
    data = data or opened.recorded.get("imported", {}).get("data")
    if data is None:
        return final_score(opened.recipe, opened.corpus, opened.model, opened.runtime, split=split, stride=stride,
                           baselines=baselines, weights=opened.weights, progress=progress)
    if split is not None:
        raise ConfigError(f"--split {split} has no effect: nothing of {data} was trained on, so all of it is scored. "
                          "Leave it out.")
    text = opened.on_data(data, dedup=DedupConfig(exact=False, near=False), split=SplitConfig(fractions=(1, 0, 0)),
                          row_tokens=1)     # documents are scored, so there may be too little for a longer row
    found = _documents(text.recipe, text.corpus, text.model, text.runtime, "train", stride=stride,
                       baselines=("xz",) if baselines else (), weights=text.weights, progress=progress)
    return {**found, "split": "all", "text": data, "skipped": text.corpus.facts["skipped"]}


def final_score(recipe: Recipe, corpus: Any, model: nn.Module, runtime: Runtime, *, split: str | None = None,
                stride: int | None = None, baselines: bool | None = None, weights: str = "raw",
                progress: Any = None) -> dict[str, Any]:
    """The whole split: bits per byte beside the baselines, or the objective's own measure."""
    split = _existing(split or recipe.evaluate.split, recipe, corpus, asked=split is not None)
    wanted = recipe.evaluate.baselines if baselines is None else baselines
    if recipe.is_language_model and recipe.data.kind != "text":
        from dougong.recipes.judge import judge

        if stride is not None:
            raise ConfigError(f"stride belongs to the windows of text, and this run's data are {recipe.data.kind}, of "
                              "which each row is read whole. Leave it out.")
        objective, corpus = accompany(recipe, corpus, recipe.objective.build(), model, runtime)
        found = _on_rows(recipe, corpus, runtime, objective, model, split)
        if judged := judge(model, corpus.tokenizer, runtime, corpus, split, seed=recipe.seed, progress=progress):
            found |= {"exact_match": judged["exact_match"], "skills": judged}
        return {"split": split, "weights": weights, **found}
    if not recipe.is_language_model:
        if stride is not None:
            raise ConfigError("stride belongs to the windows of a language model; this run has none. Leave it out.")
        measure = _SPLIT_SCORES.get(recipe.objective.kind)
        found = measure(recipe, corpus, model, runtime, split, baselines=wanted) if measure else {}
        return {"split": split, "weights": weights, **found}
    return _documents(recipe, corpus, model, runtime, split, stride=stride, weights=weights, progress=progress,
                      baselines=("5-gram", "xz") if wanted else ())


def _documents(recipe: Recipe, corpus: Any, model: nn.Module, runtime: Runtime, split: str, *, stride: int | None,
               baselines: tuple[Any, ...], weights: str, progress: Any) -> dict[str, Any]:
    from dougong.evaluate import evaluate_split

    comparison = evaluate_split(
        model, corpus.tokenizer, corpus.documents(split), context=recipe.model.context,
        stride=stride or recipe.evaluate.stride, split=split, weights=weights, runtime=runtime,
        training_documents=corpus.documents("train") if "5-gram" in baselines else None,
        baselines=baselines, seed=recipe.seed,
        progress=(lambda message: progress(0, None, message)) if progress else None)
    return comparison.payload()


def print_result(result: dict[str, Any], out: Any) -> None:
    """The figures as a table and a sentence for people."""
    from rich.markup import escape
    from rich.table import Table as Grid

    if "bits_per_byte" not in result:
        _print_measures(result, out)
        return
    grid = Grid(box=None, header_style="bold", pad_edge=False)
    grid.add_column(escape(f"all of {result['text']}") if "text" in result else f"{result['split']} split")
    for title in ("bits per byte", "95 % interval", "model − this (paired 95 %)"):
        grid.add_column(title, justify="right")
    grid.add_row("the model", f"[bold]{result['bits_per_byte']:.4f}[/]", _interval(result["interval"]), "")
    for row in result["baselines"]:
        grid.add_row(row["name"], f"{row['bits_per_byte']:.4f}", "",
                     f"{row['difference']:+.4f} {_interval(row['interval'])}")
    out.print(grid)
    for note in result.get("notes", []):
        out.print(f"note: {note['name']}: {note['bits_per_byte']:.4f}", style="dim")
    if "calibration" in result:
        sure = result["calibration"]
        out.print(f"calibration: error {sure['error']:.4f}, Brier score {sure['brier']:.4f}; the likeliest token has "
                  f"{sure['confidence']:.1%} on average and is right {sure['accuracy']:.1%} of the time.")
    out.print(f"{result['documents']:,} documents, {result['bytes']:,} bytes, {result['tokens']:,} tokens; every token "
              f"scored once, context {result['context']}, stride {result['stride']}.", style="dim")
    for reason, fact in result.get("skipped", {}).items():
        names = f"{', '.join(fact['examples'][:3])}{', …' * (fact['count'] > 3)}"
        out.print(f"skipped, {reason}: {fact['count']:,} ({names})", style="dim", markup=False)


def _print_measures(result: dict[str, Any], out: Any) -> None:
    """A model of arrays: its figures, and under the first of them those it is compared with."""
    measures = {key: value for key, value in result.items() if isinstance(value, int | float)}
    for number, (key, value) in enumerate(measures.items()):
        form = ",d" if isinstance(value, int) else ".4f" if abs(value) >= 1e-3 or not value else ".1e"
        out.print(f"  {key.replace('_', ' '):<28}{value:{form}}")
        for row in result.get("baselines", []) if number == 0 else []:
            gap = f"   model − it {row['difference']:+.4f} {_interval(row['interval'])}" if "difference" in row else ""
            out.print(f"    {row['name']:<26}{row[key]:.4f}{gap}")
    if result.get("skills"):
        from dougong.recipes.judge import print_judged

        print_judged(result["skills"], out)


def _interval(pair: list[float] | None) -> str:
    return f"[{pair[0]:.4f}, {pair[1]:.4f}]".replace("[", r"\[") if pair else "–"


def held_out_splits(corpus: Any) -> list[str]:
    """Which of validation and test hold anything."""
    return [split for split in _filled(corpus) if split != "train"]


def _filled(corpus: Any) -> list[str]:
    return [name for name, values in corpus.facts["splits"].items() if values.get("documents", values.get("rows", 0))]


def _existing(split: str, recipe: Recipe, corpus: Any, *, asked: bool) -> str:
    """`split`, or validation where the data have no test split and none was asked for by name."""
    has = _filled(corpus)
    if split in has:
        return split
    if not asked and "validation" in has:
        return "validation"
    key = "data.split.fractions" if recipe.data.kind == "text" else "data.fractions"
    raise ConfigError(f"there is no {split!r} split with anything in it. There are: {', '.join(has)}.\n"
                      f"{key} decides how much is held out, as in '{key}=[0.9,0.05,0.05]'.")


def _language_model(recipe: Recipe, corpus: Any, runtime: Runtime, divided: Any,
                    poll: Callable[[], None]) -> Score | None:
    from dougong.evaluate import bits_per_byte
    from dougong.evaluate.together import bits_per_byte_together

    documents = _documents_up_to(corpus, recipe.evaluate.tokens)
    if not documents:
        return None

    def measure(model: nn.Module) -> dict[str, Any]:
        found = bits_per_byte(model, corpus.tokenizer, documents, context=recipe.model.context, runtime=runtime,
                              poll=poll)
        return {"loss": found.nats_per_token, "bits_per_byte": found.bits_per_byte, "tokens": int(found.tokens.sum())}

    def measure_together(_model: nn.Module) -> dict[str, Any]:
        rows = (recipe.train.rows or 1) // runtime.mesh.data_size
        return bits_per_byte_together(divided.losses, corpus.tokenizer, documents, context=recipe.model.context,
                                      rows=rows, runtime=runtime, poll=poll)

    return measure if divided is None else measure_together


def _rows(recipe: Recipe, corpus: Any, runtime: Runtime, objective: Any, divided: Any,
          poll: Callable[[], None]) -> Score | None:
    split = "validation"
    limits = {"most_tokens": recipe.evaluate.tokens, "poll": poll}

    def measure(model: nn.Module) -> dict[str, Any]:
        return _on_rows(recipe, corpus, runtime, objective, model, split, **limits)

    def measure_together(_model: nn.Module) -> dict[str, Any]:
        rows = (recipe.train.rows or 1) // runtime.mesh.data_size
        return held_out_together(divided.losses, objective, corpus.batches(split, rows=rows), runtime, rows=rows,
                                 **limits)

    alone = divided is None or hasattr(corpus, "score")     # what scores models itself has the whole one everywhere
    return measure if alone else measure_together


def _on_rows(recipe: Recipe, corpus: Any, runtime: Runtime, objective: Any, model: nn.Module, split: str,
             **limits: Any) -> dict[str, Any]:
    """What the corpus measures where it scores models itself (`score(model, runtime, split, …)`), else the objective's
    own metrics."""
    if hasattr(corpus, "score"):
        return corpus.score(model, runtime, split, **limits)
    rows = recipe.train.micro_rows or recipe.train.rows or 1
    return held_out(objective, model, corpus.batches(split, rows=rows), runtime, **limits)


def _documents_up_to(corpus: Any, tokens: int) -> list[Any]:
    """Validation documents in a fixed scattered order until they hold `tokens`; at least one, all when fewer."""
    view = corpus.documents("validation")
    total = corpus.facts["splits"]["validation"]["tokens"]
    if total <= tokens:
        return list(view)
    chosen, held = [], 0.0
    tokens_per_byte = total / max(view.bytes, 1)
    stride = _coprime_stride(len(view))
    for index in range(len(view)):
        document = view[index * stride % len(view)]
        chosen.append(document)
        held += len(document.text.encode()) * tokens_per_byte
        if held >= tokens:
            break
    return chosen


def _coprime_stride(count: int) -> int:
    """A step that visits all of `count` places in a scattered order."""
    from math import gcd

    return next(step for step in range(max(1, round(count * 0.618)), count + 2) if gcd(step, count) == 1)


_SCORES: dict[str, Callable[..., Score | None]] = {
    "classify": array_scores.classifier, "regression": array_scores.regression}
_SPLIT_SCORES: dict[str, Callable[..., dict[str, Any]]] = {
    "classify": array_scores.accuracy_on, "regression": array_scores.squared_error_on, "gan": array_scores.likeness_to}

"""Questions that were never trained on, put to a model: the share of right answers of each skill, what it declines."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dougong.core.events import read_events
from dougong.core.files import write_json
from dougong.core.run import RunDirectory
from dougong.data.conversations import Conversation
from dougong.evaluate.skills import OUTSIDE, Answered, answer_all, same, scores
from dougong.generate.replies import replies
from dougong.models import count
from dougong.recipes.answering import asked, long_enough
from dougong.recipes.assemble import prepare_data
from dougong.recipes.journey import read_journey, stage_runs
from dougong.recipes.open_run import open_run
from dougong.recipes.recipe import recipe_from_run
from dougong.recipes.scoring import held_out_splits
from dougong.recipes.start import as_it_lies
from dougong.runtime.device import Runtime

_SHOWN = 10
_MOST = 400
"""questions of a skill at most, evenly spread over those held out"""


@dataclass(frozen=True)
class Question:
    """A conversation up to the reply that can be checked, and the tools that may be called in it."""

    skill: str
    prompt: str
    answer: str
    messages: list[dict[str, Any]]
    tools: tuple[dict[str, Any], ...]


def questions(conversations: Sequence[Conversation]) -> list[Question]:
    """Those that have an answer to be checked."""
    return [Question(one.skill or "answers", before[-1]["content"], one.answer, before, one.tools)
            for one in conversations if one.answer is not None and (before := asked(one))]


def judge(model: nn.Module, tokenizer: Any, runtime: Runtime, corpus: Any, split: str, *, seed: int = 0,
          progress: Any = None) -> dict[str, Any] | None:
    """Puts every held-out question with an answer to the model, greedily; None where the corpus has none.

    JSON values: `scores` (evaluate/skills.py) of the skills, `right` over all of them, `outside` and `inside_declined`
    where there are questions that should be declined, and answers drawn at random.
    """
    if not hasattr(corpus, "conversations"):
        return None
    known = questions(corpus.conversations("train"))
    seen = {question.prompt for question in known}      # another module may have a function of the same first line
    by_skill: dict[str, list[Question]] = {}
    for question in questions(corpus.conversations(split)):
        if question.prompt not in seen:
            by_skill.setdefault(question.skill, []).append(question)
    held_out = [question for own in by_skill.values() for question in _spread(own)]
    if not held_out:
        return None
    if progress:
        progress(0, None, f"asking {len(held_out):,} questions")
    said = replies(model, tokenizer, [question.messages for question in held_out],
                   long_enough(tokenizer, [question.answer for question in held_out]),
                   tools=[question.tools for question in held_out], runtime=runtime)
    answered = answer_all(held_out, known, lambda _prompts: said)
    inside = [one for one in answered if one.skill != OUTSIDE]
    outside = [one for one in answered if one.skill == OUTSIDE]
    refusals = {one.answer for one in outside}
    declined = [any(same(one.reply, refusal) for refusal in refusals) for one in inside]
    random = np.random.default_rng(seed)
    return {
        "items": len(answered), "exact_match": float(np.mean([one.right for one in answered])),
        "scores": [score.to_dict() for score in scores(inside, seed=seed)],
        "right": float(np.mean([one.right for one in inside])) if inside else 0.0,
        "outside": {"items": len(outside), "declined": float(np.mean([one.right for one in outside]))}
        if outside else None,
        "inside_declined": float(np.mean(declined)) if declined else 0.0,
        "failures": _drawn([one for one in answered if not one.right], random),
        "successes": _drawn([one for one in answered if one.right], random)}


def _spread(questions: list[Question]) -> list[Question]:
    places = np.linspace(0, len(questions) - 1, min(len(questions), _MOST)).astype(int)
    return [questions[place] for place in places]


def _drawn(answered: list[Answered], random: np.random.Generator) -> list[dict[str, str]]:
    chosen = random.permutation(len(answered))[:_SHOWN]
    return [{"skill": one.skill, "prompt": one.prompt, "answer": one.answer, "reply": one.reply}
            for one in (answered[int(place)] for place in chosen)]


def judge_journey(path: Path, *, progress: Any = None) -> dict[str, Any] | None:
    """Judges a journey's last run on the held-out questions of its last stage that learned from given conversations.

    Those of the test split, or of validation where there is none. Writes skills.json beside journey.yaml. None where no
    stage learned any, or held any out.
    """
    runs = stage_runs(path)
    opened = open_run(path, to_read=True)
    for run in reversed(runs):
        directory = RunDirectory(run)
        recipe, recorded = recipe_from_run(directory.recipe)
        if recipe.data.kind == "chats" and recipe.objective.kind == "causal_lm":     # practice asks fewer skills
            corpus = prepare_data(as_it_lies(recipe, recorded, directory), progress=progress)
            held = held_out_splits(corpus)
            judged = judge(opened.model, opened.tokenizer, opened.runtime, corpus, held[-1], progress=progress) \
                if held else None
            if judged is None:
                return None
            found = {"name": read_journey(path).name, "run": str(runs[-1]),
                     "parameters": count.parameters(opened.recipe.model)["total"],
                     "stages": [_stage(one) for one in runs], **judged}
            write_json(path / "skills.json", found)
            return found
    return None


def _stage(run: Path) -> dict[str, Any]:
    ends = [event for event in read_events(RunDirectory(run).events) if event["event"] == "end"]
    return {"name": run.name.partition("-")[2], "run": str(run), "seconds": ends[-1].get("elapsed_s") if ends else None}


def print_judged(judged: dict[str, Any], out: Any) -> None:
    """The skills as a table for people."""
    from rich.markup import escape
    from rich.table import Table as Grid

    grid = Grid(box=None, header_style="bold", pad_edge=False)
    for title in ("skill", "questions", "right", "commonest answer", "most similar question", "claimed"):
        grid.add_column(title, justify="left" if title in ("skill", "claimed") else "right")
    for score in judged["scores"]:
        grid.add_row(escape(score["skill"]), str(score["items"]), f"[bold]{score['model']:.1%}[/]",
                     f"{score['majority']:.1%}", f"{score['nearest']:.1%}", "yes" if score["claimed"] else "no")
    out.print(grid)
    if outside := judged["outside"]:
        out.print(f"declined: {outside['declined']:.0%} of {outside['items']} questions outside its skills, "
                  f"{judged['inside_declined']:.1%} of those inside", style="dim")

"""`--dry-run`: everything checked, counted and predicted; nothing trained, no run made."""

import math
from typing import Any

import torch

from dougong.adapt.lora import trained
from dougong.core.config import replace, to_dict
from dougong.models import count
from dougong.objectives.objective import batch_fields
from dougong.plan import estimate
from dougong.plan.step import Step, step_memory
from dougong.plan.work import CHECKPOINTING
from dougong.recipes.assemble import Assembly, assemble
from dougong.recipes.probe import measure_step
from dougong.recipes.recipe import Recipe
from dougong.recipes.teacher import keeps_answers, predict_answers, student_alone
from dougong.recipes.train import given, settle


def dry_run(asked: Recipe, *, out: Any, progress: Any = None) -> dict[str, Any]:
    """Prints parameters, FLOPs, memory, disk and time of a recipe, and every derived value with its reason."""
    from rich.table import Table as Grid

    recipe, derived, corpus, runtime, _ = settle(asked, ask_teacher=False, progress=progress)
    built = assemble(recipe, corpus)
    seconds = measure_step(built)
    parameters = count.parameters(recipe.model)
    if recipe.is_language_model:
        figures = _language_model(recipe, parameters["total"], built)
    else:
        figures = {"parameters": parameters["total"]}
    figures |= {"steps": given(recipe.train.steps), "seconds_per_step": seconds,
                "training_seconds": seconds * given(recipe.train.steps)}
    if keeps_answers(asked):
        recipe = replace(recipe, objective=asked.objective)
        figures |= predict_answers(recipe, corpus, runtime)
    grid = Grid("derived", "value", "why", box=None, header_style="bold", pad_edge=False)
    for item in derived:
        grid.add_row(item.key, str(item.value), item.reason)
    out.print(grid, "")
    out.print(_table(figures))
    out.print("\nNothing was trained. The time was measured on this machine, evaluations and checkpoints not included.",
              style="dim")
    return {"recipe": to_dict(recipe), "derived": [item.to_dict() for item in derived], **figures,
            "data": corpus.facts}


def _language_model(recipe: Recipe, total: int, built: Assembly) -> dict[str, Any]:
    """Bytes and operations; memory is one whole step of this process, counted on the meta device."""
    runtime, moved = built.runtime, trained(built.state.model) if recipe.adapter is not None else None
    context, rows, micro_rows = recipe.row_tokens, given(recipe.train.rows), given(recipe.train.micro_rows)
    step = Step(recipe.model, student_alone(recipe), recipe.optim, micro_rows=micro_rows,
                micro_batches=min(2, -(-rows // micro_rows)), context=context,
                precision="bf16" if runtime.dtype == torch.bfloat16 else "fp32", device=runtime.device.type,
                checkpoint=CHECKPOINTING[recipe.train.gradient_checkpointing], ema=recipe.train.ema is not None,
                adapt=recipe.adapter)
    counted = step_memory(step).kinds
    tokens = math.prod(batch_fields(step.objective, rows, context)["tokens"][0])
    planned = estimate(
        parameters=total, trained=moved, flops_per_token=built.flops_per_token or 0,
        tokens_per_step=tokens, steps=given(recipe.train.steps), ema=recipe.train.ema is not None, counted=counted,
        checkpoints_kept=recipe.train.keep_last + recipe.train.keep_best)
    return planned.to_dict() | ({} if moved is None else {"parameters_trained": moved})


def _table(figures: dict[str, Any]) -> Any:
    from rich.table import Table as Grid

    grid = Grid(box=None, show_header=False, pad_edge=False)
    for key, value in figures.items():
        grid.add_row(key.replace("_", " "), _human(key, value))
    return grid


def _human(key: str, value: float) -> str:
    if key.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"
    if key.startswith("flops"):
        return f"{value:.3g} FLOP"
    if key in ("training_seconds", "teacher_seconds"):
        return f"{value / 60:.1f} min"
    return f"{value * 1000:.0f} ms" if key == "seconds_per_step" else f"{value:,}"

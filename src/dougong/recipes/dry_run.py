"""`--dry-run`: everything checked, counted and predicted; nothing trained, no run made."""

from typing import Any

import torch

from dougong.core.config import to_dict
from dougong.models import count
from dougong.nn.attention_kernels import choose_kernel, fused
from dougong.plan import estimate
from dougong.recipes.assemble import assemble
from dougong.recipes.probe import measure_step
from dougong.recipes.recipe import Recipe
from dougong.recipes.train import given, settle
from dougong.runtime.device import Runtime

_LOGIT_COPIES = 2   # the logits and their gradient


def dry_run(asked: Recipe, *, out: Any, progress: Any = None) -> dict[str, Any]:
    """Prints parameters, FLOPs, memory, disk and time of a recipe, and every derived value with its reason."""
    from rich.table import Table as Grid

    recipe, derived, corpus, _ = settle(asked, progress=progress)
    built = assemble(recipe, corpus)
    seconds = measure_step(built)
    parameters = count.parameters(recipe.model)
    if recipe.is_language_model:
        figures = _language_model(recipe, parameters["total"], built.runtime)
    else:
        figures = {"parameters": parameters["total"]}
    figures |= {"steps": given(recipe.train.steps), "seconds_per_step": seconds,
                "training_seconds": seconds * given(recipe.train.steps)}
    grid = Grid("derived", "value", "why", box=None, header_style="bold", pad_edge=False)
    for item in derived:
        grid.add_row(item.key, str(item.value), item.reason)
    out.print(grid, "")
    out.print(_table(figures))
    out.print("\nNothing was trained. The time was measured on this machine, evaluations and checkpoints not included.",
              style="dim")
    return {"recipe": to_dict(recipe), "derived": [item.to_dict() for item in derived], **figures,
            "data": corpus.facts}


def _language_model(recipe: Recipe, total: int, runtime: Runtime) -> dict[str, Any]:
    context, rows = recipe.model.context, given(recipe.train.micro_rows)
    logits = min(rows * context * recipe.model.vocab_size, getattr(recipe.objective, "chunk_logits", 1 << 62))
    planned = estimate(
        parameters=total, flops_per_token=count.flops_per_token(recipe.model, context) or 0,
        tokens_per_step=given(recipe.train.rows) * context, steps=given(recipe.train.steps),
        optimizer=recipe.optim.kind,
        ema=recipe.train.ema is not None, checkpoints_kept=recipe.train.keep_last + recipe.train.keep_best,
        activations_bytes=count.activation_bytes(recipe.model, rows=rows, context=context, dtype=runtime.dtype,
                                                 checkpoint_activations=recipe.train.checkpoint_activations,
                                                 fused_attention=_fuses_attention(context, runtime)),
        logits_bytes=_LOGIT_COPIES * logits * 4)
    return planned.to_dict()


def _fuses_attention(context: int, runtime: Runtime) -> bool:
    """Whether attention over a whole context keeps no T × S weights here."""
    query = torch.empty(1, 1, context, 1, dtype=runtime.dtype, device=runtime.device)
    return choose_kernel(query, query) is fused


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
    if key == "training_seconds":
        return f"{value / 60:.1f} min"
    return f"{value * 1000:.0f} ms" if key == "seconds_per_step" else f"{value:,}"

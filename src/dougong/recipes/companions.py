"""What some objectives need besides a model and a batch: a reference, a teacher, experience of their own.

A companion function gets what the recipe alone made and returns the objective and the corpus that are trained with: the
same, or one around them. It is called when a run is assembled, and again when its result is scored.
"""

from typing import Any

from torch import nn

from dougong.core.table import Table
from dougong.objectives.objective import Objective
from dougong.recipes.recipe import Recipe
from dougong.runtime.device import Runtime

COMPANIONS = Table("companion", {
    "dpo": "dougong.recipes.reference:with_reference",
    "ipo": "dougong.recipes.reference:with_reference",
    "kto": "dougong.recipes.reference:with_reference",
    "orpo": "dougong.recipes.reference:check_pairs",
    "classify_text": "dougong.recipes.reference:check_labels",
    "reward": "dougong.recipes.reference:check_pairs",
    "grpo": "dougong.recipes.experience:with_experience",
    "rejection": "dougong.recipes.experience:with_experience",
    "distil": "dougong.recipes.teacher:taught",
})
"""objective kind: function(recipe, corpus, objective, model, runtime) -> (objective, corpus)"""


def accompany(recipe: Recipe, corpus: Any, objective: Objective, model: nn.Module,
              runtime: Runtime) -> tuple[Objective, Any]:
    """The objective and the corpus with what this kind of objective needs beside them; most need nothing."""
    if recipe.objective.kind not in COMPANIONS:
        return objective, corpus
    return COMPANIONS[recipe.objective.kind](recipe, corpus, objective, model, runtime)

"""How a run meets the processes it was launched with: which layout they form, and which run a restart goes on with."""

import hashlib
import math
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from dougong.adapt.lora import why_not_divided
from dougong.core.config import dump_yaml, replace
from dougong.core.errors import ConfigError
from dougong.core.files import write_text
from dougong.core.run import RunDirectory
from dougong.objectives.distil import DistilConfig
from dougong.objectives.objective import batch_fields, token_fields
from dougong.objectives.policy import RolloutConfig
from dougong.recipes.derive import Derived
from dougong.recipes.recipe import Recipe
from dougong.runtime.layout import DATA, AutoLayoutConfig, LayoutConfig
from dougong.runtime.processes import from_first, launched, process_rank

_LAUNCH = ".launch"


def lay_out(recipe: Recipe, asked: LayoutConfig | AutoLayoutConfig | None = None) -> tuple[LayoutConfig, list[Derived]]:
    """The layout of a recipe on the processes launched, and what was derived for it.

    `asked`: another layout for a run that goes on. Without one, a resumed run keeps what of its own still fits (an
    elastic launch may have lost processes). Raises ConfigError where the layout does not fit processes or model.
    """
    processes, wanted = launched(), recipe.layout if asked is None else asked
    if isinstance(wanted, AutoLayoutConfig):
        # by process 0's machine: hosts that differ would choose differently
        layout, reason = from_first(_chosen(recipe, processes) if process_rank() == 0 else None)
        layout = layout.on(processes)
        derived = [Derived("layout", str(layout), reason)]
    else:
        layout = wanted.on(processes)
        derived = [] if processes == 1 or wanted.replicate else \
            [Derived("layout.replicate", layout.replicate, f"{processes} processes; the layout is {layout}")]
    if (reason := why_not(recipe, layout, begun=asked is not None)) is not None:
        raise ConfigError(f"the layout {layout} does not fit this recipe: {reason}")
    return layout, derived


def _chosen(recipe: Recipe, processes: int) -> tuple[LayoutConfig, str]:
    """What `layout: auto` is here, and why."""
    from dougong.objectives.causal_lm import CausalLMConfig
    from dougong.plan import choose_layout
    from dougong.plan.machine import here
    from dougong.recipes.plan_recipe import work_of

    if not hasattr(recipe.model, "decoder"):
        return LayoutConfig(replicate=processes), "this model has no layers to divide; every process takes rows"
    # no other objective decides between layouts, and not all can be planned
    work = replace(work_of(recipe, here()), objective=CausalLMConfig())
    return choose_layout(work, processes, why_not=partial(why_not, recipe))


def nearest(layout: LayoutConfig | AutoLayoutConfig, processes: int) -> LayoutConfig | AutoLayoutConfig:
    """What of a layout still fits another number of processes: copies first, then parts of the weights, make way."""
    if isinstance(layout, AutoLayoutConfig):
        return layout
    fixed = math.prod(layout.size(axis) for axis in ("pipeline", "expert", "context", "tensor"))
    if processes % fixed:
        return layout       # `on` will say what fits
    return replace(layout, replicate=None, shard=math.gcd(layout.shard, processes // fixed))


def why_not(recipe: Recipe, layout: LayoutConfig, *, begun: bool = False) -> str | None:
    """Why a recipe cannot be trained under a layout, with the nearest that works; None if it can. A run that has
    `begun` keeps its rows."""
    if layout.processes == 1:
        return None
    model, train = recipe.model, recipe.train
    divided = [axis for axis in ("pipeline", "tensor", "context", "expert") if layout.size(axis) > 1]
    if divided and not hasattr(model, "decoder"):
        return f"only a decoder can be divided along {divided[0]}, not {model.kind}. Try layout.{divided[0]}=1."
    if divided and not token_fields(1, 1).items() <= batch_fields(recipe.objective, 1, 1).items():
        return (f"objective.kind={recipe.objective.kind} judges texts as wholes: processes may share its rows, not the "
                f"parts of one along {divided[0]}. Try layout.replicate or layout.shard.")
    if train.rows is not None and train.rows % (copies := layout.size(*DATA)):
        return (f"train.rows={train.rows} cannot be shared by {copies} processes equally. "
                + (_numbers_that_fit(train.rows, layout) if begun else
                   f"Try train.rows={max(1, round(train.rows / copies)) * copies}."))
    return next((reason for reason in _reasons(recipe, layout) if reason), None)


def _numbers_that_fit(rows: int, layout: LayoutConfig) -> str:
    """The order of the samples hangs on the rows of a step, so it is the launch that has to change."""
    copies, each = layout.size(*DATA), layout.processes // layout.size(*DATA)
    fit = [n for n in range(1, rows + 1) if rows % n == 0]
    near = [max(n for n in fit if n < copies), *[n for n in fit if n > copies][:1]]
    return f"The run keeps its rows, so launch it with {' or '.join(str(n * each) for n in near)} processes."


def _reasons(recipe: Recipe, layout: LayoutConfig) -> Any:
    """What each axis in use says, cheapest first; modules are loaded only for axes above 1."""
    if isinstance(recipe.objective, DistilConfig):
        yield "distillation trains in one process so far. Start it without torchrun, and leave the layout out."
    if isinstance(recipe.objective, RolloutConfig) and layout.processes > layout.size("replicate"):
        yield "every process writes its samples with the whole model. Try layout.replicate alone."
    if whole := recipe.objective.build().not_additive:
        yield f"its processes share each batch, but {whole}. Start it without torchrun, and leave the layout out."
    if recipe.adapt is not None:
        yield why_not_divided(recipe.adapt, layout)
    if layout.tensor > 1:
        from dougong.parallel.tensor import why_not_tensor

        yield why_not_tensor(recipe.model, layout)
    if layout.context > 1:
        from dougong.parallel.context import why_not_context

        yield why_not_context(recipe.model, layout.context, layout.context_method, tensor=layout.tensor)
    if layout.expert > 1:
        from dougong.parallel.expert import why_not_experts

        yield why_not_experts(recipe.model, layout.expert, tensor=layout.tensor)
    if layout.pipeline > 1:
        from dougong.parallel.stages import why_not_pipeline

        yield why_not_pipeline(recipe.model, layout, micro_batches(recipe, layout),
                               compile=bool(recipe.runtime.compile),
                               checkpoint_activations=recipe.train.checkpoint_activations)


def micro_batches(recipe: Recipe, layout: LayoutConfig) -> int:
    """Micro-batches of one process in a step: by `train.micro_rows`, else up to two for each pipeline stage, and one at
    least where the rows allow it."""
    copies = layout.size(*DATA)
    rows = (recipe.train.rows or copies) // copies
    if recipe.train.micro_rows is not None:
        return max(1, -(-rows // recipe.train.micro_rows))
    if layout.pipeline == 1:
        return 1
    equal = [number for number in range(1, rows + 1) if rows % number == 0]
    enough = [number for number in equal if number >= layout.pipeline] or equal[-1:]
    return max((number for number in enough if number <= 2 * layout.pipeline), default=enough[0])


def launch_of(asked: Recipe) -> str | None:
    """Which launch this is and what it was asked to train: a restart says the same, and neither another command of one
    job nor another seed does. None without torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return None
    name = run_id if run_id != "none" else f"agent {os.getppid()} at {os.environ.get('MASTER_PORT', '')}"
    return f"{name}\n{hashlib.sha256(dump_yaml(asked).encode()).hexdigest()}\n"


def remember_launch(directory: RunDirectory, launch: str | None) -> None:
    """Notes in the run which launch trains it, so that a restart of the same launch goes on with it."""
    if launch is not None:
        write_text(directory.path / _LAUNCH, launch)


def run_of_launch(path: Path, launch: str | None) -> str | None:
    """The run that an earlier attempt of this launch began at `path`, or beside it where the name was taken; process 0
    looks, the others are told."""
    if launch is None or process_rank() != 0 or not path.parent.is_dir():
        return None
    ours = re.compile(rf"{re.escape(path.name)}(-\d+)?")
    return next((str(note.parent) for note in sorted(path.parent.glob(f"*/{_LAUNCH}"))
                 if ours.fullmatch(note.parent.name) and note.read_text("utf-8") == launch), None)

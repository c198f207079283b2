"""From a recipe to the things it names: corpus, model, objective, optimiser, loader, state."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dougong.adapt.lora import hold_frozen, trained_matrices
from dougong.adapt.quantize import Form, make_room
from dougong.core.config import replace
from dougong.core.errors import ConfigError
from dougong.data.batch import Batch
from dougong.models import count
from dougong.models.heads import VALUE, add_value_head
from dougong.nn.float8 import multiply_in_float8
from dougong.objectives.objective import Objective, batch_fields
from dougong.objectives.policy import RolloutConfig
from dougong.recipes.companions import accompany
from dougong.recipes.derive import Derived, check_float8, fit_adapter, fit_to_data, fit_to_new_tokens
from dougong.recipes.launch import micro_batches
from dougong.recipes.recipe import Recipe, with_values
from dougong.recipes.start import Weights, begin, read_weights
from dougong.runtime.device import Runtime
from dougong.runtime.layout import AXES, DATA
from dougong.runtime.mesh import Mesh
from dougong.runtime.processes import from_first, launched_here
from dougong.runtime.seeds import derive, seed_all
from dougong.train import EMAConfig, TrainConfig

_CHECKS_PER_RUN = 10     # evaluations in a run that does not say how many
_SECONDS_PER_CHECKPOINT = 60


@dataclass
class Assembly:
    """Everything a training run needs, built. `recipe` is the resolved one, `derived` says what was filled in."""

    recipe: Recipe
    runtime: Runtime
    corpus: Any
    objective: Objective
    state: Any
    derived: list[Derived] = field(default_factory=list)
    parallel: Any = None
    """how several processes compute a step together (`parallel.Parallel`); None for one"""
    start: str | None = None
    """fingerprint of the weights that it began from"""

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the weights of other models that this run stands on, as its recipe records them."""
        found = {"start_fingerprint": self.start, "teacher_fingerprint": getattr(self.objective, "fingerprint", None)}
        return {name: value for name, value in found.items() if value}

    @property
    def is_whole(self) -> bool:
        """Whether this process can run the whole model by itself."""
        return self.runtime.mesh.size("pipeline", "shard", "expert", "context", "tensor") == 1

    @property
    def gradients(self) -> Any:
        """The gradient function of this run's steps."""
        from dougong.train.step import plain_gradients

        return self.parallel.gradients if self.parallel else plain_gradients

    @property
    def flops_per_token(self) -> float | None:
        if not self.recipe.is_language_model:
            return None
        if self.recipe.adapter is None:
            return count.flops_per_token(self.recipe.model, self.recipe.row_tokens)
        factors, whole = trained_matrices(self.state.model)
        return count.flops_per_token(self.recipe.model, self.recipe.row_tokens, adapter=factors, whole=whole)


def prepare_data(recipe: Recipe, *, progress: Any = None) -> Any:
    """The corpus of a recipe, from the cache where it was prepared before.

    The split and the tokenizer do not follow the recipe's seed: runs of several seeds see the same data.
    """
    if recipe.is_language_model:
        return recipe.data.prepare(recipe.tokenizer, context=recipe.row_tokens, progress=progress)
    return recipe.data.prepare()


def data_shapes(recipe: Recipe, corpus: Any) -> dict[str, int]:
    """What the data decide about the model's ends."""
    if recipe.is_language_model:
        labels = corpus.facts.get("labels")
        return {"vocab_size": corpus.tokenizer.vocab_size, **({"classes": len(labels)} if labels else {})}
    facts = corpus.facts
    if facts.get("kind") == "regression":
        return {"in_features": facts["features"]}
    pixels = corpus.arrays("train")["pixels"]
    return {"num_classes": facts["classes"], "image_size": pixels.shape[-1]}


def build_model(recipe: Recipe, runtime: Runtime, *, integers: Mapping[str, Form] | None = None) -> nn.Module:
    """The model with its first weights, on the device; built on the meta device, so memory is taken once.

    `integers` names the parts that will be loaded as integers: they get no floats.
    """
    with torch.device("meta"):
        model = _with_its_heads(recipe)
        if integers:
            make_room(model, integers)
    # as `to_empty`, whose `empty_like` imports a computer algebra: most of a second before a server's first answer
    model = model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=runtime.device))
    model.initialise(derive(recipe.seed, "model"))
    if getattr(recipe.data, "precision", None) == "float64":
        model = model.double()
    model.compute_dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else runtime.dtype
    return model


def _with_its_heads(recipe: Recipe) -> Any:
    """The model, with a head for values where its objective judges texts."""
    model = recipe.model.build()
    if outputs := getattr(recipe.objective, "value_outputs", None):
        add_value_head(model, outputs)
    return model


def _with_head_trained(recipe: Recipe) -> tuple[Recipe, list[Derived]]:
    """Beside an adapter, a head for values is trained whole: it begins as noise."""
    name = f"{VALUE}.weight"
    if recipe.adapter is None or not getattr(recipe.objective, "value_outputs", None) or name in recipe.adapter.also:
        return recipe, []
    also = [*recipe.adapter.also, name]
    return with_values(recipe, {"adapt.also": also}), [
        Derived("adapt.also", also, "the head for values begins as noise, so it is trained")]


def _new_tokens(recipe: Recipe, corpus: Any) -> list[str]:
    """Special tokens of the data, such as those of a chat template, that an adapter's start has no name for."""
    if recipe.start is None or recipe.adapter is None or recipe.tokenizer.kind != "file":
        return []
    before = recipe.tokenizer.build().backend
    return [name for name in corpus.tokenizer.special_tokens if before.token_to_id(name) is None]


def assemble(recipe: Recipe, corpus: Any, *, runtime: Runtime | None = None) -> Assembly:
    """Builds everything for a recipe whose data are prepared; `train.steps` may still be open (it counts as one).

    Raises ConfigError for parts that do not fit together.
    """
    from dougong.train.memory import choose_micro_rows
    from dougong.train.shadow import Shadow
    from dougong.train.state import TrainState

    runtime = runtime or Runtime.start(recipe.runtime)
    mesh = runtime.mesh
    recipe, derived = fit_to_data(recipe, data_shapes(recipe, corpus))
    recipe, named = fit_to_new_tokens(recipe, _new_tokens(recipe, corpus))
    recipe, ranked = fit_adapter(recipe, corpus.facts)
    recipe, headed = _with_head_trained(recipe)
    derived += named + ranked + headed
    _check_rows(recipe)
    objective = recipe.objective.build()
    if mesh.devices is not None and recipe.train.micro_rows is None:
        recipe, chosen = divided_micro_rows(recipe, runtime)
        derived.append(chosen)
    seed_all(derive(recipe.seed, "training", *_own_randomness(mesh)))
    start = read_weights(recipe.start) if recipe.start else None
    model, parallel = _divided_model(recipe, objective, runtime, start) if mesh.devices is not None else (
        _whole_model(recipe, runtime, start), None)
    objective, corpus = accompany(recipe, corpus, objective, model, runtime)
    state = TrainState(
        model, recipe.optim.build(model), recipe.schedule.build(recipe.train.steps or 1),
        corpus.loader("train", rows=recipe.train.rows, seed=derive(recipe.seed, "order"), rank=mesh.data_rank,
                      world_size=mesh.data_size),
        shadow=_shadow(model, recipe.train.ema, Shadow))
    if recipe.train.micro_rows is None:
        batch = _largest_rollout(recipe) if isinstance(recipe.objective, RolloutConfig) else _one_batch(state.loader)
        rows, reason = choose_micro_rows(state, objective, runtime, batch)
        recipe = replace(recipe, train=replace(recipe.train, micro_rows=rows))
        derived.append(Derived("train.micro_rows", rows, reason))
    return Assembly(recipe, runtime, corpus, objective, state, derived, parallel, start and start.fingerprint)


def _check_rows(recipe: Recipe) -> None:
    if recipe.train.rows is None:
        raise ConfigError("train.rows is not given and this recipe has no size to derive it from. Try train.rows=32.")
    if (recipe.train.micro_rows or 0) > recipe.train.rows:
        raise ConfigError(f"train.micro_rows={recipe.train.micro_rows} is more than the {recipe.train.rows} rows of a "
                          "step (train.rows). Leave it out: it is derived.")


def _whole_model(recipe: Recipe, runtime: Runtime, start: Weights | None) -> nn.Module:
    """In one process. Under an adapter it is brought together on the CPU, so that a GPU never holds in fp32 what is
    frozen there."""
    place = runtime if recipe.adapter is None else dataclasses.replace(runtime, device=torch.device("cpu"))
    model = build_model(recipe, place)
    if start is not None:
        begin(model, start, seed=recipe.seed)
    if recipe.adapt is not None:
        recipe.adapt.apply(model, seed=derive(recipe.seed, "adapter"))
        model = hold_frozen(model).to(runtime.device)
    _checkpoint_activations(model, recipe)
    if recipe.runtime.float8:
        check_float8(recipe, runtime.device)
        multiply_in_float8(model)
    if runtime.compile:
        compile_blocks(model)
    return model


def _divided_model(recipe: Recipe, objective: Objective, runtime: Runtime,
                   start: Weights | None) -> tuple[nn.Module, Any]:
    """This process's part of the model, filled with the values that the whole would have."""
    from dougong.parallel.parallelize import parallelize

    with torch.device("meta"):
        whole = _with_its_heads(recipe)
    whole.compute_dtype = runtime.dtype
    if recipe.adapt is not None:
        hold_frozen(recipe.adapt.apply(whole, seed=0))
    _checkpoint_activations(whole, recipe)
    if recipe.runtime.float8:
        check_float8(recipe, runtime.device)
        multiply_in_float8(whole)
    parallel = parallelize(whole, objective, runtime, micro_batches=micro_batches(recipe, runtime.mesh.layout),
                           compile=compile_blocks if runtime.compile else None)
    model: Any = parallel.model.to_empty(device=runtime.device)
    model.initialise(derive(recipe.seed, "model"))
    if start is not None:
        begin(model, start, seed=recipe.seed)
    if recipe.adapter is not None:
        recipe.adapter.fill(model, seed=derive(recipe.seed, "adapter"))
    return model, parallel


def _checkpoint_activations(model: nn.Module, recipe: Recipe) -> None:
    if recipe.train.gradient_checkpointing:
        stack: Any = getattr(model, "stack", None)
        if not hasattr(stack, "checkpoint_activations"):
            raise ConfigError("train.gradient_checkpointing has no effect on a model without a stack of layers.\n"
                              "Leave it out, or lower train.micro_rows to save memory.")
        stack.checkpoint_activations = recipe.train.checkpoint_activations


def _own_randomness(mesh: Mesh) -> list[str]:
    """What sets this process's random numbers apart: its place. Along tensor too: what is dropped there lies in parts,
    along heads or tokens (`parallel.tensor` refuses what does not)."""
    return [f"{axis} {mesh.rank(axis)}" for axis in AXES if mesh.rank(axis)]


def divided_micro_rows(recipe: Recipe, runtime: Runtime) -> tuple[Recipe, Derived]:
    """Rows that one process takes at once: two micro-batches for each pipeline stage, and what its memory holds.

    From counts alone, since no process can run the divided model by itself; the same on every process.
    """
    from dougong.train.memory import available_bytes

    layout = runtime.mesh.layout
    rows = (recipe.train.rows or 1) // layout.size(*DATA)
    at_once = max(1, -(-rows // micro_batches(recipe, layout)))
    reason = f"{rows} rows of each process in {rows // at_once} portions" if layout.pipeline > 1 else \
        f"all {rows} rows of each process"
    if recipe.is_language_model:
        kept = count.activation_bytes(recipe.model, rows=1, context=recipe.row_tokens, dtype=runtime.dtype,
                                      checkpoint_activations=recipe.train.checkpoint_activations)
        per_row = kept / layout.size("tensor", "context", "pipeline")
        neighbours = 1 if runtime.device.type == "cuda" else launched_here()
        free = from_first(available_bytes(runtime.device)) / neighbours / 2
        fitting = [size for size in range(at_once, 0, -1) if rows % size == 0 and size * per_row <= free]
        if fitting and fitting[0] < at_once:
            at_once, reason = fitting[0], f"about {per_row / 1e6:,.0f} MB a row, and half of what is free holds no more"
    changed = replace(recipe, train=replace(recipe.train, micro_rows=at_once))
    return changed, Derived("train.micro_rows", at_once, reason)


def compile_blocks(model: nn.Module) -> None:
    """Compiles each block of the stack by itself: the first compilation serves all of them."""
    for module in model.modules():
        if isinstance(module, nn.ModuleDict):
            for name, block in module.named_children():
                if name.isdigit():
                    block.compile()


def settle_intervals(recipe: Recipe, seconds_per_step: float) -> tuple[Recipe, list[Derived]]:
    """Fills in how often to evaluate, sample and save, once the number of steps and their duration are known."""
    train: TrainConfig = recipe.train
    steps = train.steps or 1
    often = max(1, steps // _CHECKS_PER_RUN)
    changes = {
        "evaluate_every": (often, f"about {_CHECKS_PER_RUN} evaluations"),
        "sample_every": (train.evaluate_every or often, "with the evaluations"),
        "checkpoint_every": (max(1, min(steps, round(_SECONDS_PER_CHECKPOINT / max(seconds_per_step, 1e-6)))),
                             "about once a minute: what a crash may cost"),
    }
    missing = {name: pair for name, pair in changes.items() if getattr(train, name) is None}
    filled = replace(train, **{name: value for name, (value, _) in missing.items()})
    derived = [Derived(f"train.{name}", value, why) for name, (value, why) in missing.items()]
    return replace(recipe, train=filled), derived


def _shadow(model: nn.Module, ema: EMAConfig | None, shadow_class: Any) -> Any:
    return shadow_class(model, every=ema.every, tau=1 - ema.decay) if ema else None


def _one_batch(loader: Any) -> Any:
    """A first batch, with the loader put back to its beginning."""
    before = loader.state_dict()
    batch = next(iter(loader))
    loader.load_state_dict(before)
    return batch


def _largest_rollout(recipe: Recipe) -> Batch:
    """A step in which every sample counts and fills its row: of those drawn, any number may be left."""
    return Batch(**{name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in batch_fields(
        recipe.objective, recipe.train.rows or 1, recipe.row_tokens).items()})


def print_data_facts(facts: dict[str, Any], out: Any) -> None:
    """The corpus in a few lines: splits, tokenizer, what was left out."""
    from rich.table import Table as Grid

    grid = Grid("split", "documents", "bytes", "tokens", "bytes per token", box=None, header_style="bold",
                pad_edge=False)
    for name, split in facts["splits"].items():
        if "tokens" not in split:
            grid.add_row(name, f"{split['rows']:,} rows", f"{split['bytes']:,}", "", "")
        else:
            grid.add_row(name, f"{split['documents']:,}", f"{split['bytes']:,}", f"{split['tokens']:,}",
                         f"{split['bytes_per_token']:.2f}")
    out.print(grid)
    if "tokenizer" in facts:
        tokenizer = facts["tokenizer"]
        out.print(f"tokenizer: {tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens; "
                  f"packing: {facts['packing']['method']} ({facts['packing']['reason']})", style="dim")
    out.print(str(facts["split"].get("sentence", "")), style="dim")

"""`dougong plan RECIPE`: what the recipe needs on a machine, here or elsewhere, before any data are prepared."""

from dataclasses import replace as change
from typing import Any

from dougong.core.config import replace, to_dict
from dougong.core.errors import ConfigError
from dougong.models import count
from dougong.objectives.objective import batch_fields, token_fields
from dougong.plan.choose import Ranking, explain, nothing_fits, rank
from dougong.plan.counts import ITEMSIZE, Counts
from dougong.plan.machine import Machine
from dougong.plan.memory import DEVICE_BYTES, FRAGMENTATION, HOW
from dougong.plan.option import Option, bill, step_seconds
from dougong.plan.probe import measured
from dougong.plan.step import step_memory
from dougong.plan.work import CHECKPOINTING, Work
from dougong.recipes.derive import Derived, fit_to_processes, resolve
from dougong.recipes.recipe import Recipe
from dougong.recipes.teacher import student_alone
from dougong.runtime.device import RuntimeConfig
from dougong.runtime.layout import LayoutConfig

_UNKNOWN_VOCABULARY = 256
ASSUMPTIONS = (
    "activations are those of eager mode; torch.compile usually keeps fewer",
    "a step is bound by its arithmetic: on a GPU, models of a few million parameters take longer, as launches do",
    "stages and processes are equally fast; stragglers, restarts, evaluations and checkpoints are not in the time",
    "networks are not shared with others; collectives reach 80 % of a link",
    "energy is that of devices and hosts under load; cooling is not in it",
)


def plan_recipe(asked: Recipe, machine: Machine, devices: int, *, probe: bool = True, simulate: bool = False,
                progress: Any = None) -> dict[str, Any]:
    """Everything that `dougong plan` prints, draws and gives as JSON. Raises ConfigError where nothing fits, with the
    smallest number of devices on which it would, and for what is no training on texts.

    `probe`: on this machine, time real steps and plan with the efficiency they reach. `simulate`: run the best layout
    on fake tensors too.
    """
    check_plannable(asked)
    if asked.train.epochs is not None and asked.train.steps is None:
        raise ConfigError(f"train.epochs={asked.train.epochs:g} is as long as the data are, and a plan reads no data. "
                          "Add train.steps=1000, or train.minutes.")
    recipe, derived = _elsewhere(asked, machine, devices)
    work = work_of(recipe, machine)
    counts = Counts(work.step())
    pinned = recipe.layout.on(devices) if _is_pinned(recipe) else None
    ranking = rank(work, machine, devices, counts=counts)
    if pinned is not None:
        ranking = _with_asked(ranking, rank(work, machine, devices, counts=counts, pinned=pinned, changes=False))
    if devices == 1:
        ranking = _counted_exactly(work, counts, machine, ranking)
    if ranking.chosen is None:
        raise ConfigError(f"{recipe.name} does not fit {devices} x {machine.name}.\n"
                          + nothing_fits(work, machine, devices, ranking))
    if probe and machine.name == "here" and devices == 1:
        if progress:
            progress(0, None, "measuring a few steps")
        faster = measured(work, ranking.chosen, machine)
        if faster is not None:
            machine = faster
            ranking = _timed_again(work, counts, machine, ranking)
    if work.steps == 0:     # a time budget: as many steps as fit it
        work = change(work, steps=max(10, round((recipe.train.minutes or 1) * 60 / ranking.best[0].step_seconds)))
    simulated = None
    if simulate and devices > 1:
        if progress:
            progress(0, None, "simulating one process")
        ranking, simulated = _confirmed(work, ranking)
    return {**_facts(recipe, derived, work, counts, machine, devices, ranking), "simulated": simulated}


def check_plannable(recipe: Recipe) -> None:
    """Raises ConfigError where a step reads more or other than tokens with a target each (a dry run counts those), and
    where nothing says which model."""
    if recipe.model is None:
        raise ConfigError(f"recipe {recipe.name} begins from a model that exists. Name one: --model RUN, "
                          "--model FOLDER, or --model hf:OWNER/NAME.")
    if recipe.adapter is not None and recipe.adapter.rank is None:
        raise ConfigError("adapt.rank follows from the data, and a plan reads no data. Add adapt.rank=16.")
    if recipe.is_language_model and batch_fields(student_alone(recipe), 1, 1) == token_fields(1, 1):
        return
    trains = f"with objective.kind={recipe.objective.kind}" if recipe.is_language_model else f"a {recipe.model.kind}"
    raise ConfigError(f"`dougong plan` plans language models that learn from texts, and {recipe.name} trains {trains}."
                      f"\nTry: dougong train {recipe.name} --dry-run")


def _confirmed(work: Work, ranking: Ranking) -> tuple[Ranking, dict[str, Any]]:
    """The ranking with a first that fits by the simulation too, if any does, and what it found."""
    best, others, simulated = list(ranking.best), list(ranking.others), {}
    while True:
        simulated = _simulated(work, best[0])
        needed = simulated["peak_bytes"] + best[0].memory.get("allowance", 0.0)
        if needed <= best[0].capacity or len(best) == 1:
            break
        first = best.pop(0)
        others.insert(0, change(first, refused=f"the simulation needs {needed / 2**30:.0f} GiB, the arithmetic "
                                               f"{first.memory_bytes / 2**30:.0f}"))
    best, others = ([change(option, reason=explain(option, best[0])) for option in found] for found in (best, others))
    return Ranking(best, others, ranking.considered), simulated


def _counted_exactly(work: Work, counts: Counts, machine: Machine, ranking: Ranking) -> Ranking:
    """One process needs no model of its memory: its whole step is counted on the meta device. Where that exceeds what
    the arithmetic let pass, the best of what it holds for smaller is counted, until one fits or none is left."""
    arithmetic, counted = ranking, ranking.others
    while arithmetic.best:
        option = arithmetic.best[0]
        exact = change(option, memory=_exact_memory(work, option), capacity=machine.memory_bytes)
        if exact.fits:
            return Ranking([exact, *ranking.best[1:]], ranking.others, ranking.considered)
        counted = [change(exact, reason=explain(exact, None))]
        smaller = replace(machine, memory_bytes=option.memory_bytes - 1)
        arithmetic = rank(work, smaller, 1, counts=counts, pinned=option.layout)
    return Ranking([], counted, ranking.considered)


def _exact_memory(work: Work, option: Option) -> dict[str, float]:
    step = change(work, checkpoint=option.checkpoint).step(micro_rows=option.micro_rows,
                                                           micro_batches=min(2, option.micro_batches))
    counted = {kind: held for kind, held in step_memory(step).kinds.items() if held}
    if work.device == "cuda":
        counted["allowance"] = DEVICE_BYTES + FRAGMENTATION * sum(counted.values())
    return counted


def _timed_again(work: Work, counts: Counts, machine: Machine, ranking: Ranking) -> Ranking:
    """The same options in the time that they take on a machine whose speed is now known."""
    best = []
    for option in ranking.best:
        seconds, _ = step_seconds(work, counts, option.layout, machine, option.checkpoint, option.micro_rows,
                                  option.micro_batches, option.bubble)
        best.append(change(option, seconds=seconds, tokens_per_s=work.tokens_per_step / sum(seconds.values())))
    return Ranking([change(option, reason=explain(option, best[0])) for option in best], ranking.others,
                   ranking.considered)


def _simulated(work: Work, option: Option) -> dict[str, Any]:
    from dougong.plan.simulate import simulate

    found = simulate(work, option.layout, checkpoint=option.checkpoint, micro_rows=option.micro_rows,
                     micro_batches=option.micro_batches)
    arithmetic = option.memory_bytes - option.memory.get("allowance", 0.0)
    return {"peak_bytes": found.peak_bytes, "arithmetic_bytes": arithmetic,
            "collectives": round(sum(found.messages.values())), "seconds": found.seconds,
            "messages": {name: round(number) for name, number in sorted(found.messages.items())},
            "message_bytes": {name: round(number) for name, number in sorted(found.message_bytes.items())}}


def work_of(recipe: Recipe, machine: Machine) -> Work:
    """The sections that decide memory and time, of a resolved recipe."""
    model = recipe.model
    if model.vocab_size is None:
        size = getattr(recipe.tokenizer, "vocab_size", None) or _UNKNOWN_VOCABULARY
        model = replace(model, vocab_size=size)
    assert recipe.train.rows and model.context, "`resolve` derives them"
    return Work(model=model, objective=student_alone(recipe), optim=recipe.optim, rows=recipe.train.rows,
                context=recipe.row_tokens, steps=recipe.train.steps or 0,
                precision=recipe.runtime.precision or "fp32",
                device=machine.device, checkpoint=CHECKPOINTING[recipe.train.gradient_checkpointing],
                micro_rows=recipe.train.micro_rows, ema=recipe.train.ema is not None, adapt=recipe.adapter,
                begun=recipe.start is not None and recipe.adapt is None,
                row_setting="data.row_tokens" if getattr(recipe.data, "row_tokens", None) else "model.context",
                compile=bool(recipe.runtime.compile))


def _elsewhere(asked: Recipe, machine: Machine, devices: int) -> tuple[Recipe, list[Derived]]:
    """The recipe resolved as it would be on that machine."""
    if machine.name == "here":
        recipe, derived = resolve(asked)
    else:
        gpu = machine.device == "cuda"
        given = asked.runtime
        runtime = RuntimeConfig(device=machine.device, precision=given.precision or ("bf16" if gpu else "fp32"),
                                threads=given.threads or 1, compile=gpu if given.compile is None else given.compile,
                                deterministic=given.deterministic)
        recipe, derived = resolve(replace(asked, runtime=runtime), elsewhere=True)
    recipe, rounded = fit_to_processes(asked, recipe, devices)
    return recipe, derived + rounded


def _is_pinned(recipe: Recipe) -> bool:
    return isinstance(recipe.layout, LayoutConfig) and recipe.layout != LayoutConfig()


def _with_asked(ranking: Ranking, asked: Ranking) -> Ranking:
    """The recipe's own layout first, the plan's after it."""
    own = asked.best or asked.others
    mine = [change(own[0], reason=f"as the recipe asks: {own[0].reason}")] if own else []
    rest = [option for option in ranking.best if not mine or option.layout != mine[0].layout]
    if asked.best:
        return Ranking([*mine, *rest], ranking.others, ranking.considered)
    return Ranking(rest, [*mine, *ranking.others], ranking.considered)


def _facts(recipe: Recipe, derived: list[Derived], work: Work, counts: Counts, machine: Machine, devices: int,
           ranking: Ranking) -> dict[str, Any]:
    section = work.model.decoder()
    _, groups, width = section.attention.heads(section.dim)

    def option(item: Option) -> dict[str, Any]:
        return {**item.to_dict(), "bill": bill(item, work, machine) if item.fits else None}

    parameters = count.parameters(work.model)
    return {
        "recipe": recipe.name, "devices": devices, "hosts": machine.hosts(devices), "machine": to_dict(machine),
        "model": {"kind": work.model.kind, "parameters": parameters, "trained": counts.adapter_parameters,
                  "flops_per_token": counts.flops_per_token,
                  "layers": counts.layers, "dim": counts.dim, "vocab_size": counts.vocab_size,
                  "context": work.context,
                  "cache_bytes_per_row": 2 * counts.layers * groups * width * work.context
                  * ITEMSIZE[work.precision]},
        "work": {"rows": work.rows, "context": work.context, "tokens_per_step": work.tokens_per_step,
                 "steps": work.steps, "tokens": work.steps * work.tokens_per_step, "precision": work.precision,
                 "optimizer": work.optim.kind, "checkpoint": work.checkpoint,
                 "flops": counts.flops_per_token * work.steps * work.tokens_per_step},
        "best": [option(item) for item in ranking.best], "others": [option(item) for item in ranking.others],
        "considered": ranking.considered, "memory_how": HOW, "assumptions": list(ASSUMPTIONS),
        "derived": [item.to_dict() for item in derived], "simulated": None,
    }

"""`dougong plan --budget`: from devices, time, text and memory for serving to a shape, a horizon, a batch and a rate.

Two ways. Where published laws were fitted, the law orders the shapes and predicts a loss (of its own text). Below that,
where nearly every beginner stands, no loss is promised: either the law's order is taken with a warning, or `--probe`
trains small models here on the user's own text and the user's own curve decides, in time on this machine.
"""

import math
import shlex
from dataclasses import replace as change
from typing import Any

from dougong.core.config import parse_overrides, replace, to_dict
from dougong.core.errors import ConfigError
from dougong.plan.budget import (
    Budget,
    Serving,
    Text,
    bytes_per_token,
    describe_bytes,
    duration,
    parse_budget,
    parse_serving,
    parse_text,
)
from dougong.plan.laws import (
    BATCH_LAWS,
    CHINCHILLA,
    DATA_CONSTRAINED,
    OTHER_ALLOCATIONS,
    RATE_LAWS,
    Figure,
    LossLaw,
    amount,
    fitted,
    small_scale,
)
from dougong.plan.shapes import Choice, Shape, ladder
from dougong.recipes.derive import parse_size, resolve
from dougong.recipes.plan_recipe import check_plannable
from dougong.recipes.recipe import Recipe, load_recipe, with_values

_CHOSEN_HERE = ("size", "model.dim", "model.num_layers", "model.num_heads", "model.num_kv_heads", "model.head_dim",
                "model.ffn_dim", "train.steps", "train.minutes", "train.epochs", "train.rows")
YOUR_TEXTS = "YOUR_TEXTS"
_SAME = 0.001          # relative loss that no single run can tell apart: the smaller shape is taken
_STATE_BYTES = 16      # fp32 weights, gradients and two moments
SMALLEST, _LARGEST = 100e3, 2e12
_CONTEXTS = ((20e6, 256), (500e6, 1024), (math.inf, 2048))
_SHAPE_KEYS = ("dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim")


def plan_budget(*, budget: str, data: str | None = None, memory_for_serving: str | None = None, probe: bool = False,
                recipe: str | None = None, overrides: list[str] | None = None, out: Any = None,
                progress: Any = None) -> dict[str, Any]:
    """Chooses what to train with a budget; prints it to `out` (a rich console) and returns it as plain JSON values.

    `overrides` in the result turn the recipe into the chosen one for `dougong train`. `curve` holds every shape
    considered with its predicted loss: what a picture of the trade-off needs. `command` names the texts where they are
    known; of an amount it leaves data.path=YOUR_TEXTS to be filled in. Raises ConfigError for a budget, data or
    memory that cannot be read, a recipe without a size, and where no shape fits.
    """
    money, text, serving = parse_budget(budget), parse_text(data), parse_serving(memory_for_serving)
    name = recipe or "first"
    given = list(overrides or [])
    base = _base(name, given, text)
    if probe and not money.here:
        raise ConfigError(f"--probe trains small models on this machine, so the budget must be of this machine too, "
                          f"and {money} is not.\nRun the same command there with --budget \"here x …\", or leave "
                          "--probe out.")
    if probe and text.amount is not None and not _has_texts(base):
        raise ConfigError(f"--probe trains small models on your own text, and --data {data!r} is only an amount.\n"
                          "Name the text, or a part of it, by data.path=FOLDER beside the amount, give it as "
                          "--data FOLDER, or leave --probe out.")
    if probe:
        from dougong.recipes.small_runs import choose_by_probe

        plan = choose_by_probe(base, money, text, serving, out=out, progress=progress)
    else:
        plan = _choose_by_law(base, money, text, serving)
    plan = {"budget": _budget_facts(money), "data": text.to_dict(),
            "serving": None if serving is None else to_dict(serving), "recipe": name, **plan}
    plan["overrides"] = [*([f"data.path={text.path}"] if text.path else []), *plan["overrides"]]
    texts = [] if text.amount is None or _has_texts(base) else [f"data.path={YOUR_TEXTS}"]
    plan["command"] = shlex.join([*_launch(money), "train", name, *given, *texts, *plan["overrides"]])
    if out is not None:
        from dougong.recipes.show_choice import print_choice

        print_choice(plan, out)
    return plan


def _has_texts(base: Recipe) -> bool:
    """Whether the recipe names texts of its own; else it learns from Python's library."""
    return any(getattr(base.data, name, None) for name in ("path", "sources"))


def _launch(money: Budget) -> list[str]:
    """What starts one process for each device: once, or on every host alike, HOST being one that all of them reach."""
    devices, hosts = money.devices, money.machine.hosts(money.devices)
    if devices == 1:
        return ["dougong"]
    while devices % hosts:      # as many on each
        hosts += 1
    each = f"--nproc-per-node {devices // hosts}"
    how = f"--standalone {each}" if hosts == 1 else \
        f"--nnodes {hosts} {each} --rdzv-backend c10d --rdzv-endpoint HOST:PORT"
    return f"torchrun {how} -m dougong".split()


def _base(name: str, overrides: list[str], text: Text) -> Recipe:
    """The recipe whose open values are chosen. Raises ConfigError where the shape is already fixed or there is none."""
    more = [f"data.path={text.path}"] if text.path else []
    base, _ = load_recipe(name, [*overrides, *more])
    if base.model is None:
        raise ConfigError(f"plan --budget chooses a model to train from first weights, and {name} begins from a model "
                          f"that exists.\nPlan that one: dougong plan {name} --model RUN")
    if base.model is not None and (not base.is_language_model or base.model.kind == "decoder"
                                   or not hasattr(base.model, "num_layers")):
        raise ConfigError(f"plan --budget chooses the shape of a language model of a family, and {name} has model.kind="
                          f"{base.model.kind}.\nTry recipe first, or model.kind=qwen3, llama, gpt2 or nano.")
    check_plannable(base)
    asked = parse_overrides(overrides)
    for key in _CHOSEN_HERE:
        section: Any = asked
        for part in key.split("."):
            section = section.get(part) if isinstance(section, dict) else None
        if section is not None:
            raise ConfigError(f"{key} is what plan --budget chooses. Leave it out, or plan a recipe that you have "
                              f"chosen: dougong plan {name} {key}={section}")
    cleared = {key: None for key in _CHOSEN_HERE if key.startswith("train.")}
    cleared |= {f"model.{key}": None for key in _SHAPE_KEYS if hasattr(base.model, key)}
    return with_values(base, {**cleared, "size": None})


def shape_of(base: Recipe, size: str, *, vocab_size: int | None = None) -> tuple[Shape, Recipe]:
    """The dial's shape at a size, and the resolved recipe (its batch and rates are those for a CPU)."""
    n = parse_size(size)
    values: dict[str, Any] = {"size": size, "runtime.device": "cpu", "runtime.precision": "fp32", "runtime.threads": 1}
    if base.model.context is None:
        values["model.context"] = next(context for limit, context in _CONTEXTS if n < limit)
    if vocab_size is not None and getattr(base.tokenizer, "vocab_size", 0) is None:
        values["tokenizer.vocab_size"] = vocab_size
    resolved, _ = resolve(with_values(base, values))
    vocabulary = resolved.model.vocab_size or getattr(resolved.tokenizer, "vocab_size", None) or 256
    return Shape(size, replace(resolved.model, vocab_size=vocabulary)), resolved


def _choose_by_law(base: Recipe, money: Budget, text: Text, serving: Serving | None) -> dict[str, Any]:
    precision = base.runtime.precision or ("bf16" if money.machine.peak_bf16_flops > money.machine.peak_fp32_flops
                                           else "fp32")
    flops = money.flops_per_s(precision) * money.seconds
    below = flops < next(one.low for one in CHINCHILLA.ranges if one.what == "FLOPs")
    law = small_scale(flops) if below else CHINCHILLA if math.isinf(text.unique_tokens(32_768)) else DATA_CONSTRAINED
    options = law_options(base, flops, text, serving, law)
    best = pick(options, money)
    shape = best.shape
    outside = law.outside(shape.matrices, best.tokens)
    rows, figures = _batch_and_rate(base, best, money)
    layout = _layout(base, best, rows, money, precision)
    if layout:
        best = _at_speed(best, layout["tokens_per_s"], money.seconds, text, law, base)
    steps = max(10, round(best.tokens / (rows * shape.model.context)))
    loss = None if below else {"value": best.loss, "unit": f"nats per token of the law's own text ({law.name})",
                               "extrapolated": list(outside)}
    figures = [Figure("compute (FLOPs)", flops, f"{money.devices} × peak {amount(money.machine.peak(precision))}FLOP/s "
                      f"in {precision} × efficiency {money.machine.efficiency:g} × {duration(money.seconds)}; "
                      f"efficiency: {money.machine.efficiency_source}"),
               Figure("parameters", shape.parameters, f"{law.source}: least loss for this compute", fitted(law.ranges),
                      outside), *_text_figures(best, text, layout), *figures]
    how_long = [f"train.minutes={money.seconds / 60:g}"] if money.here else [f"train.steps={steps}"]
    return {"by": "law", "law": law.name, "choice": best.to_dict(), "rows": rows, "steps": steps, "layout": layout,
            "loss": loss, "refused": _refusal(flops, money) if below else None,
            "figures": [figure.to_dict() for figure in figures],
            "others": [_other(one, flops, law.loss) for one in (CHINCHILLA, *OTHER_ALLOCATIONS) if one is not law],
            "curve": [option.to_dict() for option in options],
            "overrides": [*shape_overrides(base, shape), f"train.rows={rows}", *how_long,
                          *(layout["overrides"] if layout else [])]}


def _layout(base: Recipe, best: Choice, rows: int, money: Budget, precision: str) -> dict[str, Any] | None:
    """The fastest layout of the devices for the shape, from the plan; None for one device or where it knows none."""
    if money.devices == 1:
        return None
    from dougong.plan.choose import rank
    from dougong.plan.option import describe
    from dougong.plan.work import CHECKPOINTING, Work

    model, train, device = best.shape.model, base.train, money.machine.device
    compiled = device == "cuda" if base.runtime.compile is None else base.runtime.compile
    work = Work(model=model, objective=base.objective, optim=base.optim, rows=rows, context=model.context, steps=1,
                precision=precision, device=device, checkpoint=CHECKPOINTING[train.gradient_checkpointing],
                micro_rows=train.micro_rows, ema=train.ema is not None, compile=compiled)
    chosen = rank(work, money.machine, money.devices, keep=1).chosen
    if chosen is None:
        return None
    values = to_dict(chosen.layout)
    asked = to_dict(base.layout)
    given = [f"layout.{key}={value}" for key, value in values.items() if asked.get(key) != value]
    return {"name": describe(chosen.layout), "reason": chosen.reason, "tokens_per_s": chosen.tokens_per_s,
            "memory_bytes": chosen.memory_bytes, "values": values, "overrides": [*given, *chosen.changes]}


def _at_speed(best: Choice, tokens_per_s: float, seconds: float, text: Text, law: LossLaw, base: Recipe) -> Choice:
    """The same shape with the tokens that the chosen layout reads in the time, communication and bubbles paid."""
    tokens = tokens_per_s * seconds
    unique = unique_tokens(base, text, best.shape)
    return change(best, tokens=tokens, epochs=None if math.isinf(unique) else tokens / unique,
                  loss=law.loss(best.shape.matrices, tokens, unique))


def unique_tokens(base: Recipe, text: Text, shape: Shape) -> float:
    """Distinct tokens to train on: what the split holds out does not count."""
    held_in = base.data.split.fractions[0] if hasattr(base.data, "split") else 1.0
    return held_in * text.unique_tokens(shape.model.vocab_size)


def law_options(base: Recipe, flops: float, text: Text, serving: Serving | None, law: LossLaw) -> list[Choice]:
    """Every size of the ladder around the law's optimum, the whole compute spent on it."""
    centre = law.optimum(flops)[0]
    options = []
    far = 8 if serving is None and math.isinf(text.unique_tokens(32_768)) else 30    # what could make it smaller
    for size in ladder(max(centre / far, SMALLEST), min(max(centre * 5, 10 * SMALLEST), _LARGEST)):
        shape, _ = shape_of(base, size)
        if options and options[-1].shape.model == shape.model:
            continue    # the smallest sizes share a shape
        tokens = flops / shape.flops_per_token
        unique = unique_tokens(base, text, shape)
        options.append(Choice(shape, tokens, None if math.isinf(unique) else tokens / unique, None,
                              law.loss(shape.matrices, tokens, unique), fits=shape.fits(serving)))
    return options


def pick(options: list[Choice], money: Budget, same: float = _SAME) -> Choice:
    """The smallest shape among those that fit and that the least loss does not beat by more than `same`."""
    room = 0.8 * money.machine.memory_bytes * money.devices
    able = [option for option in options if option.fits and option.shape.parameters * _STATE_BYTES <= room]
    if not able:
        smallest = options[0].shape
        raise ConfigError(f"no shape fits: even the smallest considered, {amount(smallest.parameters)} parameters, "
                          f"needs {describe_bytes(smallest.serving_bytes())} to serve in bf16 and "
                          f"{describe_bytes(smallest.parameters * _STATE_BYTES)} to train.\n"
                          "Give more memory for serving, or serve in int8: --memory-for-serving \"… int8\".")
    least = min(option.loss for option in able)
    return min((option for option in able if option.loss <= least * (1 + same)), key=lambda o: o.shape.parameters)


def shape_overrides(base: Recipe, shape: Shape) -> list[str]:
    """What makes `base` the chosen shape, every width spelled out so that a later dial changes nothing."""
    model = shape.model
    found = [f"size={shape.size}"]
    if getattr(base.tokenizer, "vocab_size", 0) is None:
        found.append(f"tokenizer.vocab_size={model.vocab_size}")
    keys = [key for key in _SHAPE_KEYS if getattr(model, key, None) is not None]
    found += [f"model.{key}={getattr(model, key)}" for key in keys]
    return found + ([f"model.context={model.context}"] if base.model.context is None else [])


def _batch_and_rate(base: Recipe, best: Choice, money: Budget) -> tuple[int, list[Figure]]:
    """Rows of a step, and the laws that say so. On a CPU the dial's batch, measured there, stands."""
    shape, context = best.shape, best.shape.model.context
    resolved = shape_of(base, shape.size)[1]
    batch = [law.figure(shape.matrices, best.tokens) for law in BATCH_LAWS]
    rates = [law.figure(shape.matrices, best.tokens) for law in RATE_LAWS]
    if money.machine.device == "cpu":
        rows = resolved.train.rows or 1
        chosen = Figure("batch (tokens)", rows * context, "measured on a CPU: twice as many half as large steps "
                        "learned more in a minute")
        batch = []
    else:
        inside = next((figure for figure in batch if not figure.extrapolated), batch[0])
        rows = max(1, round(inside.value / context / money.devices)) * money.devices
        chosen = change(inside, name="batch (tokens)", value=rows * context,
                        source=f"{inside.source}, in whole rows of {context} for each device")
    optim = resolved.optim
    rate = rate_figure(base, optim, shape.matrices, best.tokens)
    return rows, [chosen, rate, *batch, *([] if optim.kind == "muon" else rates)]


def rate_figure(base: Recipe, optim: Any, parameters: float, tokens: float) -> Figure:
    """The rate that training will take, `optim` being that of the resolved recipe."""
    if base.optim.lr is not None:
        return Figure("rate", optim.lr, "given in the recipe")
    if optim.kind == "muon":
        return Figure("rate", optim.lr, "the dial: Muon's update has the same size at every width")
    ladder = RATE_LAWS[2].figure(parameters, tokens)
    return Figure("rate", optim.lr, "the dial: OLMo's ladder", ladder.fitted, ladder.extrapolated)


def _text_figures(best: Choice, text: Text, layout: dict[str, Any] | None) -> list[Figure]:
    vocabulary = best.shape.model.vocab_size
    how = f"{amount(layout['tokens_per_s'])} tokens/s in this layout, by `dougong plan`" if layout else \
        "compute / FLOPs per token of the shape, attention included"
    found = [Figure("tokens", best.tokens, how)]
    if best.epochs is not None:
        note = "" if best.epochs <= 4 else "more than four passes: each further one is worth less and less"
        how = "given" if text.tokens else f"{text.source}; {bytes_per_token(vocabulary):.1f} bytes per token assumed"
        found.append(Figure("passes over the text", best.epochs, f"{DATA_CONSTRAINED.source}; the text: {how}",
                            fitted(DATA_CONSTRAINED.ranges), note=note))
    return found


def _other(law: Any, flops: float, loss: Any) -> dict[str, Any]:
    """What another law would do with the same compute and fresh text, and what the choosing law thinks of that."""
    parameters, tokens = law.optimum(flops)
    return {"name": law.name, "source": law.source, "parameters": parameters, "tokens": tokens,
            "loss": loss(parameters, tokens), "fitted": fitted(law.ranges),
            "extrapolated": list(law.outside(parameters, tokens)), "note": getattr(law, "note", "")}


def _refusal(flops: float, money: Budget) -> str:
    lowest = next(one.low for one in CHINCHILLA.ranges if one.what == "FLOPs")
    here = "--probe trains small models on this machine and fits your own curve" if money.here else \
        "on the machine itself, --budget \"here x …\" with --probe fits your own curve"
    return (f"No loss is predicted: {amount(flops)} FLOPs are {lowest / flops:,.0f} times below the smallest run that "
            "the Chinchilla law was fitted on, where its error has no bound. The size follows a rule for small runs; "
            f"what the laws would say, extrapolated, is beside it. {here[0].upper() + here[1:]}.")


def _budget_facts(money: Budget) -> dict[str, Any]:
    return {"text": str(money), "devices": money.devices, "machine": to_dict(money.machine), "seconds": money.seconds}

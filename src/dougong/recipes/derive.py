"""The dial: from a size to width, depth, batch, rate and horizon, each derived value with its reason.

Laws of scale fitted far above laptop size err by about a factor of two below it (the reasons say so); anything given
in the recipe is left alone. Values that need the data (vocabulary of characters) or a measurement (steps in a number of
minutes) are added later by `fit_to_data` and `fit_to_time`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch

from dougong.adapt.lora import TABLES, widths
from dougong.core.config import from_dict, replace, to_dict
from dougong.core.errors import ConfigError, DougongError, did_you_mean
from dougong.data import DATA
from dougong.data.places import from_anywhere
from dougong.models import FAMILIES, count
from dougong.nn.float8 import why_not_float8
from dougong.objectives import OBJECTIVES
from dougong.optim.build import MUON_ADAMW_RATE, MUON_RATE, USUAL_RATE
from dougong.recipes.recipe import Recipe, with_values
from dougong.runtime.device import best_device, check_device, matmul_flops_per_s, measure_precision, usable_cores
from dougong.runtime.processes import launched_here

_LAYERS_TO_WIDTH = 56        # width / depth of published small models: 40 (nanoGPT CPU) to 64 (nanochat)
_ROW_TOKENS = 1024
_TUNING = 0.03               # of OLMo's ladder: 1.8e-5 at 7B (Alpaca, Zephyr: 2e-5), 1.7e-4 where 8M are tuned
_ROWS_PER_EPOCH = 10         # steps that an epoch of few conversations should still have
_TOKENS_PER_PARAMETER = 12   # nanochat's compute-optimal ratio, 10.5 to 12 tokens per parameter
_TOKENS_PER_ADAPTER_PARAMETER = 2   # a parameter holds about 2 bits (Allen-Zhu and Li 2024, arXiv:2404.05405); a token
                                    # of tuning data has about 1 that a trained model does not know
_TIMES_FOR_ADAPTERS = 10     # found over models, ranks and data ("LoRA Without Regret", Schulman et al. 2025)


_TABLES = {"data": DATA, "model": FAMILIES, "objective": OBJECTIVES}

FIT = "fit"
"""a size that is derived: what this machine trains well in `train.minutes`"""
_FITTED_RATIO = 4.0          # tokens per parameter: few passes over little text, of which a larger model learns more
_UTILISATION = 0.45          # of the matrix peak, as such small models reach on CPUs
_LARGEST_FIT, _SMALLEST_FIT = 8e6, 0.4e6


@dataclass(frozen=True)
class Derived:
    """One value that the recipe left open."""

    key: str
    value: Any
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return {"key": self.key, "value": to_dict(self.value), "reason": self.reason}


class _Notes:
    """Collects derived values; `set` leaves alone what the recipe already gives."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.items = recipe, []

    def value(self, key: str) -> Any:
        section: Any = self.recipe
        for part in key.split("."):
            section = getattr(section, part, None)
        return section

    def set(self, key: str, value: Any, reason: str) -> None:
        parent, _, leaf = key.rpartition(".")
        owner = self.value(parent) if parent else self.recipe
        if hasattr(owner, leaf) and getattr(owner, leaf) is None:
            self.recipe = with_values(self.recipe, {key: value})
            self.items.append(Derived(key, value, reason))


def parse_size(text: str) -> int:
    """`"2M"` → 2,000,000. Raises ConfigError for anything else than a number with K, M or B."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    try:
        size = int(float(text[:-1]) * units[text[-1].upper()])
    except (KeyError, ValueError, IndexError, OverflowError):
        size = 0
    if size < 1:
        raise ConfigError(f"size={text!r} is no model size. Write a number of parameters, such as 800K, 2M or 1B.")
    return size


def resolve(recipe: Recipe, *, elsewhere: bool = False) -> tuple[Recipe, list[Derived]]:
    """Fills in what follows from the recipe, the model it begins from and the machine alone; `elsewhere`: its runtime
    is given, of a machine that is not this one."""
    from dougong.recipes.start import with_start
    from dougong.recipes.teacher import with_teacher

    recipe, of_start = with_start(recipe)
    recipe, of_teacher = with_teacher(recipe)
    _check_together(recipe)
    if recipe.adapter is not None and recipe.start is None:
        raise ConfigError(f"adapt.kind={recipe.adapter.kind} adapts a model that exists, and this recipe begins from "
                          "none. Name one: --model RUN, --model FOLDER, or --model hf:OWNER/NAME.")
    notes = _Notes(replace(recipe, data=from_anywhere(recipe.data)))
    notes.items += of_start + of_teacher
    if not elsewhere:
        _runtime(notes)
    if recipe.size == FIT:
        notes = _fitted(notes)
    size = parse_size(notes.recipe.size) if notes.recipe.size else None
    if recipe.is_language_model:
        if size:
            _vocabulary(notes, size)
            _shape(notes, size)
        _batch(notes, size)
        _horizon(notes, size)
    elif recipe.size:
        raise ConfigError(f"size={recipe.size} sets the shape of a language model, and this recipe has none "
                          f"(model.kind={recipe.model.kind}). Leave size out.")
    else:
        _horizon(notes, None)
    _rates(notes, size)
    return notes.recipe, notes.items


def _check_together(recipe: Recipe) -> None:
    """Raises ConfigError where data, model, objective and tokenizer are not all for tokens or all for arrays."""
    kinds = {name: getattr(recipe, name).kind for name in _TABLES}
    arrays = [name for name in kinds if _of_arrays(getattr(recipe, name))]
    tokens = [name for name in kinds if name not in arrays]
    if not tokens and recipe.tokenizer is not None:
        raise ConfigError(f"tokenizer.kind={recipe.tokenizer.kind} cuts text into tokens, and "
                          f"data.kind={kinds['data']} are arrays.\nLeave the tokenizer out (tokenizer=null).")
    if not arrays or not tokens:
        return
    odd = min(arrays, tokens, key=len)[0]
    own, other = ("arrays", "tokens") if odd in arrays else ("tokens", "arrays")
    rest = " and ".join(f"{name}.kind={kinds[name]}" for name in kinds if name != odd)
    fits = [kind for kind in _TABLES[odd] if _of_arrays(_TABLES[odd][kind]) == (other == "arrays")]
    raise ConfigError(f"{odd}.kind={kinds[odd]} is for {own}, and {rest} are for {other}."
                      f"{did_you_mean(kinds[odd], fits)}")


def _of_arrays(part: Any) -> bool:
    """Whether data, a model or an objective knows no tokens, as its config says; all others do."""
    return getattr(part, "of_arrays", False)


def size_for(minutes: float) -> str:
    """The size whose training at a sensible number of tokens per parameter takes the given time here.

    From 6·N·D FLOPs with D = ratio · N: N = sqrt(FLOP/s · seconds / (6 · ratio)).
    """
    flops = measured_peak() * _UTILISATION * minutes * 60
    size = min(max(math.sqrt(flops / 6 / _FITTED_RATIO), _SMALLEST_FIT), _LARGEST_FIT)
    return f"{size / 1e6:.1f}M"


def _fitted(notes: _Notes) -> _Notes:
    minutes = notes.recipe.train.minutes
    if minutes is None:
        raise ConfigError("size=fit fits a model to train.minutes, and this recipe gives none. Try train.minutes=5.")
    size = size_for(minutes)
    notes.recipe = with_values(notes.recipe, {"size": size})
    notes.items.append(Derived("size", size, f"what this machine trains well in {minutes:g} minutes"))
    return notes


def fit_to_data(recipe: Recipe, shapes: dict[str, int]) -> tuple[Recipe, list[Derived]]:
    """Fills in what the prepared data decide: `{"vocab_size": 2048}`, or classes and image sizes."""
    notes = _Notes(recipe)
    for name, value in shapes.items():
        notes.set(f"model.{name}", value, "from the data")
    if "classes" in shapes:
        notes.set("objective.classes", shapes["classes"], "the labels of the data")
    given, needed = notes.value("model.vocab_size"), shapes.get("vocab_size")
    if recipe.start is not None and needed and given and given < needed:
        added = f"{needed - given:,} tokens were added"
        grown = with_values(notes.recipe, {"model.vocab_size": needed})
        return _with_tables(grown, [*notes.items, Derived("model.vocab_size", needed, added)], added)
    if needed and given and given < needed:
        raise ConfigError(f"model.vocab_size={given} is smaller than the tokenizer's {needed} tokens.\n"
                          "Leave it out: it is derived.")
    return notes.recipe, notes.items


def fit_to_processes(asked: Recipe, recipe: Recipe, processes: int) -> tuple[Recipe, list[Derived]]:
    """Rows that so many processes can share equally, where the recipe `asked` for no number of them."""
    rows = recipe.train.rows or 1
    if asked.train.rows is not None or rows % processes == 0:
        return recipe, []
    rows = max(1, round(rows / processes)) * processes
    return with_values(recipe, {"train.rows": rows}), [
        Derived("train.rows", rows, f"rounded, so that {processes} processes share it equally")]


def fit_to_rows(recipe: Recipe, rows: int | None) -> tuple[Recipe, list[Derived]]:
    """Smaller steps where the data to adapt to fill few rows: an epoch of one step would hardly teach."""
    fewer = max(1, (rows or 0) // _ROWS_PER_EPOCH)
    if recipe.start is None or rows is None or fewer >= (recipe.train.rows or 1):
        return recipe, []
    return with_values(recipe, {"train.rows": fewer}), [
        Derived("train.rows", fewer, f"the data fill {rows:,} rows: about {_ROWS_PER_EPOCH} steps an epoch")]


def fit_to_new_tokens(recipe: Recipe, names: Sequence[str]) -> tuple[Recipe, list[Derived]]:
    """Where the data name tokens that the model it begins from had only kept rows for."""
    more = ", …" if len(names) > 3 else ""
    return _with_tables(recipe, [], f"{', '.join(names[:3])}{more} have no meaning yet") if names else (recipe, [])


def _with_tables(recipe: Recipe, items: list[Derived], added: str) -> tuple[Recipe, list[Derived]]:
    """Beside an adapter, the tables that new tokens have rows in are trained whole: their rows begin as noise."""
    if recipe.adapter is None:
        return recipe, items
    tables = [name for name in (TABLES[:1] if recipe.model.tied else TABLES)
              if not any(fnmatch(name, pattern) for pattern in recipe.adapter.also)]
    if not tables:
        return recipe, items
    also = [*recipe.adapter.also, *tables]
    return with_values(recipe, {"adapt.also": also}), [*items, Derived("adapt.also", also, f"{added}: their rows begin "
                                                                       "as noise, so the table is trained")]


def fit_adapter(recipe: Recipe, facts: dict[str, Any]) -> tuple[Recipe, list[Derived]]:
    """Fills in the rank of an adapter: enough parameters for what there is to learn, and no more than the matrices have
    room for."""
    notes = _Notes(recipe)
    if recipe.adapter is None or recipe.adapter.rank is not None:
        return recipe, []
    with torch.device("meta"):
        model = recipe.model.build()
    parts = recipe.adapter.chosen(model).values()
    tokens = facts.get("splits", {}).get("train", {}).get("tokens") or 0
    wanted = tokens / _TOKENS_PER_ADAPTER_PARAMETER / widths(parts)
    room = max(min(part.in_features, part.out_features) for part in parts) // 4
    rank = 2 ** math.ceil(math.log2(min(max(wanted, 8), 128, max(room, 1))))
    notes.set("adapt.rank", rank, f"{rank * widths(parts):,} parameters for {tokens:,} tokens; a parameter for "
                                  f"{_TOKENS_PER_ADAPTER_PARAMETER} tokens (a prior), between 8 and 128, and at most a "
                                  "quarter of the width")
    return notes.recipe, notes.items


def fit_to_epochs(recipe: Recipe, batches_per_epoch: int) -> tuple[Recipe, list[Derived]]:
    """Turns passes over the data into a number of steps."""
    notes = _Notes(recipe)
    if recipe.train.epochs is not None:
        notes.set("train.steps", max(1, round(recipe.train.epochs * batches_per_epoch)),
                  f"{recipe.train.epochs:g} passes over {batches_per_epoch:,} batches")
    return notes.recipe, notes.items


def fit_to_time(recipe: Recipe, seconds_per_step: float) -> tuple[Recipe, list[Derived]]:
    """Turns a time budget into a fixed number of steps, so that schedule and resume never look at a clock."""
    notes = _Notes(recipe)
    if notes.recipe.train.steps is None:
        minutes = recipe.train.minutes
        assert minutes, "`resolve` refuses a recipe without a horizon"
        steps = max(10, round(minutes * 60 / seconds_per_step))
        notes.set("train.steps", steps,
                  f"{minutes:g} minutes at {seconds_per_step * 1000:.0f} ms a step, measured here")
    return notes.recipe, notes.items


def measured_peak() -> float:
    """FLOP/s of matrix products on the best device in its better precision, measured."""
    device = torch.device(best_device())
    torch.set_num_threads(usable_cores())
    precision, _ = measure_precision(device)
    return matmul_flops_per_s(device, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision])


def _runtime(notes: _Notes) -> None:
    runtime = notes.recipe.runtime
    exact = getattr(notes.recipe.data, "precision", None) == "float64"
    if exact and best_device() == "mps":
        notes.set("runtime.device", "cpu", "these data are float64, which Apple's GPUs do not know")
    notes.set("runtime.device", best_device(), "the fastest kind of device found here")
    if exact and notes.value("runtime.device") == "mps":
        raise ConfigError("runtime.device=mps knows no float64, and data.precision=float64 asks for it. Try "
                          "runtime.device=cpu.")
    check_device(notes.value("runtime.device"))
    device = torch.device(notes.value("runtime.device"))
    if runtime.threads is None:
        notes.set("runtime.threads", *_threads())
    torch.set_num_threads(notes.value("runtime.threads"))
    if runtime.precision is None:
        if notes.recipe.is_language_model:
            notes.set("runtime.precision", *measure_precision(device))
        else:
            notes.set("runtime.precision", "fp32", "this model is too small for the precision to matter")
    notes.set("runtime.compile", device.type == "cuda",
              "torch.compile pays on GPUs; on CPU its start-up time is longer than it saves in minutes")
    if runtime.float8:
        check_float8(notes.recipe, device)


def check_float8(recipe: Recipe, device: torch.device) -> None:
    """Raises ConfigError where this recipe's layers cannot, or should not, be multiplied in float8 on this device."""
    reason = why_not_float8(device)
    if recipe.adapt is not None or recipe.objective.kind != "causal_lm":
        what = f"adapt.kind={recipe.adapt.kind}" if recipe.adapt else f"objective.kind={recipe.objective.kind}"
        reason = ("it is for training all weights to predict text (objective.kind=causal_lm without adapt), and this "
                  f"recipe has {what}")
    if reason:
        raise ConfigError(f"runtime.float8=true does not go here: {reason}.\nTry runtime.float8=false.")


def _threads() -> tuple[int, str]:
    neighbours = launched_here()
    if neighbours == 1:
        return usable_cores(), "cores this process may use"
    return max(1, usable_cores() // neighbours), f"{usable_cores()} cores for {neighbours} processes on this machine"


def _vocabulary(notes: _Notes, size: int) -> None:
    vocabulary = 2 ** round(math.log2(2048 * (size / 2e6) ** 0.6))
    vocabulary = min(max(vocabulary, 512), 131_072)
    notes.set("tokenizer.vocab_size", vocabulary,
              "grows with size^0.6 from 2,048 at 2M: a larger table would take most of a small model")


def _shape(notes: _Notes, size: int) -> None:
    """The depth and width whose exact count is nearest to the size, at a usual proportion."""
    kind = notes.recipe.model.kind
    asked = to_dict(notes.recipe.model)
    if "num_layers" not in asked or kind == "decoder":
        raise ConfigError(f"size sets the shape of a family; model.kind={kind} has none. Leave size out, or choose "
                          "model.kind=qwen3, llama, gpt2 or nano.")
    if "num_experts" in asked or asked.get("feed_forward"):
        raise ConfigError(f"size sets the shape of a dense model, and model.kind={kind} here has experts or a "
                          "feed-forward of its own. Leave size out (size=null) and give model.dim, num_layers and "
                          "num_heads.")
    given = {key: value for key, value in asked.items() if value is not None}
    vocabulary = asked["vocab_size"] or notes.value("tokenizer.vocab_size") or 256
    shapes = [{**_proportions(kind, dim, layers), **given} for layers in range(2, 65) for dim in _widths(layers)]

    def misfit(shape: dict[str, Any]) -> float:
        return (8 * abs(math.log(_about(kind, shape, vocabulary) / size))
                + abs(math.log(shape["dim"] / shape["num_layers"] / _LAYERS_TO_WIDTH)))

    best = {key: value for key, value in min(shapes, key=misfit).items() if key in asked}
    try:
        model = from_dict(FAMILIES[kind], {**best, "vocab_size": vocabulary, "context": asked["context"] or 256})
        total = count.parameters(model)["total"]
    except DougongError as error:
        raise ConfigError(f"no shape of {kind} near size {notes.recipe.size} fits what `model` gives: {error}\n"
                          "Leave some of them out.") from None
    if not any(asked[name] is None for name in ("dim", "num_layers")) and not 0.5 < total / size < 2:
        raise ConfigError(f"size={notes.recipe.size} does not fit the model given: it has {total:,} parameters.\n"
                          "Give its true size, or let the size set the shape: model.dim=null model.num_layers=null "
                          "model.num_heads=null model.ffn_dim=null")
    reason = f"nearest to size {notes.recipe.size}, about {_LAYERS_TO_WIDTH} width per layer ({total:,} parameters)"
    for name, value in best.items():
        notes.set(f"model.{name}", value, reason if name in ("dim", "num_layers") else "follows from the width")


def _about(kind: str, shape: dict[str, Any], vocabulary: int) -> int:
    """Parameters of a shape but for norms and biases: enough to rank shapes; the chosen one is counted exactly."""
    dim, heads = shape["dim"], shape["num_heads"] * shape["head_dim"]
    keys = shape["num_kv_heads"] * shape["head_dim"] if kind in ("qwen3", "llama") else heads
    matrices = 3 if kind in ("qwen3", "llama") else 2
    tables = 1 if shape.get("tied", True) else 2
    return shape["num_layers"] * dim * (2 * heads + 2 * keys + matrices * shape["ffn_dim"]) + tables * vocabulary * dim


def _proportions(kind: str, dim: int, layers: int) -> dict[str, int]:
    """Heads and feed-forward at one width. Heads are as wide as published ones, 128, from a width of 192 on, and 64
    below: narrow ones learn to copy later (docs/log.md)."""
    head_dim = 128 if dim >= 192 else 64
    num_heads = max(2, round(dim / head_dim))
    if kind in ("gpt2", "nano"):   # here a head's width is dim / num_heads
        head_dim = max(h for h in (32, 48, 64, 80, 96, 128) if dim % h == 0 and h <= max(64, head_dim // 2))
        num_heads = dim // head_dim
    num_kv_heads = num_heads if num_heads % 2 else num_heads // 2
    ffn_dim = 64 * math.ceil(8 * dim / 3 / 64) if kind in ("qwen3", "llama") else 4 * dim
    return {"num_layers": layers, "dim": dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads,
            "head_dim": head_dim, "ffn_dim": ffn_dim}


def _widths(layers: int) -> list[int]:
    """Multiples of 32 (64, 128 when larger) within a factor of two of the usual proportion."""
    middle = layers * _LAYERS_TO_WIDTH
    step = 32 if middle < 512 else 64 if middle < 1024 else 128
    return [width for width in range(step, 2 * middle + step, step) if width >= middle / 2]


def _batch(notes: _Notes, size: int | None) -> None:
    recipe = notes.recipe
    notes.set("model.context", 256 if (size or 0) < 20e6 else 1024,
              "short contexts leave more documents per step while a model is small")
    _row(notes)
    context = notes.recipe.row_tokens
    if recipe.runtime.device == "cpu":
        tokens, reason = 4096, "4,096 tokens: on a CPU twice as many half as large steps learned more in a minute"
    elif recipe.start is not None:
        tokens, reason = 32_768, "32,768 tokens: some tens of conversations, as is usual where there are thousands"
    else:
        tokens = round(327_680 * ((size or 1e8) / 108e6) ** (2 / 3))
        reason = "OLMo's ladder, 327,680 tokens × (size/108M)^(2/3); a prior, ±2×"
    notes.set("train.rows", _shared_by_many(tokens / context), reason)


def _shared_by_many(rows: float) -> int:
    """The nearest of 1, 2, …, 8, 10, 12, 14, 16, 20, 24, …: half, a quarter, an eighth of a large one are whole numbers
    too, so that as many processes can share a step, and others if some come or go."""
    step = 2 ** max(0, math.floor(math.log2(max(rows, 1))) - 2)
    return max(1, round(rows / step) * step)


def _row(notes: _Notes) -> None:
    """Rows of data that say themselves how long they are."""
    context = notes.recipe.model.context
    given = notes.value("data.row_tokens")
    if given and context and given > context:
        raise ConfigError(f"data.row_tokens={given} is more than the model's context of {context}. Try {context}.")
    if context:
        reason = "the model's context" if context <= _ROW_TOKENS else "holds most conversations; longer rows cost more"
        notes.set("data.row_tokens", min(context, _ROW_TOKENS), reason)


def _adapter_rate(notes: _Notes) -> None:
    optim, total = notes.recipe.optim, count.parameters(notes.recipe.model)["total"]
    if optim.kind == "muon":
        raise ConfigError("optim.kind=muon makes steps for whole matrices, and an adapter's are factors of one, whose "
                          "product then moves by another measure. Use optim.kind=adamw.")
    rate = float(f"{_TUNING * _TIMES_FOR_ADAPTERS * 0.00235 * (total / 108e6) ** (-1 / 3):.2g}")
    notes.set("optim.lr", rate, f"{_TIMES_FOR_ADAPTERS} times that of training all weights on, which is {_TUNING:g} of "
                                "the ladder's for their number; a prior, ±3×")


def _rates(notes: _Notes, size: int | None) -> None:
    optim = notes.recipe.optim
    if notes.recipe.adapter is not None:
        _adapter_rate(notes)
        return
    tuned = notes.recipe.adapt is not None or notes.recipe.data.kind != "text"      # more text is more first training
    if notes.recipe.start is not None and tuned and optim.kind != "muon":
        total = count.parameters(notes.recipe.model)["total"]
        notes.set("optim.lr", float(f"{_TUNING * 0.00235 * (total / 108e6) ** (-1 / 3):.2g}"),
                  f"{_TUNING:g} of the rate of first training at {total:,} parameters: 2e-5 at 7B, as published")
    ladder = round(0.00235 * ((size or 1e8) / 108e6) ** (-1 / 3), 5)
    reason = "OLMo's ladder, 0.00235 × (size/108M)^(-1/3); a prior, ±2×"
    if optim.kind == "muon":
        notes.set("optim.lr", MUON_RATE, "Muon's update has the same size at every width")
        if size and ladder < MUON_ADAMW_RATE:
            notes.set("optim.adamw_lr", ladder, reason)
        notes.set("optim.adamw_lr", MUON_ADAMW_RATE, "usual beside Muon; only models above 50M take less")
    elif size:
        notes.set("optim.lr", ladder, reason)
    notes.set("optim.lr", USUAL_RATE, "usual where no size says better")


def _horizon(notes: _Notes, size: int | None) -> None:
    train = notes.recipe.train
    if train.steps is None and train.minutes is None and train.epochs is None:
        if size is None:
            more = " (or size, which sets a horizon)" if notes.recipe.is_language_model else ""
            raise ConfigError(f"how long to train? Give train.steps, train.minutes or train.epochs{more}.")
        tokens_per_step = notes.value("train.rows") * notes.recipe.row_tokens
        notes.set("train.steps", max(10, round(_TOKENS_PER_PARAMETER * size / tokens_per_step)),
                  f"{_TOKENS_PER_PARAMETER} tokens per parameter (nanochat's compute-optimal ratio)")

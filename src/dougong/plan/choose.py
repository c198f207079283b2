"""Which layout: every sensible product of axes is tried by arithmetic, ranked by tokens per second, and explained."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from dougong.adapt.lora import why_not_divided
from dougong.core.errors import ConfigError
from dougong.parallel.stages import TWICE
from dougong.plan.counts import Counts
from dougong.plan.machine import Machine, here
from dougong.plan.memory import kept_for_step
from dougong.plan.option import Option, describe, evaluate
from dougong.plan.work import AS_SETTING, Work
from dougong.runtime.layout import DATA, LayoutConfig

_FILLED = 8
"""micro-batches for each stage at which a pipeline's bubble is a tenth and less"""
_ROOM_FOR_COPIES = 0.5
_ANY_RANK = 32
"""of an adapter whose rank follows from data that are not read yet; it does not decide"""
_LONG_CONTEXT = 8192
"""below it, a row's activations are divided better by tensor parallelism or not at all"""
_WORTH = 0.97
"""of two layouts within 3 % the simpler one is better: the plan is not more exact than that"""


@dataclass(frozen=True)
class Ranking:
    """`best` first; `others`: the best of each family that does not work or is slower, with why."""

    best: list[Option]
    others: list[Option]
    considered: int

    @property
    def chosen(self) -> Option | None:
        return self.best[0] if self.best else None


def rank(work: Work, machine: Machine, devices: int, *, counts: Counts | None = None, keep: int = 5,
         pinned: LayoutConfig | None = None, changes: bool = True,
         why_not: Callable[[LayoutConfig], str | None] = lambda layout: None) -> Ranking:
    """The best layouts of `devices` devices, of different families, and the best of each family that fails.

    `pinned`: only this layout. `changes`: keeping more or fewer activations than the recipe asks is tried too, and said
    in `Option.changes`. `why_not`: what else speaks against a layout; those are left out.
    """
    counts = counts or Counts(work.step())
    layouts = [pinned] if pinned else [one for one in candidates(work, counts, machine, devices) if not why_not(one)]
    modes = dict.fromkeys((work.checkpoint, *(("none", "selective", "full") if changes else ())))
    options = [option for layout in layouts for option in _ways(work, counts, layout, machine, modes)]
    by_family: dict[tuple[str, ...], Option] = {}
    for option in options:
        family = _family(option.layout)
        if family not in by_family or _better(option, by_family[family]):
            by_family[family] = option
    ranked = _ranked([option for option in by_family.values() if option.fits])
    failed = sorted((option for option in by_family.values() if not option.fits),
                    key=lambda o: (o.complexity, o.memory_bytes))
    said = [_said(option, work, ranked[0] if ranked else None) for option in [*ranked, *failed]]
    best = said[:len(ranked)][:keep]
    return Ranking(best, said[len(best):], len(options))


def _said(option: Option, work: Work, best: Option | None) -> Option:
    """With its reason, and a pipeline with its micro-batches: training, not told, makes two of them for each stage."""
    told = option.layout.pipeline > 1 and option.micro_rows and work.micro_rows is None
    micro = (f"train.micro_rows={option.micro_rows}",) if told else ()
    return replace(option, changes=(*option.changes, *micro), reason=explain(option, best))


def choose_layout(work: Work, processes: int, *,
                  why_not: Callable[[LayoutConfig], str | None] = lambda layout: None) -> tuple[LayoutConfig, str]:
    """The layout for `layout: auto`, and the reason; called by the processes launched, each alike.

    `why_not`: what else speaks against a layout. Copies where a whole model with its optimiser leaves half of the
    memory free: nothing is simpler, and small parts travel badly. Else what the plan ranks first. Raises ConfigError
    where nothing fits.
    """
    if processes == 1:
        return LayoutConfig(replicate=1), "one process"
    if work.adapt is not None and work.adapt.rank is None:
        work = replace(work, adapt=replace(work.adapt, rank=_ANY_RANK))
    machine = _shared(processes)
    copies = rank(work, machine, processes, pinned=LayoutConfig(replicate=processes), keep=1, changes=False).chosen
    if copies is not None and copies.memory_bytes <= _ROOM_FOR_COPIES * copies.capacity:
        return copies.layout, f"every process has room for the whole model: {_held(copies)}"
    ranking = rank(work, machine, processes, keep=1, changes=False, why_not=why_not)
    if ranking.chosen is None:
        raise ConfigError(f"no layout of {processes} processes fits:\n"
                          + nothing_fits(work, machine, processes, ranking))
    return ranking.chosen.layout, f"{ranking.chosen.reason} ({_held(ranking.chosen)})"


def _held(option: Option) -> str:
    return f"{option.memory_bytes / 2**30:.1f} GiB of {option.capacity / 2**30:.0f}"


def _shared(processes: int) -> Machine:
    """This machine as each of its processes sees it: on a CPU they share its memory and its cores."""
    import os

    machine, neighbours = here(), int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if machine.device == "cuda":
        return machine
    return replace(machine, memory_bytes=machine.memory_bytes / neighbours, host_devices=neighbours,
                   peak_bf16_flops=machine.peak_bf16_flops / neighbours,
                   peak_fp32_flops=machine.peak_fp32_flops / neighbours)


def candidates(work: Work, counts: Counts, machine: Machine, devices: int) -> Iterator[LayoutConfig]:
    """Products of the axes: tensor inside a host, context for long rows, pipeline up to the layers, experts where there
    are some, and what is left over for the data: copies, parts, or parts within a host and copies of it."""
    contexts = [n for n in _powers(16, devices) if n == 1 or work.context >= _LONG_CONTEXT]
    mixture = counts.layer_experts > 0
    experts = _powers(counts.section.feed_forward.num_experts, devices) if mixture else [1]
    for tensor in [1] if mixture else _powers(machine.host_devices, devices):
        for context, expert in itertools.product(contexts, experts):
            for pipeline in _powers(min(64, counts.layers), devices):
                inner = LayoutConfig(tensor=tensor, context=context, expert=expert, pipeline=pipeline)
                if devices % inner.processes == 0:
                    yield from _over_data(work, devices // inner.processes, inner, machine)


def _over_data(work: Work, data: int, inner: LayoutConfig, machine: Machine) -> Iterator[LayoutConfig]:
    schedules = ["1f1b"]
    if inner.pipeline > 1:      # zero bubbles take neither compiled layers nor selective checkpointing
        schedules += ["interleaved"] if work.compile else ["interleaved", "interleaved_zb"]
    near = inner.size("tensor", "context", "expert")
    shards = {1, data, *(n for n in _powers(data, data) if n * near in (machine.host_devices, 64, 512))}
    for shard in sorted(shards):
        # a pipeline's stages hold their weights for the step: gathering them for each micro-batch would not be hidden
        undivided = shard * inner.size("context", "expert") == 1 or replace(inner, shard=shard).whole
        ways = () if undivided else ("step",) if inner.pipeline > 1 else ("layer", "step")
        for gathered, schedule in itertools.product(ways or ("layer",), schedules):
            yield replace(inner, replicate=data // shard, shard=shard, schedule=schedule,   # type: ignore[arg-type]
                          gathered=gathered)                                                # type: ignore[arg-type]


def _powers(most: int, devices: int) -> list[int]:
    return [1 << i for i in range(20) if 1 << i <= most and devices % (1 << i) == 0]


def refusal(work: Work, layout: LayoutConfig) -> str | None:
    """Why this model cannot be divided so; None if it can."""
    from dougong.parallel.context import why_not_context
    from dougong.parallel.expert import why_not_experts
    from dougong.parallel.tensor import why_not_tensor

    copies = layout.size(*DATA)
    if work.adapt is not None and (reason := why_not_divided(work.adapt, layout)):
        return reason
    if work.rows % copies:
        return f"{work.rows} rows a step cannot be shared equally by {copies} processes"
    reason = None
    if layout.tensor > 1:
        reason = why_not_tensor(work.model, layout)
    if layout.context > 1:
        reason = reason or why_not_context(work.model, layout.context, layout.context_method, layout.tensor)
    if layout.expert > 1:
        reason = reason or why_not_experts(work.model, layout.expert, layout.tensor)
    return reason.splitlines()[0] if reason else None


def pipeline_refusal(work: Work, layout: LayoutConfig, micro_batches: int, checkpoint: str) -> str | None:
    """Why the layers cannot be passed through so; None if they can."""
    from dougong.parallel.stages import why_not_pipeline

    if reason := why_not_pipeline(work.model, layout, micro_batches, compile=work.compile,
                                  checkpoint_activations=checkpoint):
        return reason.splitlines()[0]
    if layout.pipeline > 1 and micro_batches < layout.pipeline:
        return f"{micro_batches} micro-batches leave {layout.pipeline} stages mostly waiting"
    return None


def _ways(work: Work, counts: Counts, layout: LayoutConfig, machine: Machine, modes: Iterable[str]) -> list[Option]:
    """The best micro-batch for each mode of checkpointing; a refused layout as one option that says why."""
    reason = refusal(work, layout)
    most = work.rows // layout.size(*DATA) // (work.micro_rows or 1)
    found = []
    for mode in modes:
        ways = [] if reason else list(_micro_batches(work, counts, layout, machine, mode))
        if not ways:
            why = reason or pipeline_refusal(work, layout, most, mode) or \
                "its schedule cannot take any number of micro-batches of this step"
            found.append(_refused(layout, mode, machine, why))
            continue
        best = ways[0]
        for way in ways[1:]:
            best = way if _better(way, best) else best
        found.append(replace(best, changes=() if mode == work.checkpoint else (AS_SETTING[mode],)))
    return found


def _micro_batches(work: Work, counts: Counts, layout: LayoutConfig, machine: Machine, mode: str) -> Iterator[Option]:
    """Options over the sizes of a micro-batch, the largest first; without a pipeline the first that fits is best, with
    one a smaller one may leave a smaller bubble. If none fits: the smallest, which comes nearest."""
    rows = work.rows // layout.size(*DATA)
    sizes = [work.micro_rows] if work.micro_rows else [n for n in range(min(rows, 64), 0, -1) if rows % n == 0]
    if layout.pipeline > 1 and not work.micro_rows:     # more micro-batches than these shrink the bubble no further
        sizes = [n for n in sizes if rows // n <= _FILLED * layout.pipeline]
    last, fitting = None, 0
    for size in sizes:
        if rows % size or pipeline_refusal(work, layout, rows // size, mode):
            continue
        try:
            option = evaluate(work, counts, layout, machine, checkpoint=mode, micro_rows=size)
        except ValueError:
            continue
        last = option
        if option.fits:
            yield option
            fitting += 1
            if fitting == (1 if layout.pipeline == 1 else 3):
                return
    if last is not None and not last.fits:
        yield last


def _refused(layout: LayoutConfig, mode: str, machine: Machine, why: str) -> Option:
    return Option(layout=layout, checkpoint=mode, micro_rows=0, micro_batches=0, memory={}, seconds={}, bubble=0.0,
                  capacity=machine.memory_bytes, traffic=[], tokens_per_s=0.0, refused=why)


def _better(a: Option, b: Option) -> bool:
    """Fits before fits not; then the faster, unless the slower is simpler and nearly as fast."""
    if a.fits != b.fits:
        return a.fits
    if not a.fits:
        return (a.refused is None, -a.memory_bytes) > (b.refused is None, -b.memory_bytes)
    if a.changes != b.changes and (not a.changes or not b.changes):
        own, other = (a, b) if not a.changes else (b, a)
        return (own is a) == (own.tokens_per_s >= _WORTH * other.tokens_per_s)
    if a.complexity != b.complexity:
        simple, other = (a, b) if a.complexity < b.complexity else (b, a)
        return (simple is a) == (simple.tokens_per_s >= _WORTH * other.tokens_per_s)
    return (a.tokens_per_s, -a.memory_bytes) > (b.tokens_per_s, -b.memory_bytes)


def _ranked(options: list[Option]) -> list[Option]:
    ranked: list[Option] = []
    left = sorted(options, key=lambda o: -o.tokens_per_s)
    while left:
        best = left[0]
        for other in left[1:]:
            best = other if _better(other, best) else best
        ranked.append(best)
        left.remove(best)
    return ranked


def _family(layout: LayoutConfig) -> tuple[str, ...]:
    """Options of one family differ in sizes, schedule and micro-batch only."""
    names = [axis for axis in ("tensor", "context", "pipeline", "expert") if layout.size(axis) > 1]  # type: ignore
    if layout.shard > 1:
        names.append("shard")
    elif (layout.replicate or 1) > 1:
        names.append("replicate")
    return tuple(names)


def explain(option: Option, best: Option | None) -> str:
    """One sentence: why this layout works as it does, or why it fails."""
    layout, gib = option.layout, 2**30
    if option.refused:
        return option.refused
    if not option.fits:
        most = max(option.memory, key=lambda kind: option.memory[kind])
        return (f"does not fit: {option.memory_bytes / gib:,.1f} GiB of {option.capacity / gib:,.1f}, "
                f"most of it {most} ({option.memory[most] / gib:,.1f} GiB)")
    parts = [_purpose(layout)]
    share = {kind: seconds / option.step_seconds for kind, seconds in option.seconds.items()}
    if share["bubble"] > 0.02:
        parts.append(f"{share['bubble']:.0%} of a step is the pipeline's bubble")
    if share["communication"] > 0.02:
        parts.append(f"{share['communication']:.0%} waits for messages ({_heaviest(option)})")
    if share["recompute"] > 0.02:
        parts.append(f"{share['recompute']:.0%} computes activations again")
    if best is not None and best is not option and option.tokens_per_s < 0.995 * best.tokens_per_s:
        parts.append(f"{1 - option.tokens_per_s / best.tokens_per_s:.0%} slower than the best")
    return "; ".join(parts)


def _heaviest(option: Option) -> str:
    waiting = [t for t in option.traffic if not t.hidden] or option.traffic
    heaviest = max(waiting, key=lambda t: t.seconds)
    return f"{heaviest.axis}, over the {heaviest.link}"


def _purpose(layout: LayoutConfig) -> str:
    words = []
    if layout.processes == 1:
        return "everything fits one device"
    if layout.tensor > 1:
        words.append(f"each product shared by {layout.tensor} neighbours")
    if layout.context > 1:
        words.append(f"rows cut into {layout.context} stretches")
    if layout.expert > 1:
        words.append(f"experts in {layout.expert} places")
    if layout.pipeline > 1:
        each = " two stages each," if layout.schedule in TWICE else ""
        words.append(f"layers in {layout.pipeline} places ({layout.schedule},{each} passed on)".replace(",)", ")"))
    if layout.shard > 1:
        whole = ", kept whole for a step" if kept_for_step(layout) else ""
        words.append(f"weights in {layout.shard} parts{whole}")
    if (layout.replicate or 1) > 1:
        words.append(f"{layout.replicate} copies that only sum gradients")
    return ", ".join(words)


def nothing_fits(work: Work, machine: Machine, devices: int, ranking: Ranking) -> str:
    """What would do: the smallest number of devices that fits, or what to change where no number does."""
    gib, nearest = 2**30, [option for option in ranking.others if option.refused is None]
    lines = []
    if nearest:
        option = min(nearest, key=lambda o: o.memory_bytes)
        lines.append(f"The nearest, {describe(option.layout)}, needs {option.memory_bytes / gib:,.1f} GiB on each "
                     f"device, and {machine.name} has {option.capacity / gib:,.1f}.")
    elif ranking.others:
        lines.append(f"{ranking.others[0].refused}.")
    enough = fewest_devices(work, machine, devices)
    if enough is not None:
        lines.append(f"The smallest number of {machine.name} that fits is {enough[0]} ({describe(enough[1].layout)}"
                     + "".join(f", {change}" for change in enough[1].changes) + ").")
    *some, last = _savings(work, devices, ranking)
    lines.append(f"Or try {', '.join(some)}, or {last}.")
    return "\n".join(lines)


def _savings(work: Work, devices: int, ranking: Ranking) -> list[str]:
    """Changes of the recipe that save memory and were not tried."""
    found = ["a smaller model", f"shorter rows ({work.row_setting})"]
    if all(option.checkpoint != "full" for option in ranking.others):
        found.append(AS_SETTING["full"])
    if devices > 1 and work.adapt is None:
        found.append("rows that more processes can share (train.rows)")
    if devices == 1 and work.adapt is not None and work.adapt.base == "float":
        found.append("frozen weights as integers (adapt.base=int4)")
    if work.begun and work.adapt is None:
        found.append("adapt=lora adapt.rank=16" + (" (adapt.base=int4)" if devices == 1 else ""))
    return found


def fewest_devices(work: Work, machine: Machine, devices: int) -> tuple[int, Option] | None:
    """The smallest power of two above `devices`, up to 65,536, on which some layout fits. Rows grow where they must."""
    counts, number = Counts(work.step()), 1
    while number < 65_536:
        number *= 2
        if number <= devices:
            continue
        rows = max(work.rows, number)
        ranking = rank(replace(work, rows=rows + (-rows) % number), machine, number, counts=counts, keep=1)
        if ranking.chosen:
            return number, ranking.chosen
    return None

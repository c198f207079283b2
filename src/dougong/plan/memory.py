"""Bytes that one process of a layout holds at the worst moment of a step, by kind, each with how it was computed."""

from dataclasses import dataclass
from typing import Any

from dougong.parallel.stages import num_stages, process_of, stages_of
from dougong.plan.counts import FP32, Counts, Line
from dougong.plan.schedule import largest, pipeline
from dougong.runtime.layout import LayoutConfig
from dougong.runtime.mesh import SHARDS

DEVICE_BYTES = 1.5 * 2**30
"""the driver's context and NCCL's buffers on a GPU; assumed, 1 to 2 GiB are usual"""
FRAGMENTATION = 0.06
"""share of everything else that the allocator of a GPU wastes between blocks; assumed"""

_AT_WORK = 0.2
"""of a layer's activations: gradients that exist while it is differentiated; simulated layouts say 0.1 to 0.3"""

HOW = {
    "weights": "fp32 masters, 4 bytes a parameter, divided by shard, tensor and pipeline; frozen ones as they compute",
    "gradients": "fp32 of what is trained, divided as the weights",
    "optimizer": "state counted on a small model of this kind, divided as the weights",
    "activations": "what autograd keeps, counted on shallow models; linear in layers, rows and micro-batches in flight",
    "logits": "one chunk of logits with its gradient, and the head's casts, counted",
    "gathered": "weights of the layer at work and the next, whole, and their gradients before they are divided again",
    "recomputed": "one layer computed again on the way back, with the gradients of its activations",
    "temporary": "counted: what the loss, the backward pass or the optimiser computes with at that moment",
    "inputs": "the micro-batches of a step: tokens, targets and weights",
    "allowance": "driver and NCCL 1.5 GiB, and 6 % for fragmentation: assumed",
}


@dataclass(frozen=True)
class Part:
    """What of the model one process of a pipeline holds; without a pipeline it is all of it."""

    process: int
    """its place in the pipeline"""
    stages: tuple[int, ...]
    """layers of each of its stages"""
    first: bool
    """it embeds the tokens"""
    last: bool
    """it has the head and computes the loss"""

    @property
    def layers(self) -> int:
        return sum(self.stages)

    def layer_forwards(self, forwards: tuple[int, ...]) -> int:
        """Of so many forwards of each stage."""
        return sum(number * layers for number, layers in zip(forwards, self.stages, strict=True))


def parts(counts: Counts, layout: LayoutConfig) -> list[Part]:
    """Of each process of a pipeline in order, cut as training cuts it."""
    size, schedule = layout.pipeline, layout.schedule
    if size == 1:
        return [Part(0, (counts.layers,), first=True, last=True)]
    cuts, ends = stages_of(counts.layers, size, schedule, head=counts.head_work), num_stages(size, schedule) - 1
    return [Part(process, tuple(len(cut) for stage, cut in enumerate(cuts)
                                if process_of(stage, size, schedule) == process),
                 first=process == 0, last=process == process_of(ends, size, schedule)) for process in range(size)]


def busiest(counts: Counts, layout: LayoutConfig) -> Part:
    """The part of most layers; of several the one with most at its ends."""
    return max(parts(counts, layout), key=lambda part: (part.layers, end_parameters(counts, layout, part)))


def kept_for_step(layout: LayoutConfig) -> bool:
    """Whether weights once gathered stay until the step's end; the stages of a pipeline always keep them."""
    return layout.gathered == "step" or layout.pipeline > 1


def num_shards(layout: LayoutConfig) -> int:
    """Parts that FSDP makes of each weight."""
    return 1 if layout.whole else layout.size(*SHARDS)


def layer_parameters(counts: Counts, tensor: int) -> float:
    """Of one layer in one process, before FSDP divides it."""
    return (counts.layer_parameters - counts.layer_whole) / tensor + counts.layer_whole


def experts_apart(layout: LayoutConfig) -> bool:
    """Whether a process's experts lie over no other axis, so that FSDP neither gathers nor divides them."""
    return layout.expert > 1 and layout.size("shard", "context") == 1


def gathered_parameters(counts: Counts, layout: LayoutConfig) -> float:
    """Of one layer, what a process has whole while it computes. Of its experts it never has the others' at hand, nor
    are its own gathered where they lie over no other axis."""
    own = 0.0 if experts_apart(layout) else counts.layer_experts / layout.expert
    return layer_parameters(counts, layout.tensor) - counts.layer_experts + own


def end_parameters(counts: Counts, layout: LayoutConfig, part: Part) -> float:
    """Of stem and head as far as a process has them; a tied table lies at both ends of a pipeline."""
    ends = counts.end_parameters
    tied = counts.section.tied and part.last and not part.first
    held = ends["stem"] * (part.first or tied) + ends["head"] * part.last
    return held / (layout.tensor if layout.vocabulary_parallel else 1)


def held_parameters(counts: Counts, layout: LayoutConfig, part: Part) -> float:
    """Of one process, before FSDP divides them."""
    return part.layers * layer_parameters(counts, layout.tensor) + end_parameters(counts, layout, part)


def kept_per_row(counts: Counts, layout: LayoutConfig, mode: str) -> Line:
    """One layer's bytes for the backward pass in one process: fixed, and for each row."""
    whole, inside = counts.kept(mode), counts.kept_inside(mode)
    outside = whole - inside
    tensor = layout.tensor
    if tensor > 1 and layout.sequence_parallel:
        # norms and residuals lie in parts; what enters attention and feed-forward is gathered, and kept whole
        gathered = 0.0 if mode == "full" else 2 * counts.stream_bytes * (1 - 1 / tensor)
        row = outside.per_row / tensor + gathered + inside.per_row / tensor
    else:
        row = outside.per_row + inside.per_row / tensor
    if layout.context > 1 and layout.context_method == "all_to_all" and mode != "full":
        heads, groups, width = counts.section.attention.heads(counts.dim)     # as exchanged, beside as computed
        row += counts.context * (heads + 2 * groups) * width / tensor * counts.itemsize
    casts = outside.fixed + inside.fixed / tensor
    if layout.size(*SHARDS) > 1 and not layout.whole:
        # FSDP's copies are in its precision, but experts that it does not gather are cast as they are used
        cast = experts_apart(layout) and counts.itemsize < FP32
        casts = counts.layer_experts / layout.expert * counts.itemsize if cast else 0.0
    return Line(casts, row / layout.context)


@dataclass(frozen=True)
class Held:
    """Bytes of one process at its worst moment, by kind."""

    part: Part
    in_flight: tuple[int, ...]
    """forwards of each of its stages whose backward is still to come"""
    kinds: dict[str, float]


def memory(counts: Counts, layout: LayoutConfig, mode: str, micro_rows: int, micro_batches: int, *,
           gpu: bool, ema: bool = False) -> dict[str, float]:
    """Kinds of the process that holds most."""
    return heaviest(counts, layout, mode, micro_rows, micro_batches, gpu=gpu, ema=ema).kinds


def heaviest(counts: Counts, layout: LayoutConfig, mode: str, micro_rows: int, micro_batches: int, *,
             gpu: bool, ema: bool = False) -> Held:
    """The process that holds most. Raises ValueError for a number of micro-batches that the schedule cannot use."""
    alike: dict[tuple[Any, ...], tuple[Part, set[tuple[int, ...]]]] = {}
    for part in parts(counts, layout):      # those that hold the same differ in what is in flight
        moments = alike.setdefault((part.stages, part.first, part.last), (part, set()))[1]
        moments.update(((1,),) if layout.pipeline == 1 else
                       pipeline(layout.schedule, layout.pipeline, micro_batches).in_flight[part.process])
    found = (Held(part, moment, _one(counts, layout, part, moment, mode, micro_rows, micro_batches, gpu=gpu, ema=ema))
             for part, moments in alike.values() for moment in largest(moments))
    return max(found, key=lambda held: sum(held.kinds.values()))


def _one(counts: Counts, layout: LayoutConfig, part: Part, in_flight: tuple[int, ...], mode: str, micro_rows: int,
         micro_batches: int, *, gpu: bool, ema: bool) -> dict[str, float]:
    held = held_parameters(counts, layout, part) / num_shards(layout)
    line = kept_per_row(counts, layout, mode)
    forwards = part.layer_forwards(in_flight)
    # FSDP casts a layer once; without it each forward has casts of its own
    casts = line.fixed * (part.layers if layout.size("replicate", *SHARDS) > 1 else forwards)
    activations = casts + line.per_row * micro_rows * forwards
    slices = layout.tensor if layout.vocabulary_parallel else 1
    ends = counts.ends_kept()
    head_held = head_peak = 0.0
    if part.last:
        activations += in_flight[-1] * ends.per_row * micro_rows / layout.context
        head_held = in_flight[-1] * ends.fixed / slices     # gradients of the head, known when its loss is
        head_peak = counts.head_peak(micro_rows / layout.context) / slices
    one_layer = kept_per_row(counts, layout, "none").per_row * micro_rows
    at_work = _AT_WORK * one_layer
    moved = held * FP32 * counts.trained_share
    kinds = {"weights": held * counts.weight_bytes + (moved if ema else 0), "gradients": moved,
             "optimizer": held * FP32 * counts.optimizer_copies}
    in_loss, going_back, at_end = _gathered(counts, layout, part, micro_batches)
    before = {**kinds, "gradients": kinds["gradients"] if micro_batches > 1 else 0.0, "activations": activations}
    moments = (
        {**before, "gathered": in_loss, "logits": head_held + head_peak},
        {**before, "gathered": going_back, "logits": head_held,         # the backward pass begins
         "recomputed": at_work + (one_layer if mode != "none" else 0)},
        {**kinds, "gathered": at_end, "activations": line.fixed + one_layer,      # and ends
         "recomputed": at_work})
    worst = max(moments, key=lambda kinds: sum(kinds.values()))
    if gpu:
        worst["allowance"] = DEVICE_BYTES + FRAGMENTATION * sum(worst.values())
    return worst


def _gathered(counts: Counts, layout: LayoutConfig, part: Part, micro_batches: int) -> tuple[float, float, float]:
    """Whole weights, and gradients not yet divided, that FSDP holds in the loss, in the backward pass, at its end.

    By layer: two layers' weights, one at the end. For the step: all layers', and, with several micro-batches, gradients
    that wait for the last. Stem and head, in fp32, stay from their first use to their last. On the way back:
    one layer's gradients, and their copy to be divided; at the end also those of stem and head.
    """
    if num_shards(layout) == 1:
        return 0.0, 0.0, 0.0
    layer, ends = gathered_parameters(counts, layout), end_parameters(counts, layout, part)
    size, whole = counts.itemsize, kept_for_step(layout)
    share = counts.trained_share
    weights = (part.layers if whole else 2) * layer * size + ends * counts.end_bytes
    waiting = part.layers * layer * FP32 * share if whole and micro_batches > 1 else 0.0
    leaving = layer * (size + FP32) * share
    last = weights + waiting + leaving + ends * FP32 * share - (0 if whole else layer * size)
    return weights + waiting, weights + waiting + leaving, last

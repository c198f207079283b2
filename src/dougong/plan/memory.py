"""Bytes that one process of a layout holds at the worst moment of a step, by kind, each with how it was computed."""

import math
from dataclasses import dataclass

from dougong.plan.counts import FP32, Counts, Line
from dougong.plan.schedule import V_SHAPED, pipeline
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
    "allowance": "driver and NCCL 1.5 GiB, and 6 % for fragmentation: assumed",
}


@dataclass(frozen=True)
class Split:
    """A layout's effect on one process: what it holds and how much of a row it sees."""

    layers: int
    stages: int
    tensor: int
    shards: int
    parts_of_row: int
    """context: stretches of a row"""

    @classmethod
    def of(cls, layout: LayoutConfig, layers: int) -> "Split":
        stages = layout.pipeline * (pipeline_stages(layout))
        each = math.ceil(layers / stages) * pipeline_stages(layout)
        return cls(min(layers, each), stages, layout.tensor, 1 if layout.whole else layout.size(*SHARDS),
                   layout.context)


def pipeline_stages(layout: LayoutConfig) -> int:
    """Stages of each process."""
    from dougong.plan.schedule import SEVERAL_STAGES

    return 2 if layout.pipeline > 1 and layout.schedule in SEVERAL_STAGES else 1


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


def end_parameters(counts: Counts, layout: LayoutConfig, *, first: bool) -> float:
    """Of stem and head as far as a process of the first (or last) stage has them."""
    ends = counts.end_parameters
    alone = layout.pipeline == 1 or (first and layout.schedule in V_SHAPED)
    tied = counts.section.tied and layout.pipeline > 1
    head = ends["head"] + (ends["stem"] if tied and not alone else 0)
    held = ends["stem"] + ends["head"] if alone else ends["stem"] if first else head
    return held / (layout.tensor if layout.vocabulary_parallel else 1)


def held_parameters(counts: Counts, layout: LayoutConfig, *, first: bool) -> float:
    """Of one process, before FSDP divides them."""
    split = Split.of(layout, counts.layers)
    return split.layers * layer_parameters(counts, split.tensor) + end_parameters(counts, layout, first=first)


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


def memory(counts: Counts, layout: LayoutConfig, mode: str, micro_rows: int, micro_batches: int, *,
           gpu: bool, ema: bool = False) -> dict[str, float]:
    """Kinds of the process that holds most: of the first stage or of the last."""
    ends = [True] if layout.pipeline == 1 else [True, False]
    return max((_one(counts, layout, mode, micro_rows, micro_batches, first=first, gpu=gpu, ema=ema)
                for first in ends), key=lambda kinds: sum(kinds.values()))


def _one(counts: Counts, layout: LayoutConfig, mode: str, micro_rows: int, micro_batches: int, *, first: bool,
         gpu: bool, ema: bool) -> dict[str, float]:
    split = Split.of(layout, counts.layers)
    held = held_parameters(counts, layout, first=first) / split.shards
    line, alone = kept_per_row(counts, layout, mode), layout.pipeline == 1
    in_flight = _layers_in_flight(layout, split, micro_batches, first=first)
    casts = line.fixed * split.layers
    activations = casts + line.per_row * micro_rows * in_flight
    has_head = alone or not first or layout.schedule in V_SHAPED
    parts = layout.tensor if layout.vocabulary_parallel else 1
    ends = counts.ends_kept()
    head_held = head_peak = 0.0
    if has_head:
        activations += ends.per_row * micro_rows / layout.context
        head_held = ends.fixed / parts          # gradients of the head, known when its loss is
        head_peak = counts.head_peak(micro_rows / layout.context) / parts
    one_layer = kept_per_row(counts, layout, "none").per_row * micro_rows
    at_work = _AT_WORK * one_layer
    moved = held * FP32 * counts.trained_share
    kinds = {"weights": held * counts.weight_bytes + (moved if ema else 0), "gradients": moved,
             "optimizer": held * FP32 * counts.optimizer_copies}
    in_loss, going_back, at_end = _gathered(counts, layout, split, micro_batches, first=first)
    before = {**kinds, "gradients": kinds["gradients"] if micro_batches > 1 else 0.0, "activations": activations}
    moments = (
        {**before, "gathered": in_loss, "logits": head_held + head_peak},
        {**before, "gathered": going_back, "logits": head_held,         # the backward pass begins
         "recomputed": at_work + (one_layer if mode != "none" else 0)},
        {**kinds, "gathered": at_end, "activations": casts / split.layers + one_layer,      # and ends
         "recomputed": at_work})
    worst = max(moments, key=lambda kinds: sum(kinds.values()))
    if gpu:
        worst["allowance"] = DEVICE_BYTES + FRAGMENTATION * sum(worst.values())
    return worst


def _layers_in_flight(layout: LayoutConfig, split: Split, micro_batches: int, *, first: bool) -> float:
    """Layer-forwards whose backward is still to come, at most."""
    if layout.pipeline == 1:
        return split.layers
    held = pipeline(layout.schedule, layout.pipeline, micro_batches)
    return held.in_flight[0 if first else -1] * split.layers / held.stages_each


def _gathered(counts: Counts, layout: LayoutConfig, split: Split, micro_batches: int, *,
              first: bool) -> tuple[float, float, float]:
    """Whole weights, and gradients not yet divided, that FSDP holds in the loss, in the backward pass, at its end.

    By layer: two layers' weights, one at the end. For the step: all layers', and, with several micro-batches, gradients
    that wait for the last. Stem and head, in fp32, stay from their first use to their last. On the way back:
    one layer's gradients, and their copy to be divided; at the end also those of stem and head.
    """
    if split.shards == 1:
        return 0.0, 0.0, 0.0
    layer, ends = gathered_parameters(counts, layout), end_parameters(counts, layout, first=first)
    size, whole = counts.itemsize, layout.gathered == "step"
    share = counts.trained_share
    weights = (split.layers if whole else 2) * layer * size + ends * counts.end_bytes
    waiting = split.layers * layer * FP32 * share if whole and micro_batches > 1 else 0.0
    leaving = layer * (size + FP32) * share
    last = weights + waiting + leaving + ends * FP32 * share - (0 if whole else layer * size)
    return weights + waiting, weights + waiting + leaving, last

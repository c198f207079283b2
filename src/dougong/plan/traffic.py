"""What one process sends in a step, by axis: how many collectives, how many bytes, over which link.

Ring algorithms: gathering or scattering S bytes over n sends S·(n-1)/n, summing them twice that (Patarasuk & Yuan
2009). A group's link is that of the block of neighbouring ranks it spans: inside a host, or the network.
"""

import math
from dataclasses import dataclass

from dougong.plan.counts import FP32, Counts
from dougong.plan.machine import Machine
from dougong.plan.memory import busiest, end_parameters, experts_apart, kept_for_step, layer_parameters, num_shards
from dougong.runtime.layout import AXES, Axis, LayoutConfig
from dougong.runtime.mesh import SHARDS

_BUCKET = 25 * 2**20      # DDP's
_STACKS = 3               # of a layer's experts: gate, up, down; summed one by one where FSDP does not hold them
BUS_EFFICIENCY = 0.8
"""share of a link that large collectives reach (NCCL's tests on DGX hosts: 75-90 %)"""


@dataclass(frozen=True)
class Traffic:
    """Of one axis and step. `hidden`: it can happen while the device computes."""

    axis: str
    what: str
    collectives: int
    bytes: float
    seconds: float
    link: str
    hidden: bool


def traffic(counts: Counts, layout: LayoutConfig, machine: Machine, mode: str, micro_rows: int,
            micro_batches: int) -> list[Traffic]:
    """Every axis above 1, of the process with most layers."""
    part = busiest(counts, layout)
    ends = end_parameters(counts, layout, part)
    weights, experts, found = part.layers * layer_parameters(counts, layout.tensor), 0.0, []
    groups = part.layers       # that FSDP gathers, and sums, one by one
    if layout.expert > 1:       # a process's experts lie over the other axes alone
        experts = part.layers * counts.layer_experts
        weights -= experts
        groups *= 1 if experts_apart(layout) else 2

    def add(axes: tuple[Axis, ...], what: str, number: float, size: float, *, hidden: bool) -> None:
        link, name = _link(layout, machine, axes)
        seconds = size / (BUS_EFFICIENCY * link) + number * machine.latency_s * math.log2(2 * layout.size(*axes))
        found.append(Traffic(" x ".join(a for a in axes if layout.size(a) > 1), what, round(number), size, seconds,
                             name, hidden))

    if (n := num_shards(layout)) > 1:
        by_layer = not kept_for_step(layout)
        times = micro_batches if by_layer else 1
        gathers = 2 * times if by_layer else 1
        share, m = (n - 1) / n, layout.size("shard", "context")
        own = experts / layout.expert * (m - 1) / m
        add(SHARDS, "weights gathered", groups * gathers + times,
            (share * weights + own) * counts.itemsize * gathers + share * ends * counts.end_bytes * times, hidden=True)
        add(SHARDS, "gradients summed, each to its owner", (groups + 1) * times,
            (share * (weights + ends) + own) * FP32 * counts.trained_share * times, hidden=True)
    copied: tuple[Axis, ...] = ("replicate", "context") if layout.whole else ("replicate",)
    if (n := layout.size(*copied)) > 1:
        size = (weights + experts + ends) / num_shards(layout) * FP32 * counts.trained_share
        messages = groups + 1 + (_STACKS * part.layers if experts_apart(layout) else 0)
        add(copied, "gradients summed", math.ceil(size / _BUCKET) if layout.whole else messages,   # DDP sends buckets
            2 * (n - 1) / n * size, hidden=True)
    if (n := layout.tensor) > 1:
        passes = 2 + (mode == "full")
        stream = counts.stream_bytes / layout.context * micro_rows
        add(("tensor",), "activations gathered and summed", 4 * passes * part.layers * micro_batches,
            4 * passes * (n - 1) / n * stream * part.layers * micro_batches, hidden=False)
    if (n := layout.context) > 1:
        heads, groups, width = counts.section.attention.heads(counts.dim)
        per_token = (2 * heads + 2 * groups) * width / layout.tensor * counts.itemsize
        if layout.context_method == "gather":
            per_token = 2 * groups * width / layout.tensor * counts.itemsize * n
        size = per_token * counts.context / n * micro_rows * (n - 1) / n
        passes = 2 + (mode == "full")
        add(("context",), "heads for tokens" if layout.context_method == "all_to_all" else "keys and values gathered",
            2 * passes * part.layers * micro_batches, size * passes * part.layers * micro_batches, hidden=False)
    if (n := layout.expert) > 1:
        rows = counts.stream_bytes / layout.context * micro_rows * counts.section.feed_forward.top_k
        passes = 2 + (mode == "full")
        add(("expert",), "tokens sent to their experts and back", (3 * passes - 1) * part.layers * micro_batches,
            2 * passes * (n - 1) / n * rows * part.layers * micro_batches, hidden=False)
    if layout.pipeline > 1:
        stream = counts.stream_bytes / layout.context * micro_rows
        each = len(part.stages)
        add(("pipeline",), "activations and their gradients passed on", 2 * micro_batches * each,
            2 * stream * micro_batches * each, hidden=False)
    return found


def _link(layout: LayoutConfig, machine: Machine, axes: tuple[Axis, ...]) -> tuple[float, str]:
    """Bytes per second and name of the link of the group along these axes, the innermost axes being neighbours."""
    wide = [axis for axis in axes if layout.size(axis) > 1]
    outermost = min(AXES.index(axis) for axis in wide)
    block = math.prod(layout.size(axis) for axis in AXES[outermost:])
    inside = block <= machine.host_devices
    return machine.link(block), "host" if inside else "network"

"""One way to run a piece of work on some devices, with everything the plan knows about it."""

import math
from dataclasses import dataclass, field
from typing import Any

from dougong.core.config import to_dict
from dougong.plan.counts import FP32, Counts
from dougong.plan.machine import Machine
from dougong.plan.memory import busiest, held_parameters, kept_for_step, memory, num_shards, parts
from dougong.plan.schedule import pipeline
from dougong.plan.traffic import Traffic, traffic
from dougong.plan.work import Work
from dougong.runtime.layout import AXES, DATA, LayoutConfig

RECOMPUTED = {"none": 0.0, "selective": 0.05, "full": 1 / 3}
"""work done again, as a share of a step's: all forwards are a third; selective repeats no matrix product"""
OPTIMIZER_PASSES = {"adamw": 7, "adam": 7, "muon": 5, "rmsprop": 5, "sgd": 3}
"""reads and writes of fp32 numbers by the optimiser for each parameter: weight and moments twice, gradient once"""
MUON_FLOPS_PER_ELEMENT = 5 * 6
"""Newton-Schulz: five steps of three products; for an M x N matrix, M <= N, each about 2·M·M·N: per element times M"""


@dataclass(frozen=True)
class Option:
    """A layout with its micro-batch: memory by kind, time of a step by part, and why it does not work if it cannot."""

    layout: LayoutConfig
    checkpoint: str
    micro_rows: int
    micro_batches: int
    memory: dict[str, float]
    capacity: float
    seconds: dict[str, float]
    """of one step: compute, recompute, bubble, communication (what is not hidden), optimizer"""
    bubble: float
    traffic: list[Traffic]
    tokens_per_s: float
    refused: str | None = None
    """why it cannot be: heads, rows, layers"""
    changes: tuple[str, ...] = ()
    """settings of the recipe that it changes"""
    reason: str = field(default="", compare=False)

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.refused is None and self.memory_bytes <= self.capacity

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def complexity(self) -> int:
        """Axes in use; copies of the whole are the simplest of them."""
        return sum(self.layout.size(axis) > 1 for axis in AXES) + any(
            self.layout.size(axis) > 1 for axis in AXES if axis != "replicate")

    def to_dict(self) -> dict[str, Any]:
        return {"layout": to_dict(self.layout), "name": describe(self.layout), "checkpoint": self.checkpoint,
                "micro_rows": self.micro_rows, "micro_batches": self.micro_batches, "fits": self.fits,
                "memory": dict(self.memory), "memory_bytes": self.memory_bytes, "capacity_bytes": self.capacity,
                "seconds": dict(self.seconds), "step_seconds": self.step_seconds, "bubble": self.bubble,
                "tokens_per_s": self.tokens_per_s, "refused": self.refused, "changes": list(self.changes),
                "reason": self.reason, "traffic": [vars(item) for item in self.traffic]}


def describe(layout: LayoutConfig) -> str:
    """"shard 8 x tensor 8, weights kept for the step"."""
    whole = kept_for_step(layout) and layout.size("shard", "context") > 1
    schedule = f" ({layout.schedule})" if layout.pipeline > 1 else ""
    return str(layout).replace(f"pipeline {layout.pipeline}", f"pipeline {layout.pipeline}{schedule}") + (
        ", weights kept for the step" if whole else "")


def evaluate(work: Work, counts: Counts, layout: LayoutConfig, machine: Machine, *, checkpoint: str,
             micro_rows: int) -> Option:
    """Memory and time of a layout that `choose.refusal` lets pass. Raises ValueError where the schedule cannot take so
    many micro-batches."""
    rows = work.rows // layout.size(*DATA)
    micro_batches = rows // micro_rows
    bubble = pipeline(layout.schedule, layout.pipeline, micro_batches).bubble if layout.pipeline > 1 else 0.0
    held = memory(counts, layout, checkpoint, micro_rows, micro_batches, gpu=work.device == "cuda", ema=work.ema)
    seconds, found = step_seconds(work, counts, layout, machine, checkpoint, micro_rows, micro_batches, bubble)
    return Option(layout=layout, checkpoint=checkpoint, micro_rows=micro_rows, micro_batches=micro_batches, memory=held,
                  capacity=machine.memory_bytes, seconds=seconds, bubble=bubble, traffic=found,
                  tokens_per_s=work.tokens_per_step / sum(seconds.values()))


def step_seconds(work: Work, counts: Counts, layout: LayoutConfig, machine: Machine, checkpoint: str, micro_rows: int,
                 micro_batches: int, bubble: float) -> tuple[dict[str, float], list[Traffic]]:
    """Parts of a step's time: computing, and what communication cannot hide behind it.

    FSDP and DDP talk while the device computes: only what takes longer than computing shows, and the first layer's
    gather and the last one's sum. Tensor, context and pipeline parallel wait for every message.
    """
    flops = counts.flops_per_token * work.tokens_per_step / layout.processes * _imbalance(counts, layout)
    compute = flops / (machine.peak(work.precision) * machine.efficiency)
    again = RECOMPUTED[checkpoint] * compute
    found = traffic(counts, layout, machine, checkpoint, micro_rows, micro_batches)
    busy = compute + again
    waits = sum(item.seconds for item in found if not item.hidden)
    behind = sum(item.seconds for item in found if item.hidden)
    exposed = max(behind - busy, min(behind, behind / busiest(counts, layout).layers))
    parts = {"compute": compute, "recompute": again, "bubble": busy * bubble / (1 - bubble),
             "communication": waits + exposed, "optimizer": optimizer_seconds(work, counts, layout, machine)}
    return parts, found


def optimizer_seconds(work: Work, counts: Counts, layout: LayoutConfig, machine: Machine) -> float:
    """Memory traffic of the update; for Muon the products of Newton-Schulz too, each process doing its share."""
    most = max(held_parameters(counts, layout, part) for part in parts(counts, layout))
    held = counts.trained_share * most / num_shards(layout)
    seconds = held * FP32 * OPTIMIZER_PASSES.get(work.optim.kind, 7) / machine.memory_bytes_per_s
    if work.optim.kind == "muon":
        matrices = counts.layer_parameters * counts.layers / (layout.processes / layout.size("replicate"))
        seconds += MUON_FLOPS_PER_ELEMENT * counts.dim * matrices / (0.5 * machine.peak(work.precision))
    return seconds


def _imbalance(counts: Counts, layout: LayoutConfig) -> float:
    """How much more the busiest process computes than the mean: layers that do not divide, and the head at the end."""
    most = max(part.layers + counts.head_work * part.last for part in parts(counts, layout))
    return most * layout.pipeline / (counts.layers + counts.head_work)


def days(option: Option, work: Work) -> float:
    return option.step_seconds * work.steps / 86_400


def bill(option: Option, work: Work, machine: Machine) -> dict[str, float | None]:
    """Days, energy in kWh (devices and their hosts, cooling left out) and cost, if a price was given."""
    devices, hours = option.layout.processes, days(option, work) * 24
    price = machine.price_per_hour
    return {"days": hours / 24, "device_hours": hours * devices, "energy_kwh": machine.power(devices) * hours / 1000,
            "cost": None if price is None or not math.isfinite(hours) else price * hours * devices}

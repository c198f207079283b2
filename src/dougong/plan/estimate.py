"""What a training run will need, each part named so that a reader can check it: memory of one process, all the rest of
the whole run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dougong.plan.counts import FP32


@dataclass(frozen=True)
class Estimate:
    """Bytes and FLOPs of one training run. `memory_bytes` is the most that tensors of one process take at one moment of
    a step, without the interpreter; the kinds before it are those held at that moment and add up to it. FLOPs are those
    of all processes together."""

    parameters: int
    flops_per_step: float
    flops_total: float
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    temporary_bytes: int
    checkpoint_bytes: int
    disk_bytes: int

    @property
    def memory_bytes(self) -> int:
        return (self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes
                + self.temporary_bytes)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "memory_bytes": self.memory_bytes}


def estimate(*, parameters: int, flops_per_token: float, tokens_per_step: int, steps: int, ema: bool,
             counted: Mapping[str, float], checkpoints_kept: int, trained: int | None = None) -> Estimate:
    """Adds the parts up. `counted` is a step's memory by kind at its peak (`step.step_memory`).

    A checkpoint holds the optimiser's state as counted, the fp32 weights and the moving average if there is one: of all
    parameters, or of those that are `trained`.
    """
    weights = (parameters if trained is None else trained) * FP32
    checkpoint = weights * (1 + ema) + round(counted.get("optimizer", 0))
    return Estimate(
        parameters=parameters,
        flops_per_step=flops_per_token * tokens_per_step,
        flops_total=flops_per_token * tokens_per_step * steps,
        weights_bytes=round(counted.get("weights", 0)),
        gradients_bytes=round(counted.get("gradients", 0)),
        optimizer_bytes=round(counted.get("optimizer", 0)),
        activations_bytes=round(counted.get("activations", 0)),
        temporary_bytes=round(counted.get("temporary", 0) + counted.get("inputs", 0)),
        checkpoint_bytes=checkpoint,
        disk_bytes=checkpoint * checkpoints_kept,
    )

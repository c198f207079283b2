"""What a training run will need, added up from exact counts; each part is named so that a reader can check it."""

from dataclasses import asdict, dataclass
from typing import Any

BYTES_FP32 = 4
OPTIMIZER_COPIES = {"adamw": 2, "adam": 2, "muon": 1, "rmsprop": 1, "sgd": 1}


@dataclass(frozen=True)
class Estimate:
    """Bytes and FLOPs of one training run. `memory_bytes` is the sum of the model's parts, without the interpreter."""

    parameters: int
    flops_per_step: float
    flops_total: float
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    checkpoint_bytes: int
    disk_bytes: int

    @property
    def memory_bytes(self) -> int:
        return (self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes
                + self.logits_bytes)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "memory_bytes": self.memory_bytes}


def estimate(*, parameters: int, flops_per_token: float, tokens_per_step: int, steps: int, optimizer: str,
             ema: bool, activations_bytes: int, logits_bytes: int, checkpoints_kept: int) -> Estimate:
    """Adds the parts up. Masters, gradients and optimizer state are fp32; the rest is given by the caller.

    A checkpoint holds the weights, the optimizer's state and the moving average if there is one.
    """
    weights = parameters * BYTES_FP32
    optimizer_bytes = OPTIMIZER_COPIES[optimizer] * weights
    shadow = weights if ema else 0
    checkpoint = weights + optimizer_bytes + shadow
    return Estimate(
        parameters=parameters,
        flops_per_step=flops_per_token * tokens_per_step,
        flops_total=flops_per_token * tokens_per_step * steps,
        weights_bytes=weights + shadow,
        gradients_bytes=weights,
        optimizer_bytes=optimizer_bytes,
        activations_bytes=activations_bytes,
        logits_bytes=logits_bytes,
        checkpoint_bytes=checkpoint,
        disk_bytes=checkpoint * checkpoints_kept,
    )

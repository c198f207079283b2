"""One class for each row: images of digits, sentiment, anything with a fixed set of labels."""

from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import nn

from dougong.core.config import config
from dougong.data.batch import Batch
from dougong.objectives.losses import Losses
from dougong.objectives.objective import at_least_fp32, row_weight


@config
class ClassifyConfig:
    """Cross-entropy over classes."""

    kind: Literal["classify"] = "classify"
    of_arrays: ClassVar[bool] = True
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of the target's probability spread evenly over the classes"""

    def build(self) -> "Classify":
        return Classify(label_smoothing=self.label_smoothing)


class Classify:
    """Batches carry `pixels` (B …), `labels` (B int64) and possibly `weight` (B); `model(pixels)` gives
    logits (B C).

    Metrics: `loss` (nats, without smoothing), `accuracy`.
    """

    not_additive: str | None = None

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def weight(self, batch: Batch) -> float:
        return float(row_weight(batch).double().sum())

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        logits_BC = at_least_fp32(model(batch["pixels"]))
        labels, weight = batch["labels"], row_weight(batch).to(logits_BC.dtype)
        nll = F.cross_entropy(logits_BC, labels, reduction="none")
        loss = nll if not self.label_smoothing else F.cross_entropy(
            logits_BC, labels, reduction="none", label_smoothing=self.label_smoothing)
        correct = (logits_BC.argmax(-1) == labels).to(weight.dtype)
        return Losses({"model": (loss * weight).sum()},
                      {"loss": (nll.detach() * weight).sum(), "accuracy": (correct * weight).sum()})

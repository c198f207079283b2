"""Share of right answers of a classifier, with its interval."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dougong.core.errors import DataError
from dougong.evaluate.bits_per_byte import evaluating
from dougong.evaluate.statistics import Interval, wilson_interval
from dougong.runtime.device import Runtime


@dataclass(frozen=True)
class Accuracy:
    """`predicted` (N,) classes, the lowest where several score equally; `correct` (N,); mean cross-entropy in
    nats.
    """

    predicted: np.ndarray
    correct: np.ndarray
    loss: float

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    def interval(self, *, confidence: float = 0.95) -> Interval:
        """Wilson interval over the examples."""
        bounds = wilson_interval(int(self.correct.sum()), len(self.correct), confidence=confidence)
        assert bounds is not None
        return bounds


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor, *, rows: int = 512,
             runtime: Runtime | None = None) -> Accuracy:
    """Classifies `inputs` (N …) in batches of `rows` with the model in evaluation mode; `labels` (N,) are
    class ids.

    Raises DataError without examples, or where the model's outputs are not finite.
    """
    if not len(inputs) or len(inputs) != len(labels):
        raise DataError(f"{len(inputs)} inputs and {len(labels)} labels: equally many are needed, "
                        "at least one.")
    device = (runtime or Runtime()).device
    with evaluating(model), torch.no_grad():
        logits_NC = torch.cat([model(part.to(device)).float().cpu() for part in inputs.split(rows)])
    if not bool(logits_NC.isfinite().all()):
        raise DataError("the model's outputs are not finite. Its training probably diverged; "
                        "try an earlier checkpoint.")
    predicted_N = logits_NC.argmax(-1)
    loss = float(F.cross_entropy(logits_NC.double(), labels.cpu().long()))
    return Accuracy(predicted_N.numpy(), (predicted_N == labels.cpu()).numpy(), loss)

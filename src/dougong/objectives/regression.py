"""Real-valued targets."""

from typing import ClassVar, Literal

from torch import nn

from dougong.core.config import config
from dougong.core.errors import DataError
from dougong.data.batch import Batch
from dougong.objectives.losses import Losses
from dougong.objectives.objective import at_least_fp32, row_weight


@config
class RegressionConfig:
    """Half the squared error, summed over the outputs of a row (so that the gradient is prediction -
    target)."""

    kind: Literal["regression"] = "regression"
    of_arrays: ClassVar[bool] = True

    def build(self) -> "Regression":
        return Regression()


class Regression:
    """Batches carry `features` (B …), `targets` (B or B O, float) and possibly `weight` (B);
    `model(features)` has the targets' shape, or one more axis of length 1.

    Metrics: `loss` (as trained) and `absolute_error` (summed over a row's outputs).
    """

    not_additive: str | None = None

    def weight(self, batch: Batch) -> float:
        return float(row_weight(batch).double().sum())

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        prediction, target = at_least_fp32(model(batch["features"])), batch["targets"]
        if prediction.shape == (*target.shape, 1):
            prediction = prediction.squeeze(-1)
        # broadcasting (B,) against (B, 1) would silently train on B² pairs
        if prediction.shape != target.shape:
            raise DataError(f"the model predicts {tuple(prediction.shape)} but the targets are "
                            f"{tuple(target.shape)}.\n"
                            "Give the model as many outputs as a row has targets.")
        error = (prediction - target.to(prediction.dtype)).reshape(len(target), -1)
        weight = row_weight(batch).to(error.dtype)
        loss = (error.square().sum(-1) * weight).sum() / 2
        return Losses({"model": loss}, {"loss": loss.detach(),
                                        "absolute_error": (error.detach().abs().sum(-1) * weight).sum()})

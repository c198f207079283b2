"""One class for each text, read where the text ends."""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from dougong.core.config import config
from dougong.data.batch import Batch
from dougong.objectives.losses import Losses
from dougong.objectives.objective import Fields
from dougong.objectives.reward import last_scores


@config
class ClassifyTextConfig:
    """Cross-entropy over the classes of a text: the model gets a head with an output for each (Radford et al. 2018,
    "Improving language understanding by generative pre-training", equation 4)."""

    kind: Literal["classify_text"] = "classify_text"
    classes: Annotated[int, Field(ge=2)] | None = None
    """derived: the labels of the data"""

    @property
    def value_outputs(self) -> int | None:
        """Of the head that the assembly adds to the model."""
        return self.classes

    def build(self) -> "ClassifyText":
        return ClassifyText()

    def fields(self, rows: int, T: int) -> Fields:
        return {"tokens": ((rows, T), torch.long), "places": ((rows,), torch.long), "labels": ((rows,), torch.long)}


class ClassifyText:
    """Batches carry `tokens` (B T int64), `places` (B: the last token of each text) and `labels` (B int64). Metrics:
    `loss` (nats), `accuracy`."""

    not_additive: str | None = None

    def weight(self, batch: Batch) -> float:
        return float(batch.rows)

    def losses(self, model: Any, batch: Batch) -> Losses:
        logits_BC = last_scores(model, batch["tokens"], batch["places"])
        loss = F.cross_entropy(logits_BC, batch["labels"], reduction="sum")
        return Losses({"model": loss}, {"loss": loss.detach(),
                                        "accuracy": (logits_BC.argmax(-1) == batch["labels"]).to(loss.dtype).sum()})

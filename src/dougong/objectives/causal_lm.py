"""Next-token prediction."""

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from dougong.core.config import config
from dougong.data.batch import Batch
from dougong.objectives.cross_entropy import LossSettings, head_cross_entropy
from dougong.objectives.losses import Losses

_MOST_COUNTING = 7 / 8
"""share of tokens above which picking them out costs more than it saves"""


@config
class CausalLMConfig:
    """Cross-entropy of the next token; the model's logits are never held for more than one chunk of
    tokens."""

    kind: Literal["causal_lm"] = "causal_lm"
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """adds z_loss × log(partition)² per token, which keeps logits from drifting (PaLM uses 1e-4)"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of the target's probability spread evenly over the vocabulary"""
    chunk_logits: Annotated[int, Field(ge=1)] = 1 << 22
    """logits held at once (at least 512 tokens' worth)"""

    def build(self) -> "CausalLM":
        return CausalLM(LossSettings(z_loss=self.z_loss, label_smoothing=self.label_smoothing,
                                     chunk_logits=self.chunk_logits))


class CausalLM:
    """The model is a `LanguageModel`; batches carry `tokens`, `targets` (B T int64), `weight` (B T) and
    possibly `segment` (B T).

    Metrics: `loss` (nats, without z-loss and smoothing: comparable between recipes), `accuracy`, and `z` (the
    mean squared log-partition) where a z-loss is asked for.
    """

    not_additive: str | None = None

    def __init__(self, settings: LossSettings) -> None:
        self.settings = settings

    def weight(self, batch: Batch) -> float:
        return float(batch["weight"].double().sum())

    def losses(self, model: Any, batch: Batch) -> Losses:
        x_BTD = model.hidden(batch["tokens"], segment_BT=batch.get("segment"))
        counting = _that_count(x_BTD.flatten(0, 1), batch["targets"].flatten(), batch["weight"].flatten())
        sums = head_cross_entropy(model.head, *counting, model.head_parameters(), model.config.vocab_size,
                                  self.settings)
        metrics = {"loss": sums.nll, "accuracy": sums.correct}
        if self.settings.z_loss:
            metrics["z"] = sums.z
        return Losses({"model": sums.loss}, metrics)


def _that_count(x_ND: Tensor, targets_N: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens without weight (prompts, padding) need no logits, so they are left out where they are many. On a CPU
    alone: elsewhere the host would have to wait until it knows how many there are."""
    if weight_N.device.type == "cpu":
        place = weight_N.nonzero().squeeze(-1)
        if 0 < len(place) <= _MOST_COUNTING * len(weight_N):
            return x_ND.index_select(0, place), targets_N[place], weight_N[place]
    return x_ND, targets_N, weight_N

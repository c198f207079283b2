"""Learning from rewards of what the model itself wrote a moment ago: GRPO, and rejection sampling beside it.

The samples are the model's own, drawn at temperature 1 and used for one step, so the gradient of the expected reward is
that of Σ advantage · log p: no ratio, no clipping and no second model. Both methods share that loss and differ in what
a sample counts.
"""

from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from dougong.core.config import config
from dougong.data.batch import Batch
from dougong.objectives.losses import Losses
from dougong.objectives.objective import Fields, token_fields
from dougong.objectives.token_log_probs import CHUNK_LOGITS, token_log_probs

Count = Annotated[int, Field(ge=1)]


@config
class RolloutConfig:
    """How samples are drawn and rewarded."""

    samples: Annotated[int, Field(ge=2)] = 8
    """drawn for each prompt: the group; `train.rows` counts samples, so rows / samples prompts are read a step"""
    max_tokens: Count = 64
    """most tokens of a sample"""
    reward: str = "exact"
    """exact, contains, numeric, regex:PATTERN, length:TOKENS, tests, model:RUN, or FILE.py:FUNCTION"""
    on_error: Literal["error", "zero"] = "error"
    """a reward that raises, is no number or never returns: stop with an error, or count 0 and say how many did"""
    reward_seconds: Annotated[float, Field(gt=0)] = 5.0
    """longest that a reward may take for one sample"""
    chunk_logits: Count = CHUNK_LOGITS
    """logits held at once"""

    def build(self) -> "Policy":
        return Policy(chunk_logits=self.chunk_logits)

    def fields(self, rows: int, T: int) -> Fields:
        return {**token_fields(rows, T), "advantage": ((rows,), torch.float32)}

    def advantages(self, rewards_PS: Float[Tensor, "P S"]) -> tuple[Float[Tensor, "P S"], Bool[Tensor, "P S"]]:
        """What each of the S samples of P prompts counts, and which of them are learned from at all."""
        raise NotImplementedError


@config
class GRPOConfig(RolloutConfig):
    """Group-relative policy optimisation (Shao et al. 2024, arXiv:2402.03300) as it is on-policy: the advantage is the
    reward minus the group's mean, not divided by its standard deviation (Liu et al. 2025, arXiv:2503.20783), every
    token counts alike (Yu et al. 2025, arXiv:2503.14476), and there is no KL term."""

    kind: Literal["grpo"] = "grpo"

    def advantages(self, rewards_PS: Float[Tensor, "P S"]) -> tuple[Float[Tensor, "P S"], Bool[Tensor, "P S"]]:
        """A group whose samples all earned the same says nothing, and its tokens are not counted."""
        differ_P1 = rewards_PS.amax(-1, keepdim=True) > rewards_PS.amin(-1, keepdim=True)
        return rewards_PS - rewards_PS.mean(-1, keepdim=True), differ_P1.expand_as(rewards_PS)


@config
class RejectionConfig(RolloutConfig):
    """Rejection sampling: the samples that pass are learned like given text, the others are left out."""

    kind: Literal["rejection"] = "rejection"
    passes: float = 1.0
    """least reward of a sample that passes"""

    def advantages(self, rewards_PS: Float[Tensor, "P S"]) -> tuple[Float[Tensor, "P S"], Bool[Tensor, "P S"]]:
        return torch.ones_like(rewards_PS), rewards_PS >= self.passes


class Policy:
    """Batches carry `tokens`, `targets` (B T int64), `weight` (B T: 1 on the sampled tokens) and `advantage` (B).

    Loss -Σ advantage · log p(token), divided by the number of tokens. Figures of the whole rollout stand beside every
    row (`FIGURES`, each B): their mean over tokens gives them back as metrics.
    """

    not_additive: str | None = None

    def __init__(self, *, chunk_logits: int = CHUNK_LOGITS) -> None:
        self.chunk_logits = chunk_logits

    def weight(self, batch: Batch) -> float:
        return float(batch["weight"].double().sum())

    def losses(self, model: Any, batch: Batch) -> Losses:
        x_BTD = model.hidden(batch["tokens"])
        logp_N = token_log_probs(model.head, x_BTD.flatten(0, 1), batch["targets"].flatten(),
                                 batch["weight"].flatten(), model.config.vocab_size, chunk_logits=self.chunk_logits)
        weight_BT = batch["weight"].to(logp_N.dtype)
        logp_B = (logp_N.view_as(weight_BT) * weight_BT).sum(-1)
        tokens_B = weight_BT.sum(-1)
        loss = -(batch["advantage"].to(logp_N.dtype) * logp_B).sum()
        metrics = {name: (batch[name].to(logp_N.dtype) * tokens_B).sum() for name in FIGURES if name in batch}
        return Losses({"model": loss}, {"loss": loss.detach(), "nll": -logp_B.detach().sum(), **metrics})


FIGURES = ("reward", "passed", "length", "idle_groups", "failed_rewards")
"""of a rollout: mean reward, share of samples with a reward of at least 1, mean tokens of a sample, share of groups
from which nothing was learned, share of samples whose reward failed"""

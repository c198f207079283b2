"""Learning from pairs, a reply that was preferred and one that was not: DPO, IPO and ORPO.

All three are a convex function of one number, how much more the model favours the preferred reply. DPO and IPO measure
that against the model as it was at the start (`reference`, computed once and carried by the batch), ORPO by odds within
the model itself.
"""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from dougong.core.config import config
from dougong.data.batch import Batch
from dougong.objectives.losses import Losses
from dougong.objectives.objective import Fields, token_fields
from dougong.objectives.token_log_probs import CHUNK_LOGITS, row_log_probs

CHOSEN, REJECTED = 0, 1
"""places of the two replies along the second axis of a batch"""
_NEARLY_CERTAIN = -1e-6     # nats a token: above it the odds p/(1-p) are beyond what float32 can tell apart

Temperature = Annotated[float, Field(gt=0)]
Chunk = Annotated[int, Field(ge=1)]


@config
class DPOConfig:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7)."""

    kind: Literal["dpo"] = "dpo"
    beta: Temperature = 0.1
    """how firmly the start model holds: small lets the model go far from it"""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """share of the pairs believed to be labelled the wrong way round (Mitchell 2023, "A note on DPO with noisy
    preferences")"""
    chunk_logits: Chunk = CHUNK_LOGITS
    """logits held at once"""

    def build(self) -> "DPO":
        return DPO(self)

    def fields(self, rows: int, T: int) -> Fields:
        return pair_fields(rows, T)


@config
class IPOConfig:
    """Identity preference optimisation (Azar et al. 2023, arXiv:2310.12036, equation 17): a fixed margin is aimed at,
    so pairs that are told apart already stop pulling."""

    kind: Literal["ipo"] = "ipo"
    beta: Temperature = 0.1
    """the paper's τ: the log-ratio of a pair is drawn to 1 / (2 beta)"""
    per_token: bool = False
    """log-probabilities per token instead of per reply: the margin then does not grow with length (not the paper's,
    but what TRL computes)"""
    chunk_logits: Chunk = CHUNK_LOGITS
    """logits held at once"""

    def build(self) -> "IPO":
        return IPO(self)

    def fields(self, rows: int, T: int) -> Fields:
        return pair_fields(rows, T)


@config
class ORPOConfig:
    """Odds-ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691, equations 6 and 7): the likelihood of the
    preferred reply and its odds against the other at once, so no reference is needed."""

    kind: Literal["orpo"] = "orpo"
    beta: Temperature = 0.1
    """the paper's λ: weight of the odds beside the likelihood"""
    chunk_logits: Chunk = CHUNK_LOGITS
    """logits held at once"""

    def build(self) -> "ORPO":
        return ORPO(self)

    def fields(self, rows: int, T: int) -> Fields:
        return token_fields(rows, 2, T)


def pair_fields(rows: int, T: int) -> Fields:
    """Two replies to each prompt, and what the start model says of both."""
    return {**token_fields(rows, 2, T), "reference": ((rows, 2), torch.float32)}


class PairObjective:
    """Batches carry `tokens`, `targets` (B 2 T int64: preferred, then rejected), `weight` (B 2 T: 1 on the reply) and,
    where a reference is used, `reference` (B 2: the start model's summed log-probabilities, nats).

    Metrics, means over pairs: `loss`; `accuracy`, the share of pairs whose preferred reply has the larger reward;
    `margin`, the difference of the rewards, and each of the two (`reward_chosen`, `reward_rejected`).
    """

    not_additive: str | None = None

    def __init__(self, section: Any) -> None:
        self.section = section

    def weight(self, batch: Batch) -> float:
        return float(batch.rows)

    def losses(self, model: Any, batch: Batch) -> Losses:
        logp_B2, length_B2 = pair_log_probs(model, batch, self.section.chunk_logits)
        loss_B, rewards_B2 = self.judge(logp_B2, length_B2, batch)
        loss, rewards_B2 = loss_B.sum(), rewards_B2.detach()
        margin_B = rewards_B2[:, CHOSEN] - rewards_B2[:, REJECTED]
        return Losses({"model": loss}, {
            "loss": loss.detach(), "accuracy": (margin_B > 0).to(loss.dtype).sum(), "margin": margin_B.sum(),
            "reward_chosen": rewards_B2[:, CHOSEN].sum(), "reward_rejected": rewards_B2[:, REJECTED].sum()})

    def judge(self, logp_B2: Float[Tensor, "B 2"], length_B2: Float[Tensor, "B 2"],
              batch: Batch) -> tuple[Float[Tensor, " B"], Float[Tensor, "B 2"]]:
        """The loss of each pair, and the reward that the model implies for each reply."""
        raise NotImplementedError


class DPO(PairObjective):
    """-(1 - ε) log σ(h) - ε log σ(-h) with h = reward(preferred) - reward(rejected) and reward = β log(p / p_start)."""

    def judge(self, logp_B2: Tensor, length_B2: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        rewards = self.section.beta * (logp_B2 - reference(batch, logp_B2))
        h, smoothing = rewards[:, CHOSEN] - rewards[:, REJECTED], self.section.label_smoothing
        return -(1 - smoothing) * F.logsigmoid(h) - smoothing * F.logsigmoid(-h), rewards


class IPO(PairObjective):
    """(log-ratio of preferred - log-ratio of rejected - 1 / (2 β))²."""

    def judge(self, logp_B2: Tensor, length_B2: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        ratios = logp_B2 - reference(batch, logp_B2)
        if self.section.per_token:
            ratios = ratios / length_B2
        beta = self.section.beta
        return (ratios[:, CHOSEN] - ratios[:, REJECTED] - 1 / (2 * beta)).square(), beta * ratios


class ORPO(PairObjective):
    """-log p(preferred) per token - β log σ(log odds(preferred) - log odds(rejected)), odds of the mean token."""

    def judge(self, logp_B2: Tensor, length_B2: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        mean = logp_B2 / length_B2
        bounded = mean.clamp(max=_NEARLY_CERTAIN)
        odds = bounded - torch.log(-torch.expm1(bounded))
        h = odds[:, CHOSEN] - odds[:, REJECTED]
        return -mean[:, CHOSEN] - self.section.beta * F.logsigmoid(h), self.section.beta * mean


def pair_log_probs(model: Any, batch: Batch, chunk_logits: int) -> tuple[Float[Tensor, "B 2"], Float[Tensor, "B 2"]]:
    """Summed log-probability and number of tokens of both replies; both of a pair go through the model together."""
    sums, lengths = row_log_probs(model, batch["tokens"].flatten(0, 1), batch["targets"].flatten(0, 1),
                                  batch["weight"].flatten(0, 1), chunk_logits=chunk_logits)
    return sums.view(-1, 2), lengths.view(-1, 2)


def reference(batch: Batch, like: Tensor) -> Tensor:
    """The start model's log-probabilities (B 2) in the precision of the model's."""
    return batch["reference"].to(like.dtype)

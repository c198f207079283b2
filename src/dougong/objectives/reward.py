"""A reward model: one number for a reply, learned from pairs in which one was preferred."""

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dougong.core.config import config
from dougong.data.batch import Batch
from dougong.objectives.losses import Losses
from dougong.objectives.objective import Fields, at_least_fp32, token_fields
from dougong.objectives.preference import CHOSEN, REJECTED


@config
class RewardConfig:
    """Bradley and Terry's model of pairs (Ouyang et al. 2022, arXiv:2203.02155, equation 1): the model gets a head that
    gives one number for each reply."""

    kind: Literal["reward"] = "reward"

    value_outputs: ClassVar[int] = 1
    """of the head that the assembly adds to the model"""

    def build(self) -> "RewardModelling":
        return RewardModelling()

    def fields(self, rows: int, T: int) -> Fields:
        return token_fields(rows, 2, T)


class RewardModelling:
    """Batches are those of `preference.PairObjective` without a reference. -log σ(score(preferred) - score(rejected)).

    Metrics, means over pairs: `loss`, `accuracy`, `margin`, `reward_chosen`, `reward_rejected`.
    """

    not_additive: str | None = None

    def weight(self, batch: Batch) -> float:
        return float(batch.rows)

    def losses(self, model: Any, batch: Batch) -> Losses:
        scores_R1 = last_scores(model, batch["tokens"].flatten(0, 1), last_places(batch["weight"].flatten(0, 1)))
        scores_B2 = scores_R1.view(-1, 2)
        margin_B = scores_B2[:, CHOSEN] - scores_B2[:, REJECTED]
        loss, told = -F.logsigmoid(margin_B).sum(), scores_B2.detach()
        return Losses({"model": loss}, {
            "loss": loss.detach(), "accuracy": (margin_B > 0).to(loss.dtype).sum(), "margin": margin_B.detach().sum(),
            "reward_chosen": told[:, CHOSEN].sum(), "reward_rejected": told[:, REJECTED].sum()})


def last_places(weight_RT: Float[Tensor, "R T"]) -> Int[Tensor, " R"]:
    """Where each row's reply ends: the place whose target is its last token. What stands there has read all of the
    reply but the token that closes the turn, which is always the same."""
    T = weight_RT.shape[1]
    return T - 1 - (weight_RT > 0).flip(-1).long().argmax(-1)


def last_scores(model: Any, tokens_RT: Int[Tensor, "R T"], places_R: Int[Tensor, " R"]) -> Float[Tensor, "R O"]:
    """The value head's outputs at one place of each row, in float32 or better."""
    x_RTD = model.hidden(tokens_RT)
    x_RD = x_RTD.gather(1, places_R[:, None, None].expand(-1, 1, x_RTD.shape[-1]))[:, 0]
    return at_least_fp32(model.value(x_RD))

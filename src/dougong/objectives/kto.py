"""Learning from single replies that were found good or bad: KTO."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from dougong.core.config import config
from dougong.data.batch import Batch
from dougong.objectives.losses import Losses
from dougong.objectives.objective import Fields
from dougong.objectives.preference import Chunk, Temperature, pair_fields, pair_log_probs, reference
from dougong.objectives.token_log_probs import CHUNK_LOGITS

Weight = Annotated[float, Field(gt=0)]


@config
class KTOConfig:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306, equation 8)."""

    kind: Literal["kto"] = "kto"
    beta: Temperature = 0.1
    """how firmly the start model holds"""
    desirable: Weight = 1.0
    """weight of good replies (λ_D); the paper wants desirable × good about 1 to 4/3 of undesirable × bad"""
    undesirable: Weight = 1.0
    """weight of bad replies (λ_U)"""
    chunk_logits: Chunk = CHUNK_LOGITS
    """logits held at once"""

    def build(self) -> "KTO":
        return KTO(self)

    def fields(self, rows: int, T: int) -> Fields:
        return {**pair_fields(rows, T), "label": ((rows,), torch.float32)}


class KTO:
    """Batches carry `tokens`, `targets`, `weight` (B 2 T), `reference` (B 2) and `label` (B: 1 good, 0 bad). First
    along the second axis stands the judged reply, second the reply of another record to the same prompt: from those the
    reference point z is estimated, the mean log-ratio over the batch, at least 0, through which no gradient runs.

    Loss λ_D (1 - σ(β (r - z))) of good replies, λ_U (1 - σ(β (z - r))) of bad ones, r = log(p / p_start). Metrics,
    means over replies: `loss`; `accuracy`, the share on the right side of z; `margin`, β (r - z) signed by the label;
    `kl`, z.
    """

    not_additive: str | None = ("KTO judges replies against a mean over the whole batch, so micro-batches would be "
                                "judged against others")

    def __init__(self, section: KTOConfig) -> None:
        self.section = section

    def weight(self, batch: Batch) -> float:
        return float(batch.rows)

    def losses(self, model: Any, batch: Batch) -> Losses:
        logp_B2, _ = pair_log_probs(model, batch, self.section.chunk_logits)
        ratios_B2 = logp_B2 - reference(batch, logp_B2)
        z = ratios_B2[:, 1].detach().mean().clamp(min=0)
        good_B = batch["label"] > 0
        signed_B = self.section.beta * (ratios_B2[:, 0] - z) * torch.where(good_B, 1.0, -1.0).to(logp_B2.dtype)
        weight_B = torch.where(good_B, self.section.desirable, self.section.undesirable).to(logp_B2.dtype)
        loss = (weight_B * (1 - signed_B.sigmoid())).sum()
        margin_B = signed_B.detach()
        return Losses({"model": loss}, {
            "loss": loss.detach(), "accuracy": (margin_B > 0).to(loss.dtype).sum(), "margin": margin_B.sum(),
            "kl": z * batch.rows})

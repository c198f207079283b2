"""A generator against a discriminator: two parameter groups, each with its own loss."""

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from dougong.core.config import config
from dougong.data.batch import Batch
from dougong.objectives.losses import Losses
from dougong.objectives.objective import at_least_fp32


@config
class GANObjectiveConfig:
    """The non-saturating game of Goodfellow et al. 2014 (arXiv:1406.2661, section 3), both players moving at
    once."""

    kind: Literal["gan"] = "gan"
    of_arrays: ClassVar[bool] = True
    real_label: Annotated[float, Field(gt=0.5, le=1)] = 1.0
    """what the discriminator is told of real rows; 0.9 is one-sided label smoothing (Salimans et al. 2016)"""

    def build(self) -> "GAN":
        return GAN(real_label=self.real_label)


class GAN:
    """Batches carry `pixels` (B …: the real rows). The model has the children `generator` (noise (B Z) ->
    rows) and `discriminator` (rows -> logits, one a row) and the `config.noise_dim` Z.

    Metrics: `loss` (the discriminator's), `generator_loss`, and the share of real and of made rows that the
    discriminator tells rightly (0.5 and 0.5: it cannot tell them apart).
    """

    not_additive: str | None = ("a GAN draws the noise of a whole batch at once, so micro-batches would play "
                                "against other fakes")

    def __init__(self, *, real_label: float = 1.0) -> None:
        self.real_label = real_label

    def weight(self, batch: Batch) -> float:
        return float(batch.rows)

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        real = batch["pixels"]
        noise = torch.randn(len(real), model.config.noise_dim, device=real.device,  # type: ignore[arg-type]
                            dtype=real.dtype)
        fake = model.generator(noise)  # type: ignore[operator]

        def judge(rows: torch.Tensor) -> torch.Tensor:
            return at_least_fp32(model.discriminator(rows)).flatten()  # type: ignore[operator]

        # Both losses read one judgement of the fakes: each group gets the gradient of its own loss alone.
        on_real, on_fake = judge(real), judge(fake)
        truth = torch.full_like(on_real, self.real_label)
        discriminator = (F.binary_cross_entropy_with_logits(on_real, truth, reduction="sum")
                         + F.softplus(on_fake).sum())
        generator = F.softplus(-on_fake).sum()
        metrics = {"loss": discriminator.detach(), "generator_loss": generator.detach(),
                   "real_accuracy": (on_real.detach() > 0).float().sum(),
                   "fake_accuracy": (on_fake.detach() < 0).float().sum()}
        return Losses({"generator": generator, "discriminator": discriminator}, metrics)

"""Whether a model knows what it does not know: of the tokens given 80 %, are 80 % right?

The expected calibration error is over the likeliest token of every place, in 15 bins of equal width as in Guo et al.
2017 (arXiv:1706.04599, eq. 3); the Brier score (1950) is over the whole distribution, between 0 (certain and right)
and 2 (certain and wrong). A small model that is sure of nothing is well calibrated too: read both beside the loss.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

BINS = 15


@dataclass
class Calibration:
    """Sums over tokens, added to chunk by chunk. `count`, `confidence` and `right` have a number for each bin."""

    count: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    confidence: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    right: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    squares: float = 0.0

    @torch.no_grad()
    def add(self, logits_NV: Float[Tensor, "N V"], targets_N: Int[Tensor, " N"]) -> None:
        """Counts these tokens; fp32 or better."""
        probability = logits_NV.softmax(-1, dtype=torch.promote_types(logits_NV.dtype, torch.float32))
        top_N, first_N = probability.max(-1)
        target_N = probability.gather(-1, targets_N[:, None]).squeeze(-1)
        brier_N = probability.square().sum(-1) - 2 * target_N + 1
        bin_N = (top_N * BINS).ceil().long().clamp(1, BINS) - 1     # (0, 1/15], (1/15, 2/15], …
        for sums, values in ((self.count, torch.ones_like(top_N)), (self.confidence, top_N),
                             (self.right, (first_N == targets_N).to(top_N.dtype))):
            sums += np.bincount(bin_N.cpu().numpy(), values.cpu().double().numpy(), minlength=BINS)
        self.squares += float(brier_N.cpu().double().sum())

    @property
    def tokens(self) -> int:
        return int(self.count.sum())

    @property
    def error(self) -> float:
        """Mean distance between confidence and accuracy over bins, each weighted by its tokens."""
        return float(np.abs(self.right - self.confidence).sum() / max(self.tokens, 1))

    @property
    def brier(self) -> float:
        return self.squares / max(self.tokens, 1)

    def payload(self) -> dict[str, Any]:
        """JSON values: the two scores, mean confidence and accuracy (confidence above it: too sure), and the bins."""
        tokens = max(self.tokens, 1)
        bins = [{"tokens": int(n), "confidence": float(c / n), "accuracy": float(r / n)}
                for n, c, r in zip(self.count, self.confidence, self.right) if n]
        return {"error": self.error, "brier": self.brier, "confidence": float(self.confidence.sum() / tokens),
                "accuracy": float(self.right.sum() / tokens), "tokens": self.tokens, "bins": bins}

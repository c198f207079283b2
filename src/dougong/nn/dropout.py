"""Dropout (Srivastava et al. 2014): in training each element is 0 with probability p, else scaled by
1/(1-p)."""

import torch.nn.functional as F
from torch import Tensor, nn


def dropout(x: Tensor, p: float, *, training: bool) -> Tensor:
    """`x` with elements dropped while training; `x` itself otherwise or where p is 0."""
    return F.dropout(x, p) if training and p > 0.0 else x


class Dropout(nn.Module):
    """`dropout` as a part."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, training=self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"

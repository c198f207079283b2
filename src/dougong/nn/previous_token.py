"""A first layer that looks back from the first step on: one of its heads begins by attending to the token before.

To continue what stood in the text once already, a model needs a head that brings each token the one before it, and a
later one that looks for the same (induction heads, Olsson et al. 2022, arXiv:2209.11895). Small models find the pair
late and at once; until then they learn little else. Here the first of the two is given, as a beginning that imitates
what training ends with (Trockman & Kolter 2023, arXiv:2305.09828), and trained on like any other weight.

All embeddings share a direction m (with a tied head it adds the same to every logit, which changes no probability).
The norm before the attention leaves it in every input, so the head's queries and keys have a part that is the same for
all tokens: q and k, with a turn of one position between them. Under RoPE their product at a distance δ is then
Σ cos((δ − 1) ω) over the pairs used, whose largest value is at δ = 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from dougong.nn.attention import Attention
from dougong.nn.embedding import Embedding
from dougong.nn.init import Init

STRENGTH = 4.0
"""the part that is the same for all tokens, against the one drawn: of a query or key's length"""
_LONGEST = 16
"""tokens to a whole turn of the slowest pair used: slower ones hardly tell neighbours apart"""


@dataclass(frozen=True)
class Moved:
    """Another rule's values, moved by fixed ones."""

    rule: Init
    by: Callable[[Tensor], Tensor]
    """from what the rule drew, to what is added"""

    def __call__(self, parameter: Tensor, generator: Generator) -> None:
        self.rule(parameter, generator)
        parameter.add_(self.by(parameter))


def begin_with_previous_token(tokens: Embedding, attention: Attention, theta: float) -> None:
    """Changes rules of first values, and nothing else: those of the embedding, and of the first query and key head."""
    tokens.init["weight"] = Moved(tokens.init["weight"], lambda drawn: drawn.std() * direction(drawn.shape[1]))
    for matrix, positions in ((attention.query, 0.0), (attention.key, 1.0)):
        matrix.init["weight"] = Moved(matrix.init["weight"], _SameForAll(attention.head_dim, theta, positions))


def direction(dim: int) -> Tensor:
    """m, (D,): ±1 in turn, which neither RMSNorm nor LayerNorm takes out."""
    return 1.0 - 2.0 * (torch.arange(dim) % 2)


@dataclass(frozen=True)
class _SameForAll:
    """(rows, D) that answers m with one vector of the first head, turned by so many positions."""

    head_dim: int
    theta: float
    positions: float

    def __call__(self, drawn: Tensor) -> Tensor:
        half, dim = self.head_dim // 2, drawn.shape[1]
        angles = self.theta ** (-torch.arange(half) / half)            # of each pair, from one token to the next
        angles = angles[angles >= 2 * math.pi / _LONGEST]
        vector = torch.zeros(drawn.shape[0])
        vector[: len(angles)] = torch.cos(self.positions * angles)
        vector[half : half + len(angles)] = torch.sin(self.positions * angles)
        length = STRENGTH * drawn.std() * math.sqrt(self.head_dim / len(angles))
        return length * torch.outer(vector, direction(dim) / math.sqrt(dim))

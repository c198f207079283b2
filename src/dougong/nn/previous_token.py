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
from typing import Any

import torch
from torch import Generator, Tensor

from dougong.nn.attention import Attention
from dougong.nn.embedding import Embedding
from dougong.nn.init import Init

STRENGTH = 4.0
"""length of a query's or key's part that is the same for all tokens, against the part drawn"""
SHARPNESS = 1.6
"""first scale of the channels used, where queries and keys have a norm with scales"""
_LONGEST = 16
"""tokens to a whole turn of the slowest pair used: slower ones hardly tell neighbours apart"""


def begin_with_previous_token(tokens: Embedding, attention: Attention, theta: float) -> None:
    """Changes rules of first values, and nothing else: the embedding's, those of the first query and key head, and the
    scales of that attention's queries and keys."""
    pairs = FastPairs(attention.head_dim, theta)
    _move(tokens, lambda drawn: drawn.std() * direction(drawn.shape[1]))
    _move(attention.query, lambda drawn: pairs.same_for_all(drawn, positions=0))
    _move(attention.key, lambda drawn: pairs.same_for_all(drawn, positions=1))
    for norm in (attention.query_norm, attention.key_norm):
        if getattr(norm, "weight", None) is not None:
            _move(norm, lambda drawn: (SHARPNESS - 1) * pairs.used.repeat(2))


def direction(dim: int) -> Tensor:
    """m, (D,): ±1 in turn, which neither RMSNorm nor LayerNorm takes out."""
    return 1.0 - 2.0 * (torch.arange(dim) % 2)


@dataclass(frozen=True)
class FastPairs:
    """The pairs of a head's channels that RoPE turns fast enough to tell neighbouring tokens apart."""

    head_dim: int
    theta: float

    @property
    def angles(self) -> Tensor:
        """(H/2,): what each pair turns by from one token to the next."""
        half = self.head_dim // 2
        return self.theta ** (-torch.arange(half) / half)

    @property
    def used(self) -> Tensor:
        """(H/2,): 1 for a fast pair, else 0."""
        return (self.angles >= 2 * math.pi / _LONGEST).float()

    def turned(self, positions: int) -> Tensor:
        """(H,): one in each fast pair, turned by so many positions."""
        turn = positions * self.angles
        return torch.cat([turn.cos() * self.used, turn.sin() * self.used])

    def same_for_all(self, drawn: Tensor, *, positions: int) -> Tensor:
        """(rows, D) like the weight drawn: answers m with that vector, in the first head's rows."""
        vector = torch.zeros(drawn.shape[0])
        vector[: self.head_dim] = self.turned(positions)
        length = STRENGTH * drawn.std() * math.sqrt(self.head_dim)
        return length * torch.outer(vector / vector.norm(), direction(drawn.shape[1]) / math.sqrt(drawn.shape[1]))


@dataclass(frozen=True)
class _Moved:
    """Another rule's values, moved by something fixed or made from them."""

    rule: Init
    by: Callable[[Tensor], Tensor]

    def __call__(self, parameter: Tensor, generator: Generator) -> None:
        drawn = torch.empty(parameter.shape)        # in float32 on the CPU, so that every device gets the same
        self.rule(drawn, generator)
        parameter.copy_(drawn + self.by(drawn))


def _move(part: Any, by: Callable[[Tensor], Tensor]) -> None:
    part.init["weight"] = _Moved(part.init["weight"], by)

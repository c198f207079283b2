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
from functools import partial
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
    head = {"head_dim": attention.head_dim, "theta": theta}
    _move(tokens, _shared)
    _move(attention.query, partial(_same_for_all, positions=0, **head))
    _move(attention.key, partial(_same_for_all, positions=1, **head))
    for norm in (attention.query_norm, attention.key_norm):
        if getattr(norm, "weight", None) is not None:
            _move(norm, partial(_sharper, theta=theta))


def _direction(dim: int) -> Tensor:
    """m, (D,): ±1 in turn, which neither RMSNorm nor LayerNorm takes out."""
    return 1.0 - 2.0 * (torch.arange(dim) % 2)


def _shared(drawn: Tensor) -> Tensor:
    """(D,): m, as large as what is drawn for a token."""
    return drawn.std() * _direction(drawn.shape[1])


def _same_for_all(drawn: Tensor, *, positions: int, head_dim: int, theta: float) -> Tensor:
    """(rows, D): answers m in the first head's rows with one in each fast pair, turned by so many positions."""
    half, turns = head_dim // 2, positions * _fast_pairs(head_dim, theta)
    vector = torch.zeros(drawn.shape[0])
    vector[:len(turns)], vector[half:half + len(turns)] = turns.cos(), turns.sin()
    length = STRENGTH * drawn.std() * math.sqrt(head_dim / len(turns))
    return length * torch.outer(vector, _direction(drawn.shape[1]) / math.sqrt(drawn.shape[1]))


def _sharper(drawn: Tensor, *, theta: float) -> Tensor:
    """(H,): what makes the scales of the fast pairs `SHARPNESS`."""
    fast = torch.zeros(2, len(drawn) // 2)
    fast[:, :len(_fast_pairs(len(drawn), theta))] = SHARPNESS - 1
    return fast.flatten()


def _fast_pairs(head_dim: int, theta: float) -> Tensor:
    """What RoPE turns each pair by from one token to the next, of those that tell neighbours apart: the first ones."""
    half = head_dim // 2
    angles = theta ** (-torch.arange(half) / half)
    return angles[angles >= 2 * math.pi / _LONGEST]


@dataclass(frozen=True)
class _Moved:
    """Another rule's values, moved by what follows from them."""

    rule: Init
    by: Callable[[Tensor], Tensor]

    def __call__(self, parameter: Tensor, generator: Generator) -> None:
        drawn = torch.empty(parameter.shape)        # in float32 on the CPU, so that every device gets the same
        self.rule(drawn, generator)
        parameter.copy_(drawn + self.by(drawn))


def _move(part: Any, by: Callable[[Tensor], Tensor]) -> None:
    part.init["weight"] = _Moved(part.init["weight"], by)

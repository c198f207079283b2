"""Embedding, head and loss in parts along the vocabulary: no process holds a row of logits, and only a few numbers per
token travel (Megatron-LM: arXiv:1909.08053, section 3)."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dougong.models.heads import Head, TiedHead, soften
from dougong.nn.embedding import Embedding
from dougong.objectives.cross_entropy import LossSettings
from dougong.parallel.tensor import Team, divide_parameter, mine
from dougong.runtime.collectives import all_max, all_sum


class VocabularyEmbedding(Embedding):
    """Each process looks up the tokens whose rows it holds; the others come with the sum."""

    team: Team

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:
        weight = mine(self.weight)
        row, here = _place(ids, len(weight), self.team)
        return self.team.add_up(F.embedding(row, weight).masked_fill(~here[..., None], 0.0))


class _InParts:
    """A head of which each process computes the logits of some tokens of the vocabulary."""

    team: Team
    weight: Tensor
    soft_cap: float | None

    def part(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch v"]:
        """This process's logits; what the loss works with."""
        return soften(F.linear(x, mine(self.weight).to(x.dtype)), self.soft_cap)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """All logits, on every process."""
        return self.team.concatenate(self.part(x))

    def token_losses(self, logits_Nv: Float[Tensor, "N v"], targets_N: Int[Tensor, " N"],
                     weight_N: Float[Tensor, " N"], settings: LossSettings, *,
                     with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """As `cross_entropy.token_losses`, of which every process gets the sums of all and its part of the gradient."""
        return token_losses_in_parts(logits_Nv, targets_N, weight_N, settings, self.team, with_gradient=with_gradient)


class VocabularyHead(_InParts, Head):
    """A matrix of its own, in parts."""


class VocabularyTiedHead(_InParts, TiedHead):
    """The embedding's part of this process."""


def divide_embedding(table: Any, team: Team) -> None:
    table.__class__ = VocabularyEmbedding
    table.team = team
    divide_parameter(table, "weight", 0, team)


def divide_head(head: Any, team: Team) -> None:
    """In place; a tied head reads its embedding, which is divided by itself."""
    tied = isinstance(head, TiedHead)
    head.__class__ = VocabularyTiedHead if tied else VocabularyHead
    head.team = team
    if not tied:
        divide_parameter(head, "weight", 0, team)


def token_losses_in_parts(logits_Nv: Float[Tensor, "N v"], targets_N: Int[Tensor, " N"], weight_N: Float[Tensor, " N"],
                          settings: LossSettings, team: Team, *,
                          with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Sums (loss, nll, correct, z) over tokens, and the loss's gradient to this process's logits (N v, their dtype).

    Three messages: the largest logit of each token; what is summed over the vocabulary; the first token that reaches
    the largest logit.
    """
    logits = logits_Nv.to(torch.float64 if logits_Nv.dtype == torch.float64 else torch.float32)
    weight = weight_N.to(logits.dtype)
    v, s, z = logits.shape[1], settings.label_smoothing, settings.z_loss
    vocab_size = v * team.size
    row_N, here_N = _place(targets_N, v, team)
    largest_here, first_here = logits.max(-1)
    largest = all_max(largest_here.clone(), team.group)
    exponentials = (logits - largest[:, None]).exp_()
    target_here = logits.gather(-1, row_N[:, None]).squeeze(-1).masked_fill(~here_N, 0.0)
    total, target, everything = all_sum(
        torch.stack([exponentials.sum(-1), target_here, logits.sum(-1)]), team.group).unbind()
    first = torch.where(largest_here == largest, first_here + team.rank * v, vocab_size)
    correct = (-all_max(-first, team.group) == targets_N).to(logits.dtype)
    lse = largest + total.log()
    nll = lse - target
    loss = nll + z * lse.square()
    if s:
        loss = loss + s * (target - everything / vocab_size)
    sums = torch.stack([(value * weight).sum() for value in (loss, nll, correct, lse.square())])
    if not with_gradient:
        return sums, None
    grad = exponentials.mul_((weight * (1 + 2 * z * lse) / total)[:, None])
    if s:
        grad -= (weight * (s / vocab_size))[:, None]
    grad.scatter_add_(-1, row_N[:, None], (-(1 - s) * weight * here_N)[:, None])
    return sums, grad.to(logits_Nv.dtype)


def _place(ids: Tensor, rows: int, team: Team) -> tuple[Tensor, Tensor]:
    """Where in this process's rows each token lies (0 for those of others), and whether it does."""
    row = ids - team.rank * rows
    here = (row >= 0) & (row < rows)
    return torch.where(here, row, 0), here

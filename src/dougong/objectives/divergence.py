"""How far a student's next-token distribution is from a teacher's, over whatever both can be told apart by.

A *lesson* knows the teacher's distribution of each token and how the student's logits are read beside it: over the
whole vocabulary (`Whole`), over the teacher's k most likely tokens and one bucket for all the rest (`Top`), or over the
next byte (`NextByte`). All three group the vocabulary into buckets and compare the buckets' probabilities. Grouping
never makes a divergence larger, and leaves it as it is exactly where both models share each bucket out alike.

Gradients are in closed form. With u the scaled logits, q = softmax(u), Q_b = Σ_{j in b} q_j and the slope
a_b = ∂D/∂log Q_b (buckets taken as independent), ∂D/∂u_j = q_j (a_b(j) / Q_b(j) − Σ a).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(log p of the teacher, log q of the student), both (N, buckets) -> (nats of each token (N), slopes (N, buckets))"""

_LEAST_PROBABILITY = 1e-30   # of a byte that no token begins with


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student): covers all that the teacher would say (Hinton et al. 2015, arXiv:1503.02531)."""
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), -p


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student ‖ teacher): says nothing that the teacher would not (Gu et al. 2024, arXiv:2306.08543)."""
    q, gap = log_q.exp(), log_q - log_p
    return (q * gap).sum(-1), q * (gap + 1)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """½ KL(p ‖ m) + ½ KL(q ‖ m) with m = (p + q) / 2: between the two, and never above ln 2."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    p, q = log_p.exp(), log_q.exp()
    away = q * (log_q - log_m)
    return (p * (log_p - log_m) + away).sum(-1) / 2, away / 2


DIVERGENCES: dict[str, Divergence] = {"forward": forward_kl, "reverse": reverse_kl, "js": jensen_shannon}


@dataclass
class Compared:
    """Of each token: nats, 1 where student and teacher put the same first, and the gradient to the scaled logits."""

    nats_N: Tensor
    agrees_N: Tensor
    grad_NV: Tensor


@runtime_checkable
class Lesson(Protocol):
    """What the teacher says of a batch of tokens."""

    def compare(self, scaled_NV: Float[Tensor, "N V"], chunk: slice, divergence: Divergence) -> Compared:
        """Compares the student's logits (divided by the temperature) of the tokens `chunk` with the teacher's."""
        ...


@dataclass
class Whole:
    """Every token of the vocabulary, from a teacher at hand: `logits(chunk)` are its own, unscaled. Where one of the
    models has more rows than the tokenizer has tokens, both are read over the rows that they share."""

    logits: Callable[[slice], Tensor]
    temperature: float

    def compare(self, scaled_NV: Float[Tensor, "N V"], chunk: slice, divergence: Divergence) -> Compared:
        theirs_NV = self.logits(chunk).to(scaled_NV.dtype) / self.temperature
        shared = min(scaled_NV.shape[-1], theirs_NV.shape[-1])
        log_q, log_p = scaled_NV[:, :shared].log_softmax(-1), theirs_NV[:, :shared].log_softmax(-1)
        nats_N, slope_NV = divergence(log_p, log_q)
        grad_NV = torch.zeros_like(scaled_NV)
        grad_NV[:, :shared] = slope_NV - log_q.exp() * slope_NV.sum(-1, keepdim=True)
        return Compared(nats_N, (log_q.argmax(-1) == log_p.argmax(-1)).to(nats_N.dtype), grad_NV)


@dataclass
class Top:
    """The teacher's k likeliest tokens, the likeliest first, and in the last column the log-probability of all others;
    without that column the k are the whole vocabulary."""

    ids_Nk: Int[Tensor, "N k"]
    log_p_Nb: Float[Tensor, "N b"]

    def compare(self, scaled_NV: Float[Tensor, "N V"], chunk: slice, divergence: Divergence) -> Compared:
        ids_Nk = self.ids_Nk[chunk].long()
        log_p = self.log_p_Nb[chunk].to(scaled_NV.dtype).log_softmax(-1)     # rounding on the way to the disk
        log_q_NV = scaled_NV.log_softmax(-1)
        log_q = log_q_NV.gather(-1, ids_Nk)
        k = ids_Nk.shape[-1]
        if log_p.shape[-1] > k:
            rest_N = log_q_NV.scatter(-1, ids_Nk, -torch.inf).logsumexp(-1)
            log_q = torch.cat([log_q, rest_N[:, None]], -1)
        nats_N, slope_Nb = divergence(log_p, log_q)
        total_N1, q_NV = slope_Nb.sum(-1, keepdim=True), log_q_NV.exp()
        share_N1 = slope_Nb[:, k:] / log_q[:, k:].exp() if log_p.shape[-1] > k else 0.0
        grad_NV = q_NV * (share_N1 - total_N1)
        grad_NV.scatter_(-1, ids_Nk, slope_Nb[:, :k] - q_NV.gather(-1, ids_Nk) * total_N1)
        return Compared(nats_N, (log_q_NV.argmax(-1) == ids_Nk[:, 0]).to(nats_N.dtype), grad_NV)


@dataclass
class NextByte:
    """The next byte, or the end of the text: what models of different tokenizers both know where both have a border.

    `byte_of_V` is the first byte of each of the student's tokens (256: none, the text ends); a row of `log_p_NB` that
    is NaN has no border in common and is left out.
    """

    byte_of_V: Int[Tensor, " V"]
    log_p_NB: Float[Tensor, "N 257"]

    def compare(self, scaled_NV: Float[Tensor, "N V"], chunk: slice, divergence: Divergence) -> Compared:
        log_p = self.log_p_NB[chunk].to(scaled_NV.dtype)
        here_N = ~log_p[:, 0].isnan()
        log_p = torch.where(here_N[:, None], log_p, 0.0).log_softmax(-1)
        q_NV = scaled_NV.softmax(-1)
        Q = byte_probabilities(q_NV, self.byte_of_V)
        nats_N, slope_NB = divergence(log_p, Q.log())
        slope_NB = slope_NB.masked_fill(Q <= _LEAST_PROBABILITY, 0.0)     # no logit can change these
        rate_NB = slope_NB / Q - slope_NB.sum(-1, keepdim=True)
        grad_NV = q_NV * rate_NB.index_select(-1, self.byte_of_V) * here_N[:, None]
        agrees_N = (Q.argmax(-1) == log_p.argmax(-1)) & here_N
        return Compared(torch.where(here_N, nats_N, 0.0), agrees_N.to(nats_N.dtype), grad_NV)


def byte_probabilities(q_NV: Float[Tensor, "N V"], byte_of_V: Int[Tensor, " V"]) -> Float[Tensor, "N 257"]:
    """The probability that the next token begins with each byte, and (last) that none follows: the exact marginal of
    the distribution over tokens."""
    marginal = torch.zeros(len(q_NV), 257, dtype=q_NV.dtype, device=q_NV.device)
    return marginal.index_add_(-1, byte_of_V, q_NV).clamp_(min=_LEAST_PROBABILITY)


def top_of(logits_NV: Float[Tensor, "*batch V"], k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """What `Top` needs of a teacher's logits: ids (… k) and log-probabilities (… k+1; … k where k is the whole
    vocabulary), both at this temperature."""
    log_p_NV = (logits_NV / temperature).log_softmax(-1)
    log_p_Nk, ids_Nk = log_p_NV.topk(min(k, log_p_NV.shape[-1]), dim=-1)
    if ids_Nk.shape[-1] == log_p_NV.shape[-1]:
        return ids_Nk, log_p_Nk
    rest_N1 = log_p_NV.scatter(-1, ids_Nk, -torch.inf).logsumexp(-1, keepdim=True)
    return ids_Nk, torch.cat([log_p_Nk, rest_N1], -1)

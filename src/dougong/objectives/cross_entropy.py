"""Cross-entropy of a language-model head without ever holding the logits of all tokens.

For a vocabulary of 150k, the logits of 8k tokens are 5 GB in fp32, and again as much for their gradient. Here
each chunk of tokens goes through the head, the loss *and back* before the next chunk starts, so only one
chunk's logits exist at a time and nothing is computed twice. The gradient is known before autograd asks for
it, because a summed loss only ever receives a scalar factor. With one chunk this is simply a lean
cross-entropy.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# each chunk adds to the whole gradient of the head's weight; fewer rows would not pay for that
_LEAST_ROWS = 512


@dataclass(frozen=True)
class LossSettings:
    """What is added to plain cross-entropy, and how many logits may exist at once."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunk_logits: int = 1 << 22


@dataclass
class TokenSums:
    """Sums over tokens: `loss` (differentiable, everything included), `nll` (plain, in nats), `correct`,
    `z`."""

    loss: Tensor
    nll: Tensor
    correct: Tensor
    z: Tensor


def head_cross_entropy(head: nn.Module, x_ND: Float[Tensor, "N D"], targets_N: Int[Tensor, " N"],
                       weight_N: Float[Tensor, " N"], parameters: Iterable[Tensor], vocab_size: int,
                       settings: LossSettings) -> TokenSums:
    """Summed, weighted cross-entropy of `head(x)` against `targets`, differentiable to `x` and the head's
    parameters.

    `parameters` are the model's: those that the head uses get their gradient (a tied head uses the
    embedding's without owning it). With l = logsumexp of the logits a token costs `(1-s)(l - logit_target) +
    s(l - mean logit) + z l²` (label smoothing s; z-loss z: Chowdhery et al. 2022, arXiv:2204.02311, section
    5). No gradients of gradients.
    """
    losses = getattr(head, "token_losses", token_losses)    # a head in parts along the vocabulary has its own

    def of_chunk(logits_NV: Tensor, chunk: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        return losses(logits_NV, targets_N[chunk], weight_N[chunk], settings, with_gradient=with_gradient)

    loss, (_, nll, correct, z) = through_the_head(head, x_ND, parameters, of_chunk, sums=4,
                                                  rows=settings.chunk_logits // vocab_size)
    return TokenSums(loss, nll, correct, z)


ChunkLosses = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]
"""(logits of a chunk of tokens, which tokens, whether a gradient is wanted) -> (sums over those tokens, of which the
first is the loss; the gradient of the loss to the logits)"""


def through_the_head(head: nn.Module, x_ND: Float[Tensor, "N D"], parameters: Iterable[Tensor], losses: ChunkLosses, *,
                     sums: int, rows: int) -> tuple[Tensor, Tensor]:
    """The loss, differentiable to `x` and the head's parameters, and all the sums, which are not. About `rows` tokens
    have logits at a time."""
    wanted = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    with_gradient = bool(wanted) or (x_ND.requires_grad and torch.is_grad_enabled())
    totals, gradients = _in_chunks(head, x_ND, losses, sums, max(_LEAST_ROWS, rows),
                                   [x_ND, *wanted] if with_gradient else [])
    loss = totals[0]
    if with_gradient:   # apart, so that a pipeline can ask for the gradient of x first and that of the weights later
        loss = _Known.apply(loss, gradients[:1], x_ND) + _Known.apply(torch.zeros_like(loss), gradients[1:], *wanted)
    return loss.clone(), totals  # type: ignore[union-attr]


@torch.no_grad()
def _in_chunks(head: nn.Module, x_ND: Tensor, losses: ChunkLosses, sums: int, rows: int,
               wants: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """The sums, and the loss's gradients to `wants` (x and parameters, or nothing)."""
    part = getattr(head, "part", head)
    grad_x = torch.empty_like(x_ND) if wants else None
    grads: list[Tensor | None] = []
    totals = torch.zeros(sums, dtype=_accumulator(x_ND.dtype), device=x_ND.device)
    for chunk in _chunks(len(x_ND), rows):
        with torch.set_grad_enabled(bool(wants)):
            x = x_ND[chunk].detach().requires_grad_(bool(wants))
            logits = part(x)
        found, grad_logits = losses(logits.detach(), chunk, bool(wants))
        totals += found
        if grad_x is not None:
            first, *others = torch.autograd.grad(logits, [x, *wants[1:]], grad_logits, allow_unused=True)
            grad_x[chunk] = first
            grads = [_add(total, new) for total, new in zip(grads, others)] if grads else list(others)
    return totals, [grad_x, *grads]


class _Known(torch.autograd.Function):
    """A value whose gradients to `inputs` are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        # scaled in place below: a second backward through this graph must not find them
        del ctx.gradients
        return None, None, *(g if g is None else g.mul_(factor.to(g.dtype)) for g in gradients)


def token_losses(logits_NV: Float[Tensor, "N V"], targets_N: Int[Tensor, " N"], weight_N: Float[Tensor, " N"],
                 settings: LossSettings, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Sums (loss, nll, correct, z) over tokens and, if asked, the loss's gradient to the logits (N V, their
    dtype)."""
    logits = logits_NV.to(_accumulator(logits_NV.dtype))
    weight = weight_N.to(logits.dtype)
    probability = logits.softmax(-1)
    target = logits.gather(-1, targets_N[:, None]).squeeze(-1)
    largest = logits.amax(-1)
    # The largest logit has probability exp(largest - lse): a maximum instead of another pass of exponentials.
    lse = largest - probability.amax(-1).log()
    nll = lse - target
    correct = _is_argmax(logits, target, largest, targets_N)
    s, z = settings.label_smoothing, settings.z_loss
    loss = nll + z * lse.square()
    if s:
        loss = loss + s * (target - logits.mean(-1))
    sums = torch.stack([(value * weight).sum() for value in (loss, nll, correct, lse.square())])
    if not with_gradient:
        return sums, None
    # d loss / d logit_j = w [p_j (1 + 2 z lse) - s/V - (1-s) (j is the target)]
    grad = probability.mul_((weight * (1 + 2 * z * lse))[:, None])
    if s:
        grad -= (weight * (s / logits.shape[-1]))[:, None]
    grad.scatter_add_(-1, targets_N[:, None], -((1 - s) * weight)[:, None])
    return sums, grad.to(logits_NV.dtype)


def _is_argmax(logits: Tensor, target: Tensor, largest: Tensor, targets_N: Tensor) -> Tensor:
    """1 where the target is the first largest logit. On CPU argmax costs as much as a softmax, so only rows
    whose target reaches the maximum (a tie is possible there) are looked at again."""
    if logits.device.type != "cpu":
        return (logits.argmax(-1) == targets_N).to(logits.dtype)
    correct = target >= largest
    rows = correct.nonzero().squeeze(-1)
    correct[rows] = logits[rows].argmax(-1) == targets_N[rows]
    return correct.to(logits.dtype)


def _add(total: Tensor | None, new: Tensor | None) -> Tensor | None:
    return total if total is None or new is None else total.add_(new)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(length: int, rows: int) -> Iterator[slice]:
    for start in range(0, length, rows):
        yield slice(start, min(start + rows, length))

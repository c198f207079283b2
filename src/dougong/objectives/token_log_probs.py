"""Log-probabilities of given tokens, each with its gradient, without ever holding the logits of all tokens.

A summed cross-entropy knows its gradient at once (`cross_entropy`). Here the loss is a function of the
log-probabilities that is not known yet, such as a sigmoid of the difference of two sums. So each chunk's logits are
computed again on the way back: one more product with the head, and never more than one chunk of logits alive.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dougong.objectives.objective import at_least_fp32

CHUNK_LOGITS = 1 << 22
"""logits held at once, where an objective does not say otherwise"""
_LEAST_ROWS = 64


def token_log_probs(head: nn.Module, x_ND: Float[Tensor, "N D"], targets_N: Int[Tensor, " N"],
                    weight_N: Float[Tensor, " N"], vocab_size: int, *,
                    chunk_logits: int = CHUNK_LOGITS) -> Float[Tensor, " N"]:
    """log p(target) in nats (float32 or better), 0 where the weight is 0: those tokens never reach the head.

    Differentiable to `x` and to whatever the head computes with.
    """
    wanted = weight_N.nonzero().squeeze(-1)
    x, targets = x_ND[wanted], targets_N[wanted]
    rows = max(_LEAST_ROWS, chunk_logits // vocab_size)
    found = [checkpoint(_log_probs, head, x[start:start + rows], targets[start:start + rows],
                        use_reentrant=False, preserve_rng_state=False)
             for start in range(0, max(1, len(x)), rows)]
    values: Tensor = torch.cat(found)  # type: ignore[arg-type]
    return torch.zeros(len(x_ND), dtype=values.dtype, device=values.device).index_copy(0, wanted, values)


def row_log_probs(model: Any, tokens_RT: Int[Tensor, "R T"], targets_RT: Int[Tensor, "R T"],
                  weight_RT: Float[Tensor, "R T"], *, chunk_logits: int = CHUNK_LOGITS,
                  ) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """For each row the weighted sum of its targets' log-probabilities, and the sum of its weights (its tokens)."""
    x_RTD = model.hidden(tokens_RT)
    values = token_log_probs(model.head, x_RTD.flatten(0, 1), targets_RT.flatten(), weight_RT.flatten(),
                             model.config.vocab_size, chunk_logits=chunk_logits)
    weight = weight_RT.to(values.dtype)
    return (values.view_as(weight_RT) * weight).sum(-1), weight.sum(-1)


def _log_probs(head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(at_least_fp32(head(x)), targets, reduction="none")

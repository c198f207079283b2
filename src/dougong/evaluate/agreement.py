"""How far a model says something else than the one it was made from: token by token, on the same text.

A mean over all text hides what a few tokens suffer, so the 99th percentile stands beside it. The divergence is
KL(original ‖ variant) in nats: what a code made for the variant would waste on text that the original writes. Two
models can be compared so only where they know the same tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dougong.evaluate.bits_per_byte import _Reader, evaluating
from dougong.runtime.device import Runtime

_LOGITS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Agreement:
    """Of every scored token: the divergence in nats, and whether both find the same one most likely."""

    divergence: np.ndarray
    same: np.ndarray

    def payload(self) -> dict[str, float]:
        return {"kl_mean": float(self.divergence.mean()), "kl_p99": float(np.percentile(self.divergence, 99)),
                "top1_agreement": float(self.same.mean())}


def agreement(original: nn.Module, variant: nn.Module, tokenizer: Any, documents: Iterable[Any], *, context: int,
              runtime: Runtime | None = None, batch_tokens: int = 8192) -> Agreement:
    """Both models on every token of the documents, read in disjoint windows of `context` as `bits_per_byte` does."""
    begin = tokenizer.first_id
    first = [] if begin is None else [begin]
    texts = [np.concatenate([first, tokenizer.encode(document.text)]).astype(np.int64) for document in documents]
    reader = _Beside(original, variant, runtime or Runtime(), context, batch_tokens)
    with evaluating(original), evaluating(variant):
        divergence = reader.token_nats(texts)
    return Agreement(np.concatenate(divergence), np.concatenate(reader.same))


class _Beside(_Reader):
    """Reads with two models at once; what a token costs is their divergence."""

    def __init__(self, original: Any, variant: Any, runtime: Runtime, context: int, batch_tokens: int) -> None:
        super().__init__(original, runtime, context, context, batch_tokens)
        self.variant, self.same = variant, list[np.ndarray]()

    @torch.no_grad()
    def _forward(self, tokens_BT: Tensor, targets_BT: Tensor, scored_BT: Tensor) -> np.ndarray:
        ours, theirs = (model.hidden(tokens_BT)[scored_BT] for model in (self.model, self.variant))
        rows = max(1, _LOGITS_AT_ONCE // self.model.head(ours[:1]).shape[-1])
        found = []
        for a, b in zip(ours.split(rows), theirs.split(rows)):
            log_p, log_q = (model.head(x).float().log_softmax(-1) for model, x in ((self.model, a), (self.variant, b)))
            found.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0))
            self.same.append((log_p.argmax(-1) == log_q.argmax(-1)).cpu().numpy())
        return torch.cat(found).cpu().double().numpy()

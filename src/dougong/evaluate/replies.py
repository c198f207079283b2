"""How well a model says what it should in conversations: the loss of each, and whether checkable answers are right."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dougong.data.batch import Batch
from dougong.evaluate.statistics import Interval, bootstrap_ratio
from dougong.runtime.device import Runtime

_LOGITS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class ReplyLosses:
    """Of each conversation the summed loss of its learned tokens (nats, float64) and their weight."""

    nats: np.ndarray
    weight: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.nats.sum() / self.weight.sum()) if self.weight.any() else math.nan


@torch.no_grad()
def reply_losses(model: Any, batches: Iterable[Batch], runtime: Runtime, *, most: int | None = None,
                 poll: Callable[[], None] = lambda: None) -> ReplyLosses:
    """Losses conversation by conversation, in the order of the rows, at least `most` of them where there are; the same
    batches give the same order for every model. Batches carry tokens, targets, weight and segment (all B T)."""
    nats: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            poll()
            here = batch.to(runtime.device)
            x_ND = model.hidden(here["tokens"], segment_BT=here["segment"]).flatten(0, 1)
            learned = here["weight"].flatten().nonzero()[:, 0]
            at_once = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
            targets = here["targets"].flatten()
            losses = torch.cat([F.cross_entropy(model.head(x_ND[part]).float(), targets[part], reduction="none")
                                for part in learned.split(at_once)]) if len(learned) else x_ND.new_zeros(0)
            row = torch.arange(batch.rows, device=runtime.device)[:, None]
            of = (here["segment"] + row * batch["tokens"].shape[1]).flatten()[learned].cpu().numpy()
            weight = here["weight"].flatten()[learned].cpu().double().numpy()
            _, place = np.unique(of, return_inverse=True)
            nats.append(np.bincount(place, losses.cpu().double().numpy() * weight))
            weights.append(np.bincount(place, weight))
            if most is not None and sum(map(len, nats)) >= most:
                break
    finally:
        model.train(was_training)
    return ReplyLosses(np.concatenate(nats or [np.zeros(0)]), np.concatenate(weights or [np.zeros(0)]))


def paired_losses(after: ReplyLosses, before: ReplyLosses, *, seed: int = 0) -> tuple[float, Interval | None]:
    """Nats a token of `after` less those of `before`, with the 95 % interval from resampling conversations for both
    alike; below 0: `after` is better."""
    assert np.array_equal(after.weight, before.weight), "different conversations were scored"
    return after.mean - before.mean, bootstrap_ratio(after.nats - before.nats, after.weight, seed=seed)


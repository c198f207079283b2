"""What a request asks for, and what is known of it while it runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dougong.generate.drafts import Ahead
from dougong.generate.lanes import Lane
from dougong.generate.sampling import Draws, SamplingConfig, adjust


@runtime_checkable
class Constraint(Protocol):
    """Which tokens may come next; one object per request and sample, as it follows the text."""

    def allowed(self) -> Bool[Tensor, "V"]:
        """True where a token may follow what was accepted; ids beyond its end may not."""
        ...

    def accept(self, token: int) -> None:
        """Follows the text by one token. Raises where it was not allowed."""
        ...


@dataclass(frozen=True)
class Request:
    """A continuation to be written: token ids in, token ids out.

    `stop_ids` end the text. `sample` says which of several continuations of one prompt this is: together with
    `sampling.seed` it decides the draws. `speculate` is how many tokens are guessed ahead at most, from repetitions in
    the text or by the scheduler's draft model: it changes the speed and never the distribution; the text itself only
    with a draft model above temperature 0. Stop strings and `sampling.n` are the caller's.
    """

    prompt: Sequence[int]
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop_ids: frozenset[int] = frozenset()
    sample: int = 0
    constraint: Constraint | None = None
    speculate: int = 0


@dataclass(slots=True, eq=False)
class Row:
    """A request in progress. `lane` holds its keys and values; without one it waits, and will be read again."""

    id: int
    request: Request
    tokens: list[int]
    prompt_length: int
    draws: Draws
    window: int = 0
    """where the part of `tokens` begins that the model reads; above 0 once the context has slid"""
    lane: Lane | None = None
    blocks: int = 0
    """of the budget"""
    drafts: Ahead | None = None
    seen: Tensor | None = None
    counts: Tensor | None = None

    @property
    def text(self) -> list[int]:
        """What the model reads."""
        return self.tokens[self.window:]

    @property
    def adjusts(self) -> bool:
        """Whether its logits are changed before a token is chosen."""
        sampling = self.request.sampling
        return (sampling.repetition_penalty != 1 or sampling.counts or bool(sampling.logit_bias)
                or self.request.constraint is not None)

    def adjusted(self, logits_1V: Float[Tensor, "1 V"]) -> Float[Tensor, "1 V"]:
        """The logits after penalties, bias and constraint."""
        sampling, V = self.request.sampling, logits_1V.shape[-1]
        if sampling.repetition_penalty != 1 and self.seen is None:
            self.seen = torch.zeros(1, V, dtype=torch.bool, device=logits_1V.device)
            self.seen[0, torch.tensor(self.tokens, device=logits_1V.device)] = True
        if sampling.counts and self.counts is None:
            self.counts = torch.zeros(1, V, device=logits_1V.device)
        logits_1V = adjust(logits_1V, sampling, self.seen, self.counts)
        if self.request.constraint is not None:
            allowed_V = self.request.constraint.allowed()[:V].to(logits_1V.device)
            allowed_V = F.pad(allowed_V, (0, V - len(allowed_V)))
            if not bool(allowed_V.any()):
                raise ValueError("the constraint allows no token here")
            logits_1V = logits_1V.masked_fill(~allowed_V, -torch.inf)
        return logits_1V

    def write(self, token: int) -> None:
        """Adds a chosen token."""
        self.tokens.append(token)
        if self.seen is not None:
            self.seen[0, token] = True
        if self.counts is not None:
            self.counts[0, token] += 1
        if self.request.constraint is not None and token not in self.request.stop_ids:
            self.request.constraint.accept(token)

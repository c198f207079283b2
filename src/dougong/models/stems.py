"""From token ids to the residual stream."""

from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dougong.nn.dropout import Dropout
from dougong.nn.embedding import Embedding
from dougong.nn.init import Init


class TokenStem(nn.Module):
    """Embeds tokens, adds positions where the scheme adds them, normalises and drops; decides the precision.

    `values` (layer name to width) asks for value embeddings: a second table per such layer whose rows join
    the attention's values (modded-nanogpt; nanochat).
    """

    def __init__(self, vocab_size: int, dim: int, *, norm: nn.Module, dropout: float, init: Init,
                 values: Mapping[str, int], value_init: Init) -> None:
        super().__init__()
        self.tokens = Embedding(vocab_size, dim, init=init)
        self.norm = norm
        self.dropout = Dropout(dropout)
        self.values = nn.ModuleDict({layer: Embedding(vocab_size, width, init=value_init)
                                     for layer, width in values.items()})

    def forward(self, tokens_BT: Int[Tensor, "B T"], position: Float[Tensor, "*b T D"] | None,
                dtype: torch.dtype) -> Float[Tensor, "B T D"]:
        x_BTD = self.tokens(tokens_BT)
        if position is not None:
            x_BTD = x_BTD + position
        return self.dropout(self.norm(x_BTD.to(dtype)))

    def value_embeddings(self, tokens_BT: Int[Tensor, "B T"], dtype: torch.dtype,
                         layers: Collection[str] | None = None) -> dict[str, Tensor]:
        """For each layer (of these, if any are named) that has a table: B T (K·H)."""
        return {layer: table(tokens_BT).to(dtype) for layer, table in self.values.items()
                if layers is None or layer in layers}

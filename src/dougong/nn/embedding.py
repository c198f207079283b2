"""Table of vectors, one per token id."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dougong.nn.init import Init, Normal


class Embedding(nn.Embedding):
    """Looks up rows of a (vocabulary, width) table, in the table's own precision; torch's class, as `Linear` is."""

    def __init__(self, vocab_size: int, dim: int, *, init: Init | None = None) -> None:
        super().__init__(vocab_size, dim)
        self.init = {"weight": init or Normal(1.0)}

    def reset_parameters(self) -> None:
        """Nothing: values come from `init`."""

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:
        return F.embedding(ids, self.weight)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings} x {self.embedding_dim}"

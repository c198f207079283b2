"""From the last hidden state to logits, or to a value.

Logits come in the precision of their input. A loss raises them to float32 itself, chunk by chunk, so that the
float32 logits of a whole batch and a large vocabulary never exist.
"""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dougong.core.errors import ConfigError
from dougong.nn.embedding import Embedding
from dougong.nn.init import Init, matrix
from dougong.nn.linear import Linear
from dougong.nn.quantized import QuantizedEmbedding, QuantizedLinear


class Head(Linear):
    """A matrix of its own."""

    def __init__(self, dim: int, vocab_size: int, *, soft_cap: float | None, init: Init) -> None:
        super().__init__(dim, vocab_size, init=init)
        self.soft_cap = soft_cap

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        return soften(super().forward(x), self.soft_cap)


class QuantizedHead(QuantizedLinear):
    """`Head` over integers."""

    soft_cap: float | None = None

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        return soften(super().forward(x), self.soft_cap)


class TiedHead(nn.Module):
    """The token embedding read backwards (Press & Wolf 2016, arXiv:1608.05859).

    It refers to the embedding without registering it: a parameter under two names would part into two at
    `to_empty`, and safetensors refuses to store it twice.
    """

    def __init__(self, embedding: Embedding, *, soft_cap: float | None) -> None:
        super().__init__()
        self.soft_cap = soft_cap
        self.tie(embedding)

    def tie(self, embedding: Embedding | QuantizedEmbedding) -> None:
        """Reads another table from now on."""
        self._embedding = (embedding,)   # a tuple, because nn.Module registers modules it is given bare

    @property
    def embedding(self) -> Embedding | QuantizedEmbedding:
        return self._embedding[0]

    @property
    def weight(self) -> Tensor:
        return self._embedding[0].weight

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        table = self.embedding
        logits = table.product(x) if isinstance(table, QuantizedEmbedding) else F.linear(x, self.weight.to(x.dtype))
        return soften(logits, self.soft_cap)

    def extra_repr(self) -> str:
        return "the token embedding"


def soften(logits: Tensor, cap: float | None) -> Tensor:
    """`cap · tanh(logits / cap)`: no logit exceeds ±cap (Gemma 2, arXiv:2408.00118, section 2)."""
    return logits if cap is None else cap * (logits / cap).tanh()


class ValueHead(Linear):
    """A few numbers for a place instead of one for each token: a reward, or the logits of classes."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__(dim, outputs, init=matrix(None))


VALUE = "value"
"""name of the value head in a model that has one"""


def add_value_head(model: Any, outputs: int) -> None:
    """Gives a decoder a value head beside its own. Raises ConfigError for a model without a stream of tokens."""
    section = getattr(model.config, "decoder", None)
    if section is None:
        raise ConfigError(f"model.kind={model.config.kind} reads no tokens, so no head can judge a text by it.")
    model.add_module(VALUE, ValueHead(section().dim, outputs))


def keep_value_head(made: Any, model: Any) -> None:
    """Gives `made` a value head where `model` has one, unfilled."""
    if hasattr(model, VALUE):
        made.add_module(VALUE, ValueHead(model.value.in_features, model.value.out_features))

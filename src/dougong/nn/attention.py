"""Causal self-attention: multi-head, grouped-query or multi-query, by the number of key/value heads."""

from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from dougong.core.config import config
from dougong.core.errors import ConfigError
from dougong.nn.attention_kernels import Kernel, choose_kernel
from dougong.nn.init import ZEROS, Init
from dougong.nn.linear import Linear
from dougong.nn.mask import Mask
from dougong.nn.norm import RMSNormConfig
from dougong.nn.position import Rotation, rotate
from dougong.nn.ranges import Count, Probability


@runtime_checkable
class Cache(Protocol):
    """What attention knows of a key/value cache."""

    length: int
    """tokens held before this forward"""
    start_B: Tensor | None
    """first valid key of each row, for left-padded batches"""

    def update(self, layer: int, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Stores T new keys and values of one layer; returns all length + T of them."""
        ...

    def advance(self, T: int) -> None:
        """Counts T tokens as held; the model calls it once, at the end of a forward."""
        ...


@config
class AttentionConfig:
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245); with as many kv heads as heads,
    multi-head."""

    kind: Literal["attention"] = "attention"
    num_heads: Count | None = None
    """query heads; derived: from the size dial"""
    num_kv_heads: Count | None = None
    """key and value heads, each shared by an equal group of query heads; derived: num_heads"""
    head_dim: Count | None = None
    """width of a head; derived: dim / num_heads"""
    qk_norm: Literal["none", "learned", "plain"] = "none"
    """RMSNorm of queries and keys per head (Dehghani et al. 2023, arXiv:2302.05442): with a learned scale, or
    without"""
    qk_norm_eps: float = 1e-6
    bias: bool = False
    """biases on queries, keys and values"""
    output_bias: bool = False
    """bias on the output"""
    dropout: Probability = 0.0
    """probability that a query ignores a key while training"""

    def heads(self, dim: int | None) -> tuple[int, int, int]:
        """`(num_heads, num_kv_heads, head_dim)`, checked. Raises ConfigError with what would fit."""
        if self.num_heads is None or dim is None:
            raise ConfigError(f"num_heads={self.num_heads}, dim={dim}: a recipe derives what is None. "
                              "Outside one, give both, such as num_heads=4 dim=128.")
        num_kv_heads = self.num_kv_heads or self.num_heads
        if self.head_dim is None and dim % self.num_heads:
            raise ConfigError(f"dim={dim} is not a multiple of num_heads={self.num_heads}: each head needs "
                              "an equal width. Try "
                              f"num_heads={_largest_divisor(dim, self.num_heads)}, or set head_dim.")
        if self.num_heads % num_kv_heads:
            raise ConfigError(f"num_kv_heads={num_kv_heads} does not divide num_heads={self.num_heads}: each "
                              f"key/value head serves an equal group. Try num_kv_heads="
                              f"{_largest_divisor(self.num_heads, num_kv_heads)}.")
        return self.num_heads, num_kv_heads, self.head_dim or dim // self.num_heads

    def build(self, *, dim: int, layer: int = 0, value_embedding: bool = False, init: Init | None = None,
              output_init: Init | None = None) -> "Attention":
        return Attention(self, dim=dim, layer=layer, value_embedding=value_embedding, init=init,
                         output_init=output_init)


def _largest_divisor(of: int, at_most: int) -> int:
    return next(d for d in range(min(of, at_most), 0, -1) if of % d == 0)


class Attention(nn.Module):
    """Queries, keys and values are three matrices, not one: a fused product measured equally fast on a CPU
    (8,192 × 256 in bf16: 26.1 ms against 25.4, forward and backward), and apart they need no splitting for
    Muon, LoRA or export.
    """

    def __init__(self, section: AttentionConfig, *, dim: int, layer: int, value_embedding: bool,
                 init: Init | None, output_init: Init | None) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = section.heads(dim)
        self.layer, self.dropout = layer, section.dropout
        self.query = Linear(dim, self.num_heads * self.head_dim, bias=section.bias, init=init)
        self.key = Linear(dim, self.num_kv_heads * self.head_dim, bias=section.bias, init=init)
        self.value = Linear(dim, self.num_kv_heads * self.head_dim, bias=section.bias, init=init)
        self.output = Linear(self.num_heads * self.head_dim, dim, bias=section.output_bias, init=output_init)
        norm = RMSNormConfig(eps=section.qk_norm_eps, learned=section.qk_norm == "learned")
        self.query_norm = norm.build(dim=self.head_dim) if section.qk_norm != "none" else nn.Identity()
        self.key_norm = norm.build(dim=self.head_dim) if section.qk_norm != "none" else nn.Identity()
        self.value_gate = Linear(dim, self.num_kv_heads, init=ZEROS) if value_embedding else None
        self.kernel: Kernel | None = None   # None: `choose_kernel` decides at each call

    def forward(self, x_BTD: Float[Tensor, "B T D"], *, mask: Mask, rotation: Rotation | None = None,
                value_BTE: Float[Tensor, "B T E"] | None = None,
                cache: Cache | None = None) -> Float[Tensor, "B T D"]:
        """`value_BTE` (E = K·H) holds the tokens' value embeddings, added through a gate that begins at 1."""
        q_BTNH = self.query_norm(self._heads(self.query(x_BTD)))
        k_BTKH = self.key_norm(self._heads(self.key(x_BTD)))
        v_BTKH = self._heads(self.value(x_BTD))
        if self.value_gate is not None and value_BTE is not None:
            gate_BTK = 2 * self.value_gate(x_BTD).sigmoid()
            v_BTKH = v_BTKH + gate_BTK[..., None] * self._heads(value_BTE)
        if rotation is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, rotation), rotate(k_BTKH, rotation)
        q_BNTH, k_BKTH, v_BKTH = (part.transpose(1, 2) for part in (q_BTNH, k_BTKH, v_BTKH))
        if cache is not None:
            k_BKTH, v_BKTH = cache.update(self.layer, k_BKTH, v_BKTH)
        kernel = self.kernel or choose_kernel(q_BNTH, k_BKTH)
        y_BNTH = kernel(q_BNTH, k_BKTH, v_BKTH, mask, dropout=self.dropout if self.training else 0.0)
        return self.output(y_BNTH.transpose(1, 2).flatten(2))

    def _heads(self, x_BTE: Tensor) -> Float[Tensor, "B T heads H"]:
        return x_BTE.unflatten(-1, (-1, self.head_dim))

"""Qwen3 (Yang et al. 2025, arXiv:2505.09388): Llama's layout with QK-norm and a head width of its own."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from dougong.core.config import config
from dougong.nn.ranges import Count, NotNegative, Positive, Probability

if TYPE_CHECKING:
    from dougong.models.compose import Decoder, DecoderConfig


@config
class Qwen3Config:
    """Qwen3 in Hugging Face's sense: what is trained here loads in transformers, vLLM and llama.cpp as it
    is."""

    kind: Literal["qwen3"] = "qwen3"
    vocab_size: Count | None = None
    """tokens in the vocabulary (`vocab_size`); derived: from the tokenizer"""
    context: Count | None = None
    """`max_position_embeddings`; derived: from the size dial"""
    dim: Count | None = None
    """width (`hidden_size`); derived: from the size dial"""
    num_layers: Count | None = None
    """layers (`num_hidden_layers`); derived: from the size dial"""
    num_heads: Count | None = None
    """query heads (`num_attention_heads`); derived: from the size dial"""
    num_kv_heads: Count | None = None
    """key/value heads (`num_key_value_heads`), dividing `num_heads`; derived: num_heads"""
    head_dim: Count | None = None
    """width of a head, 128 in the published models; derived: dim / num_heads"""
    ffn_dim: Count | None = None
    """feed-forward width (`intermediate_size`); derived: 8/3 of dim, rounded up to 64"""
    rope_theta: Positive = 10_000.0
    """base of the rotary wavelengths; 1,000,000 in the published models, whose context is 40,960"""
    norm_eps: Positive = 1e-6
    """`rms_norm_eps`"""
    tied: bool = True
    """`tie_word_embeddings`"""
    attention_bias: bool = False
    """biases on queries, keys, values and output"""
    window: Count | None = None
    """`sliding_window`: keys a short-sighted layer looks back on"""
    full_layers: Annotated[int, Field(ge=0)] | None = None
    """`max_window_layers`: this many first layers look back on everything, the others on `window`; only with
    `window`"""
    attention_dropout: Probability = 0.0
    embedding_dropout: Probability = 0.0
    """not in Hugging Face's model; used in training only"""
    dropout: Probability = 0.0
    """of what each half of a layer adds; not in Hugging Face's model; used in training only"""
    init_std: NotNegative = 0.02
    """`initializer_range`"""
    previous_token_head: bool = False
    """the first layer's first key head begins by looking at the token before: small models then learn to copy much
    sooner (`nn.previous_token`)"""

    def decoder(self) -> "DecoderConfig":
        from dougong.models.compose import DecoderConfig
        from dougong.nn.attention import AttentionConfig
        from dougong.nn.feed_forward import SwiGLUConfig
        from dougong.nn.norm import RMSNormConfig
        from dougong.nn.position import RoPEConfig

        pattern = self._window_pattern()
        return DecoderConfig(
            vocab_size=self.vocab_size, context=self.context, dim=self.dim, num_layers=self.num_layers,
            attention=AttentionConfig(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
                                      head_dim=self.head_dim, qk_norm="learned", qk_norm_eps=self.norm_eps,
                                      bias=self.attention_bias, output_bias=self.attention_bias,
                                      dropout=self.attention_dropout),
            position=RoPEConfig(theta=self.rope_theta),
            feed_forward=SwiGLUConfig(ffn_dim=self.ffn_dim),
            norm=RMSNormConfig(eps=self.norm_eps), window=self.window if "S" in pattern else None,
            window_pattern=pattern, tied=self.tied, embedding_dropout=self.embedding_dropout, dropout=self.dropout,
            init_std=self.init_std, embedding_std=self.init_std or 0.02,
            previous_token_head=self.previous_token_head)

    def _window_pattern(self) -> str:
        if self.window is None or self.num_layers is None:
            return "L"
        full = min(self.full_layers or 0, self.num_layers)
        return "L" * full + "S" * (self.num_layers - full)

    def build(self) -> "Decoder":
        return self.decoder().build(config=self)

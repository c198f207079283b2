"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, GELU, biases, tied head."""

from typing import TYPE_CHECKING, Literal

from dougong.core.config import config
from dougong.nn.ranges import Count, NotNegative, Positive, Probability

if TYPE_CHECKING:
    from dougong.models.compose import Decoder, DecoderConfig


@config
class GPT2Config:
    """GPT-2 in Hugging Face's sense; defaults are those of the published models."""

    kind: Literal["gpt2"] = "gpt2"
    vocab_size: Count | None = None
    """tokens in the vocabulary (`vocab_size`); derived: from the tokenizer"""
    context: Count | None = None
    """learned positions (`n_positions`); derived: from the size dial"""
    dim: Count | None = None
    """width (`n_embd`); derived: from the size dial"""
    num_layers: Count | None = None
    """layers (`n_layer`); derived: from the size dial"""
    num_heads: Count | None = None
    """heads (`n_head`), dividing `dim`; derived: from the size dial"""
    ffn_dim: Count | None = None
    """feed-forward width (`n_inner`); derived: 4 × dim"""
    activation: Literal["gelu_new", "gelu"] = "gelu_new"
    """tanh form or exact form of GELU (`activation_function`)"""
    bias: bool = True
    """biases in matrices and norms; GPT-2 has them, nanoGPT's variant does not"""
    norm_eps: Positive = 1e-5
    """`layer_norm_epsilon`"""
    tied: bool = True
    """`tie_word_embeddings`"""
    embedding_dropout: Probability = 0.0
    """`embd_pdrop`"""
    attention_dropout: Probability = 0.0
    """`attn_pdrop`"""
    dropout: Probability = 0.0
    """`resid_pdrop`"""
    init_std: NotNegative = 0.02
    """`initializer_range`; matrices that write to the stream start 1/sqrt(2 · num_layers) as wide"""

    def decoder(self) -> "DecoderConfig":
        from dougong.models.compose import DecoderConfig
        from dougong.nn.attention import AttentionConfig
        from dougong.nn.feed_forward import GELUConfig
        from dougong.nn.norm import LayerNormConfig
        from dougong.nn.position import LearnedConfig

        return DecoderConfig(
            vocab_size=self.vocab_size, context=self.context, dim=self.dim, num_layers=self.num_layers,
            attention=AttentionConfig(num_heads=self.num_heads, bias=self.bias, output_bias=self.bias,
                                      dropout=self.attention_dropout),
            position=LearnedConfig(),
            feed_forward=GELUConfig(ffn_dim=self.ffn_dim, bias=self.bias,
                                    approximate="tanh" if self.activation == "gelu_new" else "none"),
            norm=LayerNormConfig(eps=self.norm_eps, bias=self.bias), tied=self.tied,
            embedding_dropout=self.embedding_dropout, dropout=self.dropout,
            init_std=self.init_std, embedding_std=self.init_std or 0.02, output_init="scaled")

    def build(self) -> "Decoder":
        return self.decoder().build(config=self)

"""Qwen3's mixture of experts (arXiv:2505.09388, section 2): Qwen3 with experts, none of them shared."""

from typing import TYPE_CHECKING, Literal

from dougong.core.config import config
from dougong.nn.ranges import Count, NotNegative, Positive, Probability

if TYPE_CHECKING:
    from dougong.models.compose import Decoder, DecoderConfig


@config
class Qwen3MoEConfig:
    """Qwen3-MoE in Hugging Face's sense: what is trained here loads in transformers and vLLM as it is."""

    kind: Literal["qwen3_moe"] = "qwen3_moe"
    vocab_size: Count | None = None
    """tokens in the vocabulary (`vocab_size`); derived: from the tokenizer"""
    context: Count | None = None
    """`max_position_embeddings`; derived: 256, or 1024 for larger models"""
    dim: Count | None = None
    """width (`hidden_size`); has to be given, as the size dial knows no experts"""
    num_layers: Count | None = None
    """layers (`num_hidden_layers`); has to be given"""
    num_heads: Count | None = None
    """query heads (`num_attention_heads`); has to be given"""
    num_kv_heads: Count | None = None
    """key/value heads (`num_key_value_heads`), dividing `num_heads`; derived: num_heads"""
    head_dim: Count | None = None
    """width of a head, 128 in the published models; derived: dim / num_heads"""
    num_experts: Count = 128
    """`num_experts`"""
    top_k: Count = 8
    """experts that each token visits (`num_experts_per_tok`)"""
    ffn_dim: Count | None = None
    """inner width of an expert (`moe_intermediate_size`); derived: 8/3 of dim over top_k, rounded up to 64"""
    normalised: bool = True
    """`norm_topk_prob`: the weights of a token's experts add up to 1"""
    balance: Literal["bias", "none"] = "none"
    """none: loads are left to the gradient, as in Hugging Face's model without its extra loss; bias: loads are kept
    equal, but by numbers that Hugging Face's model has no place for, so such a model cannot be exported"""
    balance_rate: Positive = 1e-3
    """with bias: how far a step moves it"""
    rope_theta: Positive = 10_000.0
    """base of the rotary wavelengths; 1,000,000 in the published models, whose context is 40,960"""
    norm_eps: Positive = 1e-6
    """`rms_norm_eps`"""
    tied: bool = False
    """`tie_word_embeddings`"""
    attention_bias: bool = False
    """biases on queries, keys, values and output"""
    window: Count | None = None
    """`sliding_window`: keys that every layer looks back on"""
    attention_dropout: Probability = 0.0
    embedding_dropout: Probability = 0.0
    """not in Hugging Face's model; used in training only"""
    dropout: Probability = 0.0
    """of what each half of a layer adds; not in Hugging Face's model; used in training only"""
    init_std: NotNegative = 0.02
    """`initializer_range`"""

    def decoder(self) -> "DecoderConfig":
        from dougong.models.compose import DecoderConfig
        from dougong.nn.attention import AttentionConfig
        from dougong.nn.moe import MoEConfig
        from dougong.nn.norm import RMSNormConfig
        from dougong.nn.position import RoPEConfig

        return DecoderConfig(
            vocab_size=self.vocab_size, context=self.context, dim=self.dim, num_layers=self.num_layers,
            attention=AttentionConfig(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
                                      head_dim=self.head_dim, qk_norm="learned", qk_norm_eps=self.norm_eps,
                                      bias=self.attention_bias, output_bias=self.attention_bias,
                                      dropout=self.attention_dropout),
            position=RoPEConfig(theta=self.rope_theta),
            feed_forward=MoEConfig(num_experts=self.num_experts, top_k=self.top_k, ffn_dim=self.ffn_dim,
                                   normalised=self.normalised, balance=self.balance, balance_rate=self.balance_rate),
            norm=RMSNormConfig(eps=self.norm_eps), window=self.window, window_pattern="S" if self.window else "L",
            tied=self.tied, embedding_dropout=self.embedding_dropout, dropout=self.dropout,
            init_std=self.init_std, embedding_std=self.init_std or 0.02)

    def build(self) -> "Decoder":
        return self.decoder().build(config=self)

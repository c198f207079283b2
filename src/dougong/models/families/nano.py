"""Our small fast family: what the nanoGPT speedruns found to learn most per second, without a format to
fit."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from dougong.core.config import chosen_from, config
from dougong.core.errors import ConfigError
from dougong.nn import FEED_FORWARDS
from dougong.nn.ranges import Count, NotNegative, Positive, Probability

if TYPE_CHECKING:
    from dougong.models.compose import Decoder, DecoderConfig


@config
class NanoConfig:
    """RoPE, QK-norm, ReLU², parameter-free RMSNorm, x0 scalars, zero-initialised outputs, no biases,
    multi-head.

    Sources: modded-nanogpt and nanochat. It has no Hugging Face form; train `qwen3` to export.
    """

    kind: Literal["nano"] = "nano"
    vocab_size: Count | None = None
    """tokens in the vocabulary; derived: from the tokenizer"""
    context: Count | None = None
    """tokens the model is trained to read; derived: from the size dial"""
    dim: Count | None = None
    """width; derived: from the size dial"""
    num_layers: Count | None = None
    """layers; derived: from the size dial"""
    num_heads: Count | None = None
    """heads, dividing `dim`; derived: from the size dial"""
    ffn_dim: Count | None = None
    """feed-forward width; derived: 4 × dim"""
    feed_forward: Annotated[Any, chosen_from(FEED_FORWARDS, optional=True)] = None
    """null: relu2 of ffn_dim; or another, such as moe, whose width is its own"""
    position: Literal["rope", "rope_alibi"] = "rope"
    """rope_alibi adds a preference for what is near: faster to learn in the first minute, no gain later"""
    rope_theta: Positive = 10_000.0
    """base of the rotary wavelengths"""
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    """both without parameters; layer_norm is the faster kernel on CPUs"""
    window: Count | None = None
    """keys a short-sighted layer looks back on, its own included"""
    window_pattern: str = "L"
    """S (short) and L (long) for the layers in turn, repeated"""
    value_embeddings: Literal["none", "alternate", "all"] = "none"
    """a second embedding added to the attention's values"""
    soft_cap: Positive | None = None
    """bound on the logits: cap · tanh(logits / cap)"""
    tied: bool = False
    """the head is the token embedding; then its std starts at 1/sqrt(dim)"""
    embedding_dropout: Probability = 0.0
    attention_dropout: Probability = 0.0
    dropout: Probability = 0.0
    """of what each half of a layer adds to the stream"""
    x0_init: float = 0.1
    """first weight of the embedded tokens in every layer's input"""
    head_std: NotNegative = 0.0
    """std of an untied head at the start; 0: every token equally likely"""

    def decoder(self) -> "DecoderConfig":
        from dougong.models.compose import DecoderConfig
        from dougong.nn.attention import AttentionConfig
        from dougong.nn.feed_forward import ReLU2Config
        from dougong.nn.norm import LayerNormConfig, RMSNormConfig
        from dougong.nn.position import RoPEALiBiConfig, RoPEConfig
        from dougong.nn.residual import X0ResidualConfig

        if self.feed_forward is not None and self.ffn_dim is not None:
            raise ConfigError(f"ffn_dim={self.ffn_dim} is the width of nano's own feed-forward, and feed_forward="
                              f"{self.feed_forward.kind} replaces it. Try feed_forward.ffn_dim={self.ffn_dim} instead.")
        return DecoderConfig(
            vocab_size=self.vocab_size, context=self.context, dim=self.dim, num_layers=self.num_layers,
            attention=AttentionConfig(num_heads=self.num_heads, qk_norm="plain",
                                      dropout=self.attention_dropout),
            position={"rope": RoPEConfig, "rope_alibi": RoPEALiBiConfig}[self.position](theta=self.rope_theta),
            feed_forward=self.feed_forward or ReLU2Config(ffn_dim=self.ffn_dim),
            norm={"rms_norm": RMSNormConfig, "layer_norm": LayerNormConfig}[self.norm](learned=False),
            embedding_norm=True,
            residual=X0ResidualConfig(origin=self.x0_init),
            window=self.window, window_pattern=self.window_pattern, value_embeddings=self.value_embeddings,
            tied=self.tied, soft_cap=self.soft_cap,
            embedding_dropout=self.embedding_dropout, dropout=self.dropout, init_std=None,
            embedding_std=(self.dim or 1) ** -0.5 if self.tied else 1.0, output_init="zero",
            head_std=self.head_std)

    def build(self) -> "Decoder":
        return self.decoder().build(config=self)

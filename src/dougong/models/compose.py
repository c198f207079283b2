"""The decoder: stem, stack and head arranged into a causal language model, every choice point a part."""

from collections.abc import Collection
from typing import Annotated, Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dougong.core.config import chosen_from, config
from dougong.core.errors import ConfigError
from dougong.models.heads import Head, TiedHead
from dougong.models.stack import BLOCKS, Carry, Stack
from dougong.models.stems import TokenStem
from dougong.nn import FEED_FORWARDS, NORMS, POSITIONS, RESIDUALS
from dougong.nn.attention import AttentionConfig, Cache
from dougong.nn.feed_forward import SwiGLUConfig
from dougong.nn.init import ZEROS, Init, Initialised, matrix
from dougong.nn.norm import RMSNormConfig
from dougong.nn.position import RoPE, RoPEConfig, Span
from dougong.nn.previous_token import begin_with_previous_token
from dougong.nn.ranges import Count, NotNegative, Positive, Probability
from dougong.nn.residual import PlainResidualConfig


@config
class DecoderConfig:
    """A decoder-only transformer with all its choice points; the families are arrangements of it."""

    kind: Literal["decoder"] = "decoder"
    vocab_size: Count | None = None
    """tokens in the vocabulary; derived: from the tokenizer"""
    context: Count | None = None
    """tokens the model is trained to read; derived: from the size dial"""
    dim: Count | None = None
    """width of the residual stream; derived: from the size dial"""
    num_layers: Count | None = None
    """layers; derived: from the size dial"""
    attention: AttentionConfig = AttentionConfig()
    """heads, QK-norm, biases"""
    position: Annotated[Any, chosen_from(POSITIONS)] = RoPEConfig()
    """rope, learned, sinusoidal, alibi or none"""
    feed_forward: Annotated[Any, chosen_from(FEED_FORWARDS)] = SwiGLUConfig()
    """swiglu, gelu, relu2 or moe"""
    norm: Annotated[Any, chosen_from(NORMS)] = RMSNormConfig()
    """rms_norm or layer_norm, in every layer and at the end"""
    norm_placement: Literal["pre", "post"] = "pre"
    """normalise what enters a half of a layer, or what leaves it (then there is no norm at the end)"""
    embedding_norm: bool = False
    """normalise the embedded tokens too"""
    residual: Annotated[Any, chosen_from(RESIDUALS)] = PlainResidualConfig()
    """plain or x0"""
    window: Count | None = None
    """keys a short-sighted layer looks back on, its own included"""
    window_pattern: str = "L"
    """S (short: `window`) and L (long: everything) for the layers in turn, repeated; "SSSL" has three short
    ones in four"""
    value_embeddings: Literal["none", "alternate", "all"] = "none"
    """a second embedding added to the attention's values, in every other layer (the last included) or in
    all"""
    tied: bool = True
    """the head is the token embedding"""
    soft_cap: Positive | None = None
    """bound on the logits: cap · tanh(logits / cap)"""
    embedding_dropout: Probability = 0.0
    """dropout of the embedded tokens"""
    dropout: Probability = 0.0
    """dropout of what each half of a layer adds to the stream"""
    init_std: NotNegative | None = 0.02
    """std of matrices at the start; null: 1/sqrt(inputs) of each"""
    embedding_std: Positive = 0.02
    """std of embeddings at the start"""
    output_init: Literal["normal", "scaled", "zero"] = "normal"
    """matrices that write to the stream: like the others, divided by sqrt(2 · num_layers) as in GPT-2, or
    zero"""
    head_std: NotNegative | None = None
    """std of an untied head at the start; null: as the other matrices; 0: every token equally likely"""
    previous_token_head: bool = False
    """the first layer's first key head begins by looking at the token before (`nn.previous_token`); with rope"""

    def decoder(self) -> "DecoderConfig":
        return self

    def build(self, *, config: Any = None) -> "Decoder":
        """The model, its parameters unfilled. Raises ConfigError where fields are missing or do not fit.

        `config` is the family config that arranged these parts, for `model.config`.
        """
        sizes = ("vocab_size", "context", "dim", "num_layers")
        missing = [name for name in sizes if getattr(self, name) is None]
        if missing:
            raise ConfigError(f"{', '.join(missing)} not given: a recipe derives them from its tokenizer and "
                              f"size. Outside a recipe, give them, such as {missing[0]}=256.")
        return Decoder(self, config=config or self)

    def windows(self) -> tuple[int | None, ...]:
        """Keys each layer looks back on, None for all. Raises ConfigError where pattern and window
        disagree."""
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ConfigError(f"window_pattern={self.window_pattern!r}: write S (short) and L (long) for the "
                              "layers in turn, such as SSSL.")
        if ("S" in self.window_pattern) != (self.window is not None):
            raise ConfigError(f"window_pattern={self.window_pattern!r} with window={self.window}: short "
                              "layers (S) need a window, and a window needs short layers. Try window=256 "
                              "window_pattern=SSSL.")
        return tuple(self.window if self.window_pattern[i % len(self.window_pattern)] == "S" else None
                     for i in range(self.num_layers or 0))

    def value_layers(self) -> tuple[int, ...]:
        """Layers that have a value embedding."""
        step, layers = {"none": None, "alternate": 2, "all": 1}[self.value_embeddings], self.num_layers or 0
        return () if step is None else tuple(range((layers - 1) % step, layers, step))


class Decoder(Initialised):
    """A causal language model.

    `compute_dtype` decides the precision of everything after the stem; parameters keep their own (float32).
    """

    def __init__(self, section: DecoderConfig, *, config: Any) -> None:
        super().__init__()
        assert section.vocab_size and section.dim and section.num_layers, "DecoderConfig.build checks them"
        self.config = config
        self.compute_dtype = torch.float32
        num_heads, num_kv_heads, head_dim = section.attention.heads(section.dim)
        embedding_init = matrix(section.embedding_std)
        norm = section.norm.build
        self.stem = TokenStem(
            section.vocab_size, section.dim, dropout=section.embedding_dropout, init=embedding_init,
            norm=norm(dim=section.dim) if section.embedding_norm else nn.Identity(),
            values={str(i): num_kv_heads * head_dim for i in section.value_layers()},
            value_init=matrix(section.init_std))
        self.position = section.position.build(dim=section.dim, head_dim=head_dim, num_heads=num_heads,
                                               context=section.context, init=embedding_init)
        self.stack = _build_stack(section)
        self.norm = norm(dim=section.dim) if section.norm_placement == "pre" else nn.Identity()
        head_std = section.init_std if section.head_std is None else section.head_std
        self.head = (TiedHead(self.stem.tokens, soft_cap=section.soft_cap) if section.tied else
                     Head(section.dim, section.vocab_size, soft_cap=section.soft_cap, init=matrix(head_std)))
        if section.previous_token_head:
            if not isinstance(self.position, RoPE) or section.norm_placement != "pre":
                raise ConfigError(f"previous_token_head with position.kind={section.position.kind} and norm_placement="
                                  f"{section.norm_placement}: it needs rope, and norms before the attention. "
                                  "Try previous_token_head=false.")
            begin_with_previous_token(self.stem.tokens, cast(Any, self.stack["0"]).attention, self.position.theta)

    def hidden(self, tokens_BT: Int[Tensor, "B T"], *, segment_BT: Int[Tensor, "B row"] | None = None,
               cache: Cache | None = None, carry: Carry | None = None) -> Float[Tensor, "B T D"]:
        """The stream after the final norm, in `compute_dtype`.

        `segment_BT` numbers the documents packed into a row; tokens see only their own. With a `cache` the
        tokens continue what it holds, and it holds them afterwards. `carry`: see `stream`.
        """
        return self.norm(self.stream(tokens_BT, segment_BT=segment_BT, cache=cache, carry=carry)[0])

    def stream(self, tokens_BT: Int[Tensor, "B T"], *, segment_BT: Int[Tensor, "B row"] | None = None,
               cache: Cache | None = None, carry: Carry | None = None,
               layers: Collection[str] | None = None) -> Carry:
        """The stream after these layers (None: all there are), and the embedded tokens that it began with.

        Where earlier layers are in another decoder, `carry` is what they returned there; the stem, the final norm and
        the head may then be absent too.
        """
        span = self.span(tokens_BT, segment_BT, cache)
        if carry is None:
            x_BTD = self.stem(tokens_BT, self.position.embed(span), self.compute_dtype)
            carry = x_BTD, x_BTD
        values = self.stem.value_embeddings(tokens_BT, self.compute_dtype, layers)
        after = self.stack(carry, span, self.position, values=values, cache=cache, layers=layers)
        if cache is not None:
            cache.advance(span.T)
        return after

    def span(self, tokens_BT: Int[Tensor, "B T"], segment_BT: Int[Tensor, "B row"] | None, cache: Cache | None) -> Span:
        """Where the tokens stand."""
        return Span(T=tokens_BT.shape[1], device=tokens_BT.device, segment_BS=segment_BT,
                    length=cache.length if cache else 0, start_B=cache.start_B if cache else None)

    def head_parameters(self) -> list[Tensor]:
        """What the head computes with: its own parameters, or the embedding that it is tied to."""
        return list(self.head.parameters()) or list(self.stem.tokens.parameters())

    def forward(self, tokens_BT: Int[Tensor, "B T"], *, segment_BT: Int[Tensor, "B row"] | None = None,
                cache: Cache | None = None) -> Float[Tensor, "B T V"]:
        """Logits of the token after each token, in `compute_dtype`."""
        return self.head(self.hidden(tokens_BT, segment_BT=segment_BT, cache=cache))


def _build_stack(section: DecoderConfig) -> Stack:
    assert section.dim and section.num_layers
    init, dim = matrix(section.init_std), section.dim
    output_init = _output_init(section)
    value_layers = section.value_layers()
    blocks = [BLOCKS[section.norm_placement](
        residual=section.residual.build(),
        attention_norm=section.norm.build(dim=dim),
        attention=section.attention.build(dim=dim, layer=i, value_embedding=i in value_layers, init=init,
                                          output_init=output_init),
        feed_forward_norm=section.norm.build(dim=dim),
        feed_forward=section.feed_forward.build(dim=dim, init=init, output_init=output_init),
        dropout=section.dropout) for i in range(section.num_layers)]
    return Stack(blocks, windows=section.windows())


def _output_init(section: DecoderConfig) -> Init:
    if section.output_init == "zero":
        return ZEROS
    scale = (2 * (section.num_layers or 1)) ** -0.5 if section.output_init == "scaled" else 1.0
    return matrix(section.init_std, scale=scale)

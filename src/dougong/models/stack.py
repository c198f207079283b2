"""Layers over the residual stream: `x_BTD -> x_BTD`."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dougong.nn.attention import Attention, Cache
from dougong.nn.dropout import Dropout
from dougong.nn.mask import Mask, build_mask
from dougong.nn.position import Position, Rotation, Span


class Block(nn.Module):
    """One layer: attention, then feed-forward, each normalised before it is applied (Xiong et al. 2020)."""

    def __init__(self, *, residual: nn.Module, attention_norm: nn.Module, attention: Attention,
                 feed_forward_norm: nn.Module, feed_forward: nn.Module, dropout: float) -> None:
        super().__init__()
        self.residual = residual
        self.attention_norm, self.attention = attention_norm, attention
        self.feed_forward_norm, self.feed_forward = feed_forward_norm, feed_forward
        self.dropout = Dropout(dropout)

    def forward(self, x_BTD: Float[Tensor, "B T D"], x0_BTD: Float[Tensor, "B T D"], mask: Mask,
                rotation: Rotation | None = None, value_BTE: Float[Tensor, "B T E"] | None = None,
                cache: Cache | None = None) -> Float[Tensor, "B T D"]:
        x = self.residual(x_BTD, x0_BTD)
        x = self.dropout(self.attention(self.attention_norm(x), mask=mask, rotation=rotation, value_BTE=value_BTE,
                                        cache=cache), onto=x)
        return self.dropout(self.feed_forward(self.feed_forward_norm(x)), onto=x)


class PostNormBlock(Block):
    """The original placement (arXiv:1706.03762): each half is normalised after it is added."""

    def forward(self, x_BTD: Float[Tensor, "B T D"], x0_BTD: Float[Tensor, "B T D"], mask: Mask,
                rotation: Rotation | None = None, value_BTE: Float[Tensor, "B T E"] | None = None,
                cache: Cache | None = None) -> Float[Tensor, "B T D"]:
        x = self.residual(x_BTD, x0_BTD)
        x = self.attention_norm(self.dropout(self.attention(x, mask=mask, rotation=rotation, value_BTE=value_BTE,
                                                            cache=cache), onto=x))
        return self.feed_forward_norm(self.dropout(self.feed_forward(x), onto=x))


BLOCKS = {"pre": Block, "post": PostNormBlock}


class Stack(nn.ModuleDict):
    """Layers named "0", "1", …; `windows[i]` is how many keys layer i looks back on, None for all.

    `checkpoint_activations` (set by whoever assembles the run) keeps only each layer's input for the backward
    pass and computes the rest again (Chen et al. 2016, arXiv:1604.06174), with the same random numbers:
    gradients are bit-equal.
    """

    def __init__(self, layers: Sequence[Block], *, windows: Sequence[int | None]) -> None:
        super().__init__({str(i): layer for i, layer in enumerate(layers)})
        self.windows = tuple(windows)
        self.checkpoint_activations = False

    def forward(self, x_BTD: Float[Tensor, "B T D"], span: Span, position: Position, *,
                values: Mapping[str, Tensor] | None = None,
                cache: Cache | None = None) -> Float[Tensor, "B T D"]:
        rotation, seen = position.rotation(span, x_BTD.dtype), span.in_attention()
        bias = position.bias(seen)
        masks = {window: build_mask(seen, window=window, position_bias=bias, dtype=x_BTD.dtype)
                 for window in set(self.windows)}
        again = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        x0_BTD = x_BTD.view_as(x_BTD)   # another object, or compile takes the first layer for another kind
        for (name, block), window in zip(self.items(), self.windows, strict=True):
            inputs = (x_BTD, x0_BTD, masks[window], rotation, (values or {}).get(name), cache)
            x_BTD = checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)
        return x_BTD

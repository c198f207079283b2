"""Layers over the residual stream: `x_BTD -> x_BTD`."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

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
                rotation: Rotation | None = None, value_BTE: Float[Tensor, "B row E"] | None = None,
                cache: Cache | None = None, *, selective: bool = False) -> Float[Tensor, "B T D"]:
        """`selective`: all but products and attention is computed anew for the backward pass. In here, where a compiler
        of the layer sees it: what it makes writes products into memory of its own, and nobody outside can keep them."""
        inputs = (x_BTD, x0_BTD, mask, rotation, value_BTE, cache)
        return _selectively(self.halves, *inputs) if selective else self.halves(*inputs)

    def halves(self, x_BTD: Tensor, x0_BTD: Tensor, mask: Mask, rotation: Rotation | None, value_BTE: Tensor | None,
               cache: Cache | None) -> Tensor:
        x = self.residual(x_BTD, x0_BTD)
        x = self.dropout(self.attention(self.attention_norm(x), mask=mask, rotation=rotation, value_BTE=value_BTE,
                                        cache=cache), onto=x)
        return self.dropout(self.feed_forward(self.feed_forward_norm(x)), onto=x)


class PostNormBlock(Block):
    """The original placement (arXiv:1706.03762): each half is normalised after it is added."""

    def halves(self, x_BTD: Tensor, x0_BTD: Tensor, mask: Mask, rotation: Rotation | None, value_BTE: Tensor | None,
               cache: Cache | None) -> Tensor:
        x = self.residual(x_BTD, x0_BTD)
        x = self.attention_norm(self.dropout(self.attention(x, mask=mask, rotation=rotation, value_BTE=value_BTE,
                                                            cache=cache), onto=x))
        return self.feed_forward_norm(self.dropout(self.feed_forward(x), onto=x))


BLOCKS = {"pre": Block, "post": PostNormBlock}


Carry = tuple[Tensor, Tensor]
"""what travels from layer to layer: the stream and the embedded tokens it began with, B T D each"""

Checkpointing = Literal["none", "selective", "full"]
"""which activations a layer keeps for the backward pass: all, those of matrix products and attention, its input"""


class Stack(nn.ModuleDict):
    """Layers named "0", "1", …, of which some may be absent; `windows[i]` is how many keys layer i looks back on,
    None for all.

    `checkpoint_activations` (set by whoever assembles the run) lets layers keep less for the backward pass and compute
    it again (Chen et al. 2016, arXiv:1604.06174; selective: arXiv:2205.05198, section 5), with the same random numbers.
    """

    def __init__(self, layers: Sequence[Block], *, windows: Sequence[int | None]) -> None:
        super().__init__({str(i): layer for i, layer in enumerate(layers)})
        self.windows = {str(i): window for i, window in enumerate(windows)}
        self.checkpoint_activations: Checkpointing = "none"

    def forward(self, carry: Carry, span: Span, position: Position, *, values: Mapping[str, Tensor] | None = None,
                cache: Cache | None = None, layers: Collection[str] | None = None) -> Carry:
        """The carry after these layers (None: all that are here)."""
        x_BTD, x0_BTD = carry
        names = self.keys() if layers is None else layers
        rotation, seen = position.rotation(span, x_BTD.dtype), span.in_attention()
        bias = position.bias(seen)
        masks = {window: build_mask(seen, window=window, position_bias=bias, dtype=x_BTD.dtype)
                 for window in {self.windows[name] for name in names}}
        again = self.checkpoint_activations if self.training and torch.is_grad_enabled() else "none"
        first_BTD = x0_BTD.view_as(x0_BTD)   # another object, or compile takes the first layer for another kind
        for name in names:
            inputs = (x_BTD, first_BTD, masks[self.windows[name]], rotation, (values or {}).get(name), cache)
            if again == "full":     # around a compiled layer, since torch repeats no collectives within one
                x_BTD = checkpoint(self[name], *inputs, use_reentrant=False)
            else:
                x_BTD = self[name](*inputs, selective=again == "selective")
        return x_BTD, x0_BTD


_aten = torch.ops.aten
KEPT: set[Any] = {
    _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten._grouped_mm.default,
    _aten._scaled_mm.default, _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default, _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default, _aten._scaled_dot_product_attention_math.default}
"""whose results selective checkpointing keeps: the dear ones"""


def _policy(_context: Any, operation: Any, *_inputs: Any, **_options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_selectively: Callable[..., Any] = partial(
    checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _policy))

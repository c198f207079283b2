"""Context parallelism: every process holds a contiguous stretch of each row; keys and values (or heads) travel.

All but attention acts on each token alone, so two things change: `Decoder.span` says where this process's tokens stand,
and `Attention.kernel` lets their queries reach keys held elsewhere, in one of two ways:

- `gather`: every process gets all keys and values up to the end of its stretch. Any number of heads will do; the last
  stretch reads the most keys, so it sets the pace.
- `all_to_all` (DeepSpeed-Ulysses: Jacobs et al. 2023, arXiv:2309.14509): around attention, tokens are exchanged for
  heads, so that each process attends over whole rows with its share of the heads. Equal work; the heads must divide.

Packed documents, windows and positions are right because both see the row as it is, segments included. Ring attention
is left out: torch's knows neither documents nor windows, and it saves memory only where a layer's gathered keys would
not fit.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from jaxtyping import Float
from torch import Tensor

from dougong.core.errors import ConfigError
from dougong.data.batch import Batch
from dougong.models.compose import Decoder
from dougong.nn.attention import Attention, Cache
from dougong.nn.attention_kernels import Kernel, choose_kernel
from dougong.nn.mask import Mask
from dougong.nn.position import Span
from dougong.runtime.mesh import Mesh

_gather: Any = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd
"""renamed by PyTorch"""
CUT = ("tokens", "targets", "weight")
"""fields of a batch that follow the stretch; `segment` stays whole, as attention reads the row"""


def divide_context(model: Decoder, mesh: Mesh) -> None:
    """Makes `model` compute on this process's stretch of every row; nothing where `context` is 1.

    Its parameters stay as they are: replicated or sharded along `context` as along data, gradients summed.
    Raises ConfigError, with the reason, where the model cannot be divided so.
    """
    size, rank = mesh.size("context"), mesh.rank("context")
    if size == 1:
        return
    method = mesh.layout.context_method
    if reason := why_not_context(model.config, size, method, tensor=mesh.size("tensor")):
        raise ConfigError(reason)
    place, kernel = {"gather": (stretch, gathered), "all_to_all": (exchanged_stretch, exchanged)}[method]
    model.span = _placed(place, size, rank)  # type: ignore[method-assign]
    for module in model.modules():
        if isinstance(module, Attention):
            module.kernel = kernel(module.kernel, mesh.group("context"), size, rank)


def context_slice(batch: Batch, mesh: Mesh) -> Batch:
    """This process's stretch of every row of a batch (B T) -> (B T/context); `segment` is left whole."""
    size, rank = mesh.size("context"), mesh.rank("context")
    if size == 1:
        return batch
    T = batch["tokens"].shape[1]
    if T % size:
        raise ConfigError(f"rows of {T} tokens do not divide by layout.context={size}. Try "
                          f"layout.context={_largest_divisor(T, size)}, or rows of {T - T % size} tokens.")
    mine = slice(rank * (T // size), (rank + 1) * (T // size))
    return Batch(**{name: field[:, mine] if name in CUT else field for name, field in batch.items()})


def why_not_context(config: Any, context: int, method: str, tensor: int = 1) -> str | None:
    """Why rows of this model cannot be divided between `context` processes by this method; None if they can.

    `tensor` processes have shared the heads before.
    """
    if context == 1:
        return None
    if not hasattr(config, "decoder"):
        return (f"layout.context={context} divides rows of tokens, and model.kind={config.kind} reads none. "
                "Try layout.context=1.")
    section = config.decoder()
    if section.context and section.context % context:
        return (f"layout.context={context} does not divide model.context={section.context}: each process takes an "
                f"equal stretch. Try layout.context={_largest_divisor(section.context, context)}.")
    if method == "gather":
        return None
    num_heads, num_kv_heads = (max(1, heads // tensor) for heads in section.attention.heads(section.dim)[:2])
    each = f"num_heads={num_heads}, num_kv_heads={num_kv_heads}" + (" of each tensor process" if tensor > 1 else "")
    if num_heads % context or (num_kv_heads % context and context % num_kv_heads):
        return (f"layout.context={context} by all_to_all gives each process an equal share of the heads, and {each} do "
                "not divide so. Try layout.context_method=gather.")
    return None


def _largest_divisor(of: int, at_most: int) -> int:
    return next(d for d in range(min(of, at_most), 0, -1) if of % d == 0)


def _placed(place: Callable[..., Span], size: int, rank: int) -> Callable[..., Span]:
    """`Decoder.span` of a process that holds one stretch. A closure, since a copy of the model copies what it holds."""
    def span(tokens_BT: Tensor, segment_BS: Tensor | None, cache: Cache | None) -> Span:
        assert cache is None, "rows are divided in training; a cache belongs to generation"
        return place(tokens_BT, segment_BS, size, rank)
    return span


def stretch(tokens_BT: Tensor, segment_BS: Tensor | None, size: int, rank: int) -> Span:
    """Stretch `rank` of `size`: its queries read keys from the beginning of the row."""
    T = tokens_BT.shape[1]
    assert segment_BS is None or segment_BS.shape[1] == T * size, "segments are those of the whole row"
    return Span(T=T, device=tokens_BT.device, length=rank * T, segment_BS=segment_BS)


def exchanged_stretch(tokens_BT: Tensor, segment_BS: Tensor | None, size: int, rank: int) -> "ExchangedStretch":
    """Stretch `rank` of `size`, which meets the others in attention."""
    here = stretch(tokens_BT, segment_BS, size, rank)
    return ExchangedStretch(here.T, here.device, here.length, segment_BS=segment_BS, row=here.T * size)


@dataclass(frozen=True)
class ExchangedStretch(Span):
    """A stretch whose attention sees the whole row."""

    row: int = 0
    """tokens of the row"""

    def in_attention(self) -> Span:
        return Span(T=self.row, device=self.device, segment_BS=self.segment_BS)


def gathered(inner: Kernel | None, group: Any, size: int, rank: int) -> Kernel:
    """The queries of one stretch against the keys of all stretches up to it."""
    def kernel(q_BNTH: Float[Tensor, "B N T H"], k_BKTH: Float[Tensor, "B K T H"], v_BKTH: Float[Tensor, "B K T H"],
               mask: Mask, *, dropout: float = 0.0) -> Float[Tensor, "B N T H"]:
        pair = torch.stack([k_BKTH, v_BKTH])
        everything = _from_all(pair, group)                                     # (stretch, k or v, B, K, T, H)
        k_BKSH, v_BKSH = everything[:rank + 1].permute(1, 2, 3, 0, 4, 5).flatten(3, 4).unbind()
        return (inner or choose_kernel(q_BNTH, k_BKSH))(q_BNTH, k_BKSH, v_BKSH, mask, dropout=dropout)
    return kernel


def exchanged(inner: Kernel | None, group: Any, size: int, rank: int) -> Kernel:
    """Every process attends over whole rows with its share of the heads.

    Fewer key/value heads than processes are repeated: each process then holds the one its query heads read.
    """
    def kernel(q_BNTH: Float[Tensor, "B N T H"], k_BKTH: Float[Tensor, "B K T H"], v_BKTH: Float[Tensor, "B K T H"],
               mask: Mask, *, dropout: float = 0.0) -> Float[Tensor, "B N T H"]:
        if k_BKTH.shape[1] < size:
            k_BKTH, v_BKTH = (part.repeat_interleave(size // part.shape[1], dim=1) for part in (k_BKTH, v_BKTH))
        shares = [part.unflatten(1, (size, -1)) for part in (q_BNTH, k_BKTH, v_BKTH)]
        widths = [share.shape[2] for share in shares]
        sent = torch.cat(shares, dim=2).movedim(1, 0)                           # (to, B, heads, T, H)
        whole = _swap(sent, group).movedim(0, 2).flatten(2, 3)                  # (B, heads, from · T, H)
        q, k, v = whole.split(widths, dim=1)
        y = (inner or choose_kernel(q, k))(q, k, v, _of_heads(mask, widths[0], rank), dropout=dropout)
        return _swap(y.unflatten(2, (size, -1)).movedim(2, 0), group).movedim(0, 1).flatten(1, 2)
    return kernel


def _of_heads(mask: Mask, heads: int, rank: int) -> Mask:
    """The mask of this process's heads, where heads have their own (ALiBi)."""
    if mask.bias is None or mask.bias.shape[1] == 1:
        return mask
    return replace(mask, bias=mask.bias[:, rank * heads:(rank + 1) * heads])


def _from_all(part: Tensor, group: Any) -> Tensor:
    """(…) of each process as (process, …); its gradients are summed where they come from."""
    return _gather(part.contiguous()[None], 0, group)


def _swap(parts: Tensor, group: Any) -> Tensor:
    """(to, …) -> (from, …): part i goes to process i."""
    return collectives.all_to_all_single_autograd(parts.contiguous(), None, None, group)

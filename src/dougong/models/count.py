"""How large and how costly a model is, from its config alone: built on the meta device, so no weight exists.

Conventions. `matrices` are the parameters that multiply a token, the head included (also when it is the embedding over
again), the embedding look-up and experts that a token does not visit not. Training costs three forwards: the backward
pass forms two products for each one of the forward. A causal query reads half of the context on average.
"""

import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dougong.models.compose import Decoder, DecoderConfig
from dougong.models.stack import KEPT, Checkpointing
from dougong.nn.attention import Attention
from dougong.nn.attention_kernels import explicit
from dougong.nn.embedding import Embedding
from dougong.nn.mask import Mask
from dougong.nn.moe import MoE
from dougong.nn.position import Position


def parameters(config: Any) -> dict[str, Any]:
    """Exact parameter counts of a family config: `total`, `embedding`, `matrices`, `by_part`.

    `embedding` holds token, position and value tables. A tied head counts in `embedding` and in `matrices`,
    once in `total`. `by_part` sums over layers ("stack.attention") and adds up to `total`.
    """
    model = _on_meta(config)
    tables = [module for module in model.modules() if isinstance(module, Embedding | Position)]
    embedding = sum(p.numel() for table in tables for p in table.parameters(recurse=False))
    own = {id(p) for table in tables for p in table.parameters(recurse=False)}
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in own)
    if isinstance(model, Decoder) and config.decoder().tied:
        matrices += model.head.weight.numel()
    matrices -= _idle(model)
    by_part: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        by_part[_part(name)] += parameter.numel()
    return {"total": sum(by_part.values()), "embedding": embedding, "matrices": matrices,
            "by_part": dict(by_part)}


def active_parameters(config: Any) -> int:
    """Parameters that a token uses: all but those of the experts that it does not visit."""
    model = _on_meta(config)
    return sum(p.numel() for p in model.parameters()) - _idle(model)


def _idle(model: nn.Module) -> int:
    """Parameters of the experts that a token does not visit."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    return sum(stack.numel() // len(stack) * (len(stack) - layer.top_k)
               for layer in layers for stack in layer.experts.parameters())


def _part(name: str) -> str:
    """"stack.3.attention.query.weight" as "stack.attention"."""
    path = [word for word in name.split(".") if not re.fullmatch(r"\d+", word)]
    return ".".join(path[:2]) if path[0] == "stack" else path[0]


def flops_per_token(config: Any, context: int, *, adapter: int | None = None, whole: int = 0) -> int | None:
    """Floating-point operations of training on one token, in rows of `context`; None for models without
    tokens.

    6 · matrices, plus 12 · N · H per layer and key read: with full causal attention T/2 keys, so 6 · L · T ·
    N · H; with a window W < T, W - W²/(2T). Norms, activations and the optimiser are not counted, as in
    Kaplan et al. 2020 (arXiv:2001.08361, section 2.1). nanoGPT and PaLM count T keys instead of T/2. Where an `adapter`
    of so many parameters is trained, the matrices need no gradient: 4 · matrices, and 6 · adapter; and 2 more for each
    of `whole`, parameters of matrices that are trained beside it.
    """
    if not hasattr(config, "decoder"):
        return None
    section: DecoderConfig = config.decoder()
    width = _attention_width(section)
    keys = sum(context / 2 if window is None or window >= context else window - window**2 / (2 * context)
               for window in section.windows())
    matrices = parameters(config)["matrices"]
    products = 6 * matrices if adapter is None else 4 * matrices + 6 * adapter + 2 * whole
    return round(products + 12 * width * keys)


def forward_flops(config: Any, context: int) -> int:
    """Operations of the matrix products of one forward over one row, hidden keys included as the kernels
    without block skipping compute them: 2 · T · matrices + 4 · L · T² · N · H."""
    section: DecoderConfig = config.decoder()
    attention = 4 * (section.num_layers or 0) * context**2 * _attention_width(section)
    return 2 * context * parameters(config)["matrices"] + attention


def activation_bytes(config: Any, *, rows: int, context: int, dtype: torch.dtype = torch.float32,
                     fused_attention: bool = True, checkpoint_activations: Checkpointing = "none") -> int:
    """Bytes that the forward up to the last hidden state keeps for the backward pass; casts of weights
    included.

    Not a formula: the real forward runs on the meta device and every storage autograd keeps is counted once.
    The head and the loss come on top. `fused_attention` keeps queries, keys, values, output and a sum per
    query instead of the T × S scores. With full checkpointing, the inputs of all layers plus what one layer keeps;
    with selective, the products besides.
    """
    model = _on_meta(config)
    assert isinstance(model, Decoder), "only decoders have layers to count"
    model.compute_dtype = dtype
    for module in model.modules():
        if isinstance(module, Attention):
            module.kernel = _fused_stand_in if fused_attention else explicit
    tokens = torch.zeros(rows, context, dtype=torch.long, device="meta")
    everything = _kept_bytes(model, tokens)
    if checkpoint_activations == "none":
        return everything
    layers = config.decoder().num_layers
    stream = rows * context * config.decoder().dim * dtype.itemsize
    products = _product_bytes(model, tokens) if checkpoint_activations == "selective" else 0
    if products and fused_attention:    # the stand-in is no operation of PyTorch's
        products += layers * rows * context * _attention_width(config.decoder()) * dtype.itemsize
    return layers * stream + products + everything // layers


def _kept_bytes(model: Decoder, tokens: Tensor) -> int:
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage   # held, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden(tokens)
    del hidden
    return sum(storage.nbytes() for storage in kept.values())


def _product_bytes(model: Decoder, tokens: Tensor) -> int:
    """Bytes of the results that selective checkpointing keeps."""
    model.stack.checkpoint_activations = "selective"
    with Products() as products:
        hidden = model.hidden(tokens)
        total = products.alive()
    del hidden
    return total


class Products(TorchDispatchMode):
    """Watches the results of the operations that selective checkpointing keeps: autograd does not know of them."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, inputs: Any = (), options: Any = None) -> Any:
        result = operation(*inputs, **(options or {}))
        if operation in KEPT:
            for tensor in (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self) -> int:
        """Bytes of those results that someone still holds."""
        return sum(nbytes for storage, nbytes in self._storages.values() if not storage.expired())


class _FusedStandIn(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, log_sums = torch.empty_like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, y, log_sums)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("this stand-in only counts memory")


def _fused_stand_in(q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, dropout: float = 0.0) -> Tensor:
    return _FusedStandIn.apply(q, k, v)


def _attention_width(section: DecoderConfig) -> int:
    num_heads, _, head_dim = section.attention.heads(section.dim)
    return num_heads * head_dim


def _on_meta(config: Any) -> nn.Module:
    with torch.device("meta"):
        return config.build().train()

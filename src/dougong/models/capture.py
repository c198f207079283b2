"""What named parts of a model compute in a forward: their outputs, and where attention looks. No forward is edited."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dougong.core.errors import ConfigError, did_you_mean
from dougong.nn.attention import Attention
from dougong.nn.attention_kernels import choose_kernel
from dougong.nn.mask import Mask


def part(model: nn.Module, name: str) -> nn.Module:
    """The part of that name, such as `stack.3.attention`. Raises ConfigError with the nearest name."""
    parts = dict(model.named_modules())
    if not name or name not in parts:
        layers = sorted({known.rpartition(".")[0] for known in parts if "." in known} & parts.keys())
        raise ConfigError(f"the model has no part {name!r}.{did_you_mean(name, parts)}\n"
                          f"Parts with parts of their own: {', '.join(layers[:8])} …")
    return parts[name]


@contextmanager
def captured(model: nn.Module, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of these parts in the forward run inside the block, part of its graph."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise ConfigError(f"the part {name!r} computes no single tensor. Try one inside it, such as "
                                  "stack.0 or stack.0.attention.")
            found[name] = output
        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(part(model, name).register_forward_hook(keep(name)).remove)
        yield found


@contextmanager
def captured_attention(model: nn.Module, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """The attention weights (B T S, the mean over heads, fp32 or better) of these parts in the forward run inside the
    block, part of its graph. They are computed beside the kernel that serves, so T × S numbers exist for each part."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in names:
            attention = part(model, name)
            if not isinstance(attention, Attention):
                raise ConfigError(f"the part {name!r} is {type(attention).__name__}, not attention. "
                                  "Attention is called stack.0.attention, stack.1.attention, …")
            stack.callback(setattr, attention, "kernel", attention.kernel)
            attention.kernel = _watching(attention.kernel, name, found)
        yield found


def _watching(kernel: Any, name: str, found: dict[str, Tensor]) -> Any:
    def watched(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Mask, **options: Any) -> Tensor:
        found[name] = attention_weights(q_BNTH, k_BKSH, mask).mean(1)
        return (kernel or choose_kernel(q_BNTH, k_BKSH))(q_BNTH, k_BKSH, v_BKSH, mask, **options)
    return watched


def attention_weights(q_BNTH: Tensor, k_BKSH: Tensor, mask: Mask) -> Tensor:
    """softmax(q kᵀ / √H + mask), B N T S."""
    N, K = q_BNTH.shape[1], k_BKSH.shape[1]
    dtype = torch.promote_types(q_BNTH.dtype, torch.float32)
    k = k_BKSH if K == N else k_BKSH.repeat_interleave(N // K, dim=1)
    scores = q_BNTH.to(dtype) @ k.to(dtype).transpose(-1, -2) * q_BNTH.shape[-1] ** -0.5
    if mask.bias is not None:
        scores = scores + mask.bias.to(dtype)
    elif mask.causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu_(1), -torch.inf)
    return scores.softmax(-1)

"""Forms of the model's parts for decoding, where a token costs few large operations instead of many small
ones.

At one token a step the matrices are read once and little is computed, so the number of operations decides.
The engine owns a copy of the module tree; here some of its parts are replaced by parts that give the same
result: queries, keys and values from one product and normalised and turned together, gate and up from one
product, norms in one call. What has no such form (an architecture of your own, value embeddings) stays as it
is.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dougong.nn.attention import Attention, Cache
from dougong.nn.attention_kernels import choose_kernel
from dougong.nn.feed_forward import SwiGLU
from dougong.nn.linear import Linear
from dougong.nn.mask import Mask
from dougong.nn.norm import RMSNorm
from dougong.nn.position import Rotation, rotate


def fuse(model: nn.Module) -> nn.Module:
    """Replaces parts in place, by class; a subclass keeps its own forward."""
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if type(part) is Attention and part.value_gate is None:
                module._modules[name] = FusedAttention(part)
            elif type(part) is SwiGLU:
                module._modules[name] = FusedSwiGLU(part)
            elif type(part) is RMSNorm:
                module._modules[name] = FusedRMSNorm(part)
    return model


class Product(nn.Module):
    """The products of one input with several matrices, as one.

    A CPU multiplies a single fp32 vector faster when the matrix lies input by input, a batch when it lies
    output by output; so fp32 on a CPU keeps both, the first made when it is first needed.
    """

    def __init__(self, *parts: Linear) -> None:
        super().__init__()
        weights: list[Tensor] = [part.weight for part in parts]
        biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
        self.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        self.sizes = [part.out_features for part in parts]
        self._by_input: Tensor | None = None
        self._turns = self.weight.device.type == "cpu" and self.weight.dtype == torch.float32

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if not self._turns or x.numel() != x.shape[-1]:
            return F.linear(x, self.weight, self.bias)
        if self._by_input is None:
            self._by_input = self.weight.t().contiguous().t()
        return F.linear(x, self._by_input, self.bias)


class FusedRMSNorm(nn.Module):
    """`RMSNorm` in one call."""

    def __init__(self, part: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = part.weight, part.eps

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class FusedSwiGLU(nn.Module):
    """`SwiGLU` with gate and up as one product."""

    def __init__(self, part: SwiGLU) -> None:
        super().__init__()
        self.gate_up, self.down = Product(part.gate, part.up), Product(part.down)

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, -1)
        return self.down(F.silu(gate_BTF).mul_(up_BTF))


class FusedAttention(nn.Module):
    """`Attention` with one product for queries, keys and values; one new token attends in one call."""

    def __init__(self, part: Attention) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = part.num_heads, part.num_kv_heads, part.head_dim
        self.layer, self.kernel = part.layer, part.kernel
        self.query_key_value = Product(part.query, part.key, part.value)
        self.output = Product(part.output)
        self.norm_eps = part.query_norm.eps if isinstance(part.query_norm, RMSNorm) else None
        self.norm_scale: Tensor | None = None
        if isinstance(part.query_norm, RMSNorm) and part.query_norm.weight is not None:
            assert isinstance(part.key_norm, RMSNorm) and part.key_norm.weight is not None
            scales = [part.query_norm.weight.detach()] * self.num_heads
            scales += [part.key_norm.weight.detach()] * self.num_kv_heads
            self.norm_scale = torch.stack(scales)   # (N + K, H)

    def forward(self, x_BTD: Float[Tensor, "B T D"], *, mask: Mask, rotation: Rotation | None = None,
                value_BTE: None = None, cache: Cache | None = None) -> Float[Tensor, "B T D"]:
        N, K = self.num_heads, self.num_kv_heads
        heads_BTMH = self.query_key_value(x_BTD).unflatten(-1, (N + 2 * K, self.head_dim))
        qk_BTMH, v_BTKH = heads_BTMH.split([N + K, K], dim=2)
        if self.norm_eps is not None:
            qk_BTMH = F.rms_norm(qk_BTMH, (self.head_dim,), None, self.norm_eps)
            qk_BTMH = qk_BTMH if self.norm_scale is None else qk_BTMH * self.norm_scale
        if rotation is not None:
            qk_BTMH = rotate(qk_BTMH, rotation)
        q_BNTH, k_BKTH = qk_BTMH.transpose(1, 2).split([N, K], dim=1)
        v_BKTH = v_BTKH.transpose(1, 2)
        if cache is not None:
            k_BKTH, v_BKTH = cache.update(self.layer, k_BKTH, v_BKTH)
        return self.output(self._attend(q_BNTH, k_BKTH, v_BKTH, mask).transpose(1, 2).flatten(2))

    def _attend(self, q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Mask) -> Tensor:
        B, N, T, H = q_BNTH.shape
        per_head = mask.bias is not None and mask.bias.shape[1] > 1
        if T > 1 or self.kernel is not None or per_head:
            kernel = self.kernel or choose_kernel(q_BNTH, k_BKSH)
            return kernel(q_BNTH, k_BKSH, v_BKSH, mask)
        # With one token, the queries that share a key head are that head's queries: no keys are repeated.
        q_BKGH = q_BNTH.reshape(B, k_BKSH.shape[1], -1, H)
        return F.scaled_dot_product_attention(q_BKGH, k_BKSH, v_BKSH, attn_mask=mask.bias).reshape(B, N, 1, H)

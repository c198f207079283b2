"""Forms of the model's parts for decoding, where a token costs few large operations instead of many small ones.

On a CPU with a C compiler they read prompts and guesses, and decode what `program` has no form for; elsewhere all.

At one token a step the matrices are read once and little is computed, so the order of the matrices in memory and the
number of operations decide. The engine owns a copy of the module tree; here some of its parts are replaced by parts
that give the same result: queries, keys and values from one product and normalised and turned together, gate and up
from one product, norms in one call, matrices packed for the CPU. What has no such form (an architecture of your
own, value embeddings) stays as it is.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dougong.generate.lanes import Reading
from dougong.generate.packed import quantized_product
from dougong.models.heads import Head, QuantizedHead, TiedHead, soften
from dougong.nn.attention import Attention, Cache
from dougong.nn.attention_kernels import choose_kernel
from dougong.nn.feed_forward import FeedForward, SwiGLU
from dougong.nn.linear import Linear
from dougong.nn.mask import Mask
from dougong.nn.norm import RMSNorm
from dougong.nn.position import Rotation, rotate
from dougong.nn.quantized import Quantized
from dougong.runtime.device import multiplies_bf16

_LOADED = 16
"""bytes that CUDA's memory-efficient attention loads of a bias at once, from an address that must divide by them"""


def fuse(model: nn.Module) -> nn.Module:
    """Replaces parts in place, by class; a subclass keeps its own forward."""
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if type(part) is Attention and part.value_gate is None:
                module._modules[name] = FusedAttention(part)
            elif type(part) is SwiGLU:
                module._modules[name] = FusedSwiGLU(part)
            elif type(part) is FeedForward:
                module._modules[name] = FusedFeedForward(part)
            elif type(part) is RMSNorm:
                module._modules[name] = FusedRMSNorm(part)
            elif isinstance(part, Head | QuantizedHead | TiedHead):
                module._modules[name] = FusedHead(part)
    return model


class Product(nn.Module):
    """The products of one input with several matrices, as one.

    On a CPU the matrix lies in oneDNN's own order, made once. For 2304 x 768 on one thread that is 2.5 times as fast as
    the plain order for one row in bf16 and 1.6 times for 16 rows; in fp32 1.7 and 2.5 times.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias, requires_grad=False) if bias is not None else None
        self.packed: Tensor | None = None
        self.weight: nn.Parameter | None = None
        if weight.device.type == "cpu" and _can_pack(weight.dtype):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 1)
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self.packed is None:
            assert self.weight is not None
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.to(x.dtype), bias)
        rows = torch.ops.mkldnn._linear_pointwise(x.flatten(0, -2), self.packed, self.bias, "none", [], "")
        return rows.unflatten(0, x.shape[:-1])


def product_of(*parts: Linear | Quantized) -> nn.Module:
    """One product for all parts; either all of them have a bias or none has. Parts of floats and of integers that read
    the same input are multiplied apart."""
    if all(isinstance(part, Quantized) for part in parts):
        return quantized_product(*parts)  # type: ignore[arg-type]
    if any(isinstance(part, Quantized) for part in parts):
        return _SideBySide(*(product_of(part) for part in parts))
    biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]  # type: ignore[misc,union-attr]
    return Product(torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None)


class _SideBySide(nn.Module):
    def __init__(self, *products: nn.Module) -> None:
        super().__init__()
        self.products = nn.ModuleList(products)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return torch.cat([product(x) for product in self.products], -1)


def _can_pack(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has oneDNN's packed product (its compiler uses it too), the processor one of the dtype."""
    return (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and (dtype == torch.float32 or (dtype == torch.bfloat16 and multiplies_bf16())))


class FusedHead(nn.Module):
    """A head over a packed copy of its matrix."""

    def __init__(self, part: Head | QuantizedHead | TiedHead) -> None:
        super().__init__()
        table = part.embedding if isinstance(part, TiedHead) else part
        self.product = quantized_product(table) if isinstance(table, Quantized) else Product(table.weight.detach())
        self.soft_cap = part.soft_cap

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        return soften(self.product(x), self.soft_cap)


class FusedFeedForward(nn.Module):
    """`FeedForward` over packed matrices."""

    def __init__(self, part: FeedForward) -> None:
        super().__init__()
        self.up, self.activation, self.down = product_of(part.up), part.activation, product_of(part.down)

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.down(self.activation(self.up(x_BTD)))


class FusedRMSNorm(nn.Module):
    """`RMSNorm` in four operations; torch's own takes nine on a CPU.

    x / sqrt(mean x² + eps) = x √D / sqrt(|x|² + D eps), and the root is a hypotenuse.
    """

    def __init__(self, part: RMSNorm) -> None:
        super().__init__()
        weight = part.weight.detach() if part.weight is not None else None
        self._prepare(weight, part.dim, part.eps)

    def _prepare(self, weight: Tensor | None, dim: int, eps: float) -> None:
        wide = None if weight is None else weight.to(torch.promote_types(weight.dtype, torch.float32))
        self.scale = dim**0.5 if wide is None else wide * dim**0.5      # in bf16 the product would round once more
        self.floor = torch.tensor((dim * eps) ** 0.5, device=None if weight is None else weight.device)

    @classmethod
    def of(cls, weight: Tensor | None, dim: int, eps: float) -> "FusedRMSNorm":
        """With a scale of any shape that fits the input, such as one for each head."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._prepare(weight, dim, eps)
        return made

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        return x.div(torch.hypot(length, self.floor).to(x.dtype)).mul_(self.scale)


class FusedSwiGLU(nn.Module):
    """`SwiGLU` with gate and up as one product."""

    def __init__(self, part: SwiGLU) -> None:
        super().__init__()
        self.gate_up, self.down = product_of(part.gate, part.up), product_of(part.down)

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, -1)
        return self.down(F.silu(gate_BTF).mul_(up_BTF))


class FusedAttention(nn.Module):
    """`Attention` with one product for queries, keys and values; one new token attends in one call."""

    def __init__(self, part: Attention) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = part.num_heads, part.num_kv_heads, part.head_dim
        self.layer, self.kernel = part.layer, part.kernel
        self.query_key_value = product_of(part.query, part.key, part.value)
        self.output = product_of(part.output)
        self.norm: FusedRMSNorm | None = None
        if isinstance(part.query_norm, RMSNorm):
            scale_MH = None
            if part.query_norm.weight is not None:
                assert isinstance(part.key_norm, RMSNorm) and part.key_norm.weight is not None
                scales = [part.query_norm.weight.detach()] * self.num_heads
                scale_MH = torch.stack(scales + [part.key_norm.weight.detach()] * self.num_kv_heads)
            self.norm = FusedRMSNorm.of(scale_MH, self.head_dim, part.query_norm.eps)

    def forward(self, x_BTD: Float[Tensor, "B T D"], *, mask: Mask, rotation: Rotation | None = None,
                value_BTE: None = None, cache: Cache | None = None) -> Float[Tensor, "B T D"]:
        N, K = self.num_heads, self.num_kv_heads
        heads_BTMH = self.query_key_value(x_BTD).unflatten(-1, (N + 2 * K, self.head_dim))
        qk_BTMH, v_BTKH = heads_BTMH.split([N + K, K], dim=2)
        if self.norm is not None:
            qk_BTMH = self.norm(qk_BTMH)
        if rotation is not None:
            qk_BTMH = rotate(qk_BTMH, rotation)
        q_BNTH, k_BKTH = qk_BTMH.transpose(1, 2).split([N, K], dim=1)
        v_BKTH = v_BTKH.transpose(1, 2)
        if isinstance(cache, Reading) and len(cache.lanes) > 1:
            y_BNTH = self._attend_lanes(q_BNTH, cache.append(self.layer, k_BKTH, v_BKTH), mask)
            return self.output(y_BNTH.transpose(1, 2).flatten(2))
        if cache is not None:
            k_BKTH, v_BKTH = cache.update(self.layer, k_BKTH, v_BKTH)
        return self.output(self._attend(q_BNTH, k_BKTH, v_BKTH, mask).transpose(1, 2).flatten(2))

    def _attend_lanes(self, q_BNTH: Tensor, parts: list[tuple[slice, Tensor, Tensor]], mask: Mask) -> Tensor:
        """Each lane's rows with their own keys. All end in the same column, so a lane sees the end of the bias."""
        y = []
        for rows, k_bKSH, v_bKSH in parts:
            bias = mask.bias
            if bias is not None:
                bias = (bias if len(bias) == 1 else bias[rows])[..., -k_bKSH.shape[2]:]
                if bias.device.type == "cuda" and bias.storage_offset() * bias.element_size() % _LOADED:
                    bias = bias.clone()
            y.append(self._attend(q_BNTH[rows], k_bKSH, v_bKSH, Mask(causal=mask.causal, bias=bias)))
        return torch.cat(y)

    def _attend(self, q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Mask) -> Tensor:
        B, N, T, H = q_BNTH.shape
        if q_BNTH.device.type == "cuda" and k_BKSH.shape[2] > T and torch.backends.cuda.cudnn_sdp_enabled():
            with _without_cudnn():
                return self._attend(q_BNTH, k_BKSH, v_BKSH, mask)
        per_head = mask.bias is not None and mask.bias.shape[1] > 1
        if T > 1 or self.kernel is not None or per_head:
            kernel = self.kernel or choose_kernel(q_BNTH, k_BKSH)
            return kernel(q_BNTH, k_BKSH, v_BKSH, mask)
        # With one token, the queries that share a key head are that head's queries: no keys are repeated.
        q_BKGH = q_BNTH.reshape(B, k_BKSH.shape[1], -1, H)
        on_cpu = q_BKGH.dtype == torch.bfloat16 and q_BKGH.device.type == "cpu"
        attend = _one_query if on_cpu else F.scaled_dot_product_attention
        return attend(q_BKGH, k_BKSH, v_BKSH, attn_mask=mask.bias).reshape(B, N, 1, H)


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    """Attention by PyTorch's flash, memory-efficient or plain form, for what continues a text. On an H100 or H200 it
    prefers cuDNN, which makes a plan for each shape, and here every token makes the keys longer by one. What
    `torch.nn.attention.sdpa_kernel` does by all its switches, at each layer and token, this does by one."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def _one_query(q_BKGH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, *, attn_mask: Tensor | None) -> Tensor:
    """Attention of one new bf16 token (G query heads to a key head) as two batched products over whole stores.

    A product over a slice of the store costs many times one over the store, whose matrices lie side by side: 16 rows, 6
    heads of 128, one thread, 500 of 512 columns: 7.1 ms sliced, 1.0 whole; 130 of 192: 0.8 and 0.3. So all columns are
    multiplied and those outside the slice left out between the products; the store holds zeros there or what was read
    before, never NaN. Of a store that is mostly empty the slice is copied.
    """
    (keys, begin), (values, _) = _store_of(k_BKSH), _store_of(v_BKSH)
    width, S = keys.shape[2], k_BKSH.shape[2]
    scores_BKGS = torch.bmm((q_BKGH * q_BKGH.shape[-1] ** -0.5).flatten(0, 1), keys.flatten(0, 1).transpose(1, 2))
    scores_BKGS = scores_BKGS[..., begin:begin + S].unflatten(0, q_BKGH.shape[:2])
    weights_BKGS = (scores_BKGS if attn_mask is None else scores_BKGS + attn_mask).softmax(-1)
    weights = F.pad(weights_BKGS, (begin, width - begin - S)) if width != S else weights_BKGS
    return torch.bmm(weights.flatten(0, 1), values.flatten(0, 1)).unflatten(0, q_BKGH.shape[:2])


def _store_of(slice_BKSH: Tensor) -> tuple[Tensor, int]:
    """The cache's store of which this is the slice of some columns, and the first of them."""
    B, K, S, H = slice_BKSH.shape
    width = slice_BKSH.stride(1) // H
    if slice_BKSH.stride() != (K * width * H, width * H, H, 1) or width > 3 * S:
        return slice_BKSH.contiguous(), 0
    offset = int(slice_BKSH.storage_offset())
    begin = offset // H % width
    return slice_BKSH.as_strided((B, K, width, H), slice_BKSH.stride(), offset - begin * H), begin

"""A decoder's step for one new token as a list of operations, which C runs in one call (`one_token.c`).

Started from Python one by one, the sixty small operations of a layer cost more than its arithmetic: of the 17 ms that a
token took a model of 91M with weights of 4 bits, the matrices took 5. The list is made once from the model's own parts
and weights; from token to token only where the cache lies and how far it is filled change.

Everything is computed in float32, whatever the weights are. What has no such form (`Program.of` returns None) is
computed part by part as before: experts, value embeddings, activations of 8 bits, widths that the vectors do not fit,
an architecture of your own.
"""

import ctypes
import threading
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dougong.generate.cache import Columns
from dougong.generate.native import KINDS, Operation, Place, library
from dougong.models.heads import Head, QuantizedHead, TiedHead, soften
from dougong.models.stack import Block, PostNormBlock
from dougong.nn.attention import Attention
from dougong.nn.embedding import Embedding
from dougong.nn.feed_forward import FeedForward, ReLU2, SwiGLU
from dougong.nn.linear import Linear
from dougong.nn.norm import LayerNorm, RMSNorm
from dougong.nn.position import ALiBi, RoPEALiBi, Span
from dougong.nn.quantized import Quantized
from dougong.nn.residual import PlainResidual, X0Residual
from dougong.runtime.device import memory_bytes

_MEMORY = 0.25     # of the machine's, that a second copy of the matrices may take: `fused` packs the first


class NoForm(Exception):
    """A part that no operation computes."""


class Program:
    """The list for one model, and the vectors it works on."""

    def __init__(self, model: Any) -> None:
        """Raises NoForm."""
        opened = library()
        if opened is None:
            raise NoForm
        self._model, self._library, self._lanes, self._lock = model, opened, opened.lanes(), threading.Lock()
        self._operations: list[Operation] = []
        self._held: list[Tensor | None] = []
        self._places: list[tuple[int, int, int]] = []      # layer, and its operations that know where the cache lies
        self._x0 = self._vector(model.config.decoder().dim)
        x = self._x0
        for name, layer in model.stack.items():
            x = self._layer(layer, x, window=model.stack.windows[name])
        self._head(model, x)
        self._list = (Operation * len(self._operations))(*self._operations)
        self._stores: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, model: Any) -> "Program | None":
        """None where there is no library, or where a part of the model has no form in it."""
        parts = (getattr(model, name, None) for name in ("stem", "stack", "norm", "head", "position", "config"))
        if library() is None or any(part is None for part in parts) or not hasattr(model.config, "decoder"):
            return None
        floats = sum(parameter.nbytes for parameter in model.parameters() if parameter.dim() > 1)
        if floats > _MEMORY * memory_bytes() or model.stem.values:
            return None
        try:
            return cls(model)
        except NoForm:
            return None

    def __call__(self, tokens_11: Int[Tensor, "1 1"], columns: Columns, length: int) -> Float[Tensor, "1 V"]:
        """Logits after one more token, whose keys and values the cache then holds; `length` tokens were before it."""
        span = Span(T=1, device=tokens_11.device, length=length)
        x = self._model.stem(tokens_11, self._model.position.embed(span), torch.float32)
        place = Place(columns.begin, columns.end + 1)
        rotation = self._model.position.rotation(span, torch.float32)
        if rotation is not None:
            place.cos, place.sin = (part.data_ptr() for part in rotation)
        with self._lock:
            self._x0.copy_(x.flatten())
            self._point(columns)
            self._library.run(self._list, len(self._list), ctypes.byref(place), torch.get_num_threads())
            logits_1V = self._logits.clone()[None]
        return soften(logits_1V, self._soft_cap)

    def _point(self, columns: Columns) -> None:
        """Lets the operations read where the cache lies now."""
        stores = tuple(store for layer, _, _ in self._places for store in (columns.keys[layer], columns.values[layer]))
        if len(stores) == len(self._stores) and all(a is b for a, b in zip(stores, self._stores)):
            return
        self._stores = stores
        for (_, append, attend), keys, values in zip(self._places, stores[0::2], stores[1::2]):
            if not (keys.is_contiguous() and values.is_contiguous() and keys.dtype in KINDS):
                raise AssertionError("a cache's stores lie in one piece, in float32 or bfloat16")
            for index, width_at in ((append, 2), (attend, 3)):
                operation = self._list[index]
                operation.b, operation.c = keys.data_ptr(), values.data_ptr()
                operation.kind, operation.n[width_at] = KINDS[keys.dtype], keys.shape[2]

    # The list.

    def _layer(self, layer: Any, x: Tensor, window: int | None) -> Tensor:
        if type(layer) not in (Block, PostNormBlock):
            raise NoForm
        before = type(layer) is Block
        x = self._residual(layer.residual, x)
        y = self._attention(layer.attention, self._norm(layer.attention_norm, x) if before else x, window)
        x = self._add(x, y)
        x = x if before else self._norm(layer.attention_norm, x)
        y = self._feed_forward(layer.feed_forward, self._norm(layer.feed_forward_norm, x) if before else x)
        x = self._add(x, y)
        return x if before else self._norm(layer.feed_forward_norm, x)

    def _head(self, model: Any, x: Tensor) -> None:
        head = model.head
        if type(head) not in (Head, QuantizedHead, TiedHead):
            raise NoForm
        x = self._norm(model.norm, x)
        self._logits = self._product(x, head.embedding if type(head) is TiedHead else head)
        self._soft_cap: float | None = head.soft_cap

    def _residual(self, part: Any, x: Tensor) -> Tensor:
        if type(part) is PlainResidual:
            return x
        if type(part) is not X0Residual:
            raise NoForm
        factors = [self._keep(factor.detach().float().reshape(1)) for factor in (part.carry, part.origin)]
        return self._each("mix", [x, self._x0, *factors], len(x))

    def _norm(self, part: Any, x: Tensor) -> Tensor:
        if type(part) is nn.Identity:
            return x
        if type(part) not in (RMSNorm, LayerNorm):
            raise NoForm
        name = "rms_norm" if type(part) is RMSNorm else "layer_norm"
        weights = [self._floats(getattr(part, key, None)) for key in ("weight", "bias")]
        return self._write(name, [x, *weights], len(x), len(x), real=part.eps)

    def _attention(self, part: Any, x: Tensor, window: int | None) -> Tensor:
        if type(part) is not Attention or part.value_gate is not None or part.kernel is not None:
            raise NoForm
        N, K, H = part.num_heads, part.num_kv_heads, part.head_dim
        if H % (2 * self._lanes):
            raise NoForm
        heads = self._vector((N + 2 * K) * H)
        self._products(x, (part.query, part.key, part.value), heads)
        position, normalised = self._model.position, type(part.query_norm) is RMSNorm
        turned = position.rotation(Span(T=1, device=heads.device), torch.float32) is not None
        if normalised or turned:
            weights = [self._floats(getattr(norm, "weight", None)) for norm in (part.query_norm, part.key_norm)]
            self._do("heads", [None, *weights], heads, N, K, H, normalised, turned,
                     real=part.query_norm.eps if normalised else 0.0)
        self._do("append", [heads[N * H:]], None, K, H)
        slopes = None
        if isinstance(position, ALiBi | RoPEALiBi):
            slopes = self._keep(torch.tensor(position.slopes, dtype=torch.float32))
        y = self._write("attend", [heads, None, None, slopes], N * H, N, K, H, 0, window or 0)
        self._places.append((part.layer, len(self._operations) - 2, len(self._operations) - 1))
        return self._product(y, part.output)

    def _feed_forward(self, part: Any, x: Tensor) -> Tensor:
        if type(part) is SwiGLU:
            width = part.gate.out_features
            gate_up = self._vector(2 * width)
            self._products(x, (part.gate, part.up), gate_up)
            return self._product(self._each("gate", [gate_up, gate_up[width:]], width), part.down)
        if type(part) is not FeedForward:
            raise NoForm
        kind = type(part.activation)
        if kind is not ReLU2 and kind is not nn.GELU:
            raise NoForm
        name = "relu2" if kind is ReLU2 else "gelu_tanh" if part.activation.approximate == "tanh" else "gelu"
        y = self._product(x, part.up)
        return self._product(self._each(name, [y], len(y)), part.down)

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._each("add", [x, y], len(x))

    def _product(self, x: Tensor, part: Any) -> Tensor:
        return self._products(x, (part,), self._vector(len(_matrix_of(part)[0])))

    def _products(self, x: Tensor, parts: tuple[Any, ...], y: Tensor) -> Tensor:
        """The products of x with several matrices, after one another in y."""
        forms = [_matrix_of(part) for part in parts]
        in_order = x
        if any(form == 4 for _, _, form, _ in forms):
            in_order = self._write("sorted", [x], len(x), len(x))
        at = 0
        for index, (part, (matrix, scale, form, group)) in enumerate(zip(parts, forms)):
            group = group or len(x)
            if len(x) % group or group % (self._lanes * (2 if form == 4 else 1)):
                raise NoForm
            self._keep(matrix, scale)
            bias, rows = self._floats(getattr(part, "bias", None)), len(matrix)
            self._do("product", [in_order if form == 4 else x, matrix, scale, bias], y[at:], rows, len(x), group,
                     kind=KINDS[form], together=index + 1 < len(parts))
            at += rows
        return y

    def _each(self, name: str, reads: list[Tensor], width: int) -> Tensor:
        return self._write(name, reads, width, width)

    def _write(self, name: str, reads: list[Tensor | None] | list[Tensor], width: int, *numbers: int,
               real: float = 0.0) -> Tensor:
        y = self._vector(width)
        self._do(name, reads, y, *numbers, real=real)
        return y

    def _do(self, name: str, reads: Any, writes: Tensor | None, *numbers: int, **more: Any) -> None:
        self._operations.append(Operation.of(name, reads, writes, *numbers, **more))

    def _vector(self, width: int) -> Tensor:
        return self._keep(torch.zeros(width))

    def _floats(self, weight: Tensor | None) -> Tensor | None:
        return None if weight is None else self._keep(weight.detach().float().contiguous())

    def _keep(self, *tensors: Tensor | None) -> Any:
        """Operations hold addresses: the tensors live as long as the program."""
        self._held += tensors
        return tensors[0]


def _matrix_of(part: Any) -> tuple[Tensor, Tensor | None, Any, int | None]:
    """The matrix as it is stored, its scales, its form (a dtype or bits), and how many columns share a scale."""
    if isinstance(part, Quantized):
        if part.activations != "float":
            raise NoForm
        return part.values.contiguous(), part.scale.contiguous(), part.bits, part.group
    if type(part) not in (Linear, Head, Embedding) or part.weight.dtype not in KINDS:
        raise NoForm
    return part.weight.detach().contiguous(), None, part.weight.dtype, None

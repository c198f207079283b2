"""A decoder's step for the next token of a few texts as a list of operations, which C runs in one call (`one_token.c`).

Started from Python one by one, the sixty small operations of a layer cost more than its arithmetic: of the 17 ms that a
token took a model of 91M with weights of 4 bits, the matrices took 5. The list is made once from the model's own parts
and weights; from token to token only where the cache lies and how far it is filled change.

Everything is computed in float32, whatever the weights are. What has no such form (`Program.of` returns None) is
computed part by part as before: experts, value embeddings, activations of 8 bits, widths that the vectors do not fit,
an architecture of your own.
"""

import operator
import threading
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dougong.generate.cache import Columns
from dougong.generate.native import KINDS, Operation, Place, library
from dougong.models.compose import Decoder
from dougong.models.heads import Head, QuantizedHead, TiedHead, soften
from dougong.models.stack import Block, PostNormBlock
from dougong.nn.attention import Attention
from dougong.nn.embedding import Embedding
from dougong.nn.feed_forward import FeedForward, ReLU2, SwiGLU
from dougong.nn.linear import Linear
from dougong.nn.norm import LayerNorm, RMSNorm
from dougong.nn.position import ALiBi, LearnedPosition, Position, RoPE, RoPEALiBi, Sinusoidal, Span
from dougong.nn.quantized import Quantized
from dougong.nn.residual import PlainResidual, X0Residual
from dougong.runtime.device import memory_bytes, multiplies_bf16

MOST = 32          # texts at a time: with more, PyTorch's products are as fast
_POSITIONS = (Position, LearnedPosition, Sinusoidal, RoPE, ALiBi, RoPEALiBi)
_FLOAT_BYTES = 4
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
        self.most = MOST
        """texts at a time up to which this is the fastest way"""
        self._vectors: dict[str, Tensor] = {}
        self._readers: list[int] = []               # operations that read the cache
        self._layers: list[int] = [layer.attention.layer for layer in model.stack.values()]
        self._where = torch.zeros(len(self._layers), 2, MOST, dtype=torch.int64)     # addresses of keys, of values
        self._x0 = self._vector("embedded", model.config.decoder().dim)
        x = self._x0
        for name, layer in model.stack.items():
            x = self._layer(layer, x, window=model.stack.windows[name])
        self._head(model, x)
        self._list = (Operation * len(self._operations))(*self._operations)
        self._places = (Place * MOST)()
        self._stores: list[Tensor] = []             # what `_where` was made from
        self._rows: list[int] = []

    @classmethod
    def of(cls, model: Any) -> "Program | None":
        """None where there is no library, or where a part of the model has no form in it."""
        if library() is None or type(model) is not Decoder:
            return None
        if type(model.position) not in _POSITIONS or model.stem.values:
            return None
        if sum(parameter.nbytes for parameter in model.parameters()) > _MEMORY * memory_bytes():
            return None
        try:
            return cls(model)
        except NoForm:
            return None

    def __call__(self, tokens_B1: Int[Tensor, "B 1"], columns: Sequence[Columns], span: Span) -> Float[Tensor, "B V"]:
        """Logits after one more token of each text, at most `most`; the cache then holds their keys and values. `span`
        is where these tokens stand, `columns` where the cache keeps the texts in turn."""
        x_B1D = self._model.stem(tokens_B1, self._model.position.embed(span), torch.float32)
        rotation, texts = self._model.position.rotation(span, torch.float32), len(tokens_B1)
        with self._lock:
            self._x0[:texts].copy_(x_B1D.squeeze(1))
            self._find(columns)
            each = [(part, begin) for part in columns for begin in part.begins]
            for place, (part, begin) in zip(self._places, each):
                place.begin, place.end, place.width = begin, part.end + 1, part.width
            if rotation is not None:
                cos, sin = (part.contiguous() for part in rotation)
                step = cos.stride(0) * _FLOAT_BYTES if cos.dim() == 3 else 0
                for text in range(texts):
                    self._places[text].cos = cos.data_ptr() + text * step
                    self._places[text].sin = sin.data_ptr() + text * step
            self._library.run(self._list, len(self._list), self._places, texts, torch.get_num_threads())
            logits_BV = self._logits[:texts].clone()
        return soften(logits_BV, self._soft_cap)

    def _find(self, columns: Sequence[Columns]) -> None:
        """Notes where the cache keeps each text's keys and values now."""
        stores = [part.keys[layer] for part in columns for layer in self._layers]
        rows = [len(part.begins) for part in columns]
        if rows == self._rows and len(stores) == len(self._stores) and all(map(operator.is_, stores, self._stores)):
            return
        at = 0
        for part, count in zip(columns, rows):
            for index, layer in enumerate(self._layers):
                for which, store in enumerate((part.keys[layer], part.values[layer])):
                    assert store.is_contiguous() and store.dtype in KINDS, "a store lies in one piece, float32 or bf16"
                    step = store.stride(0) * store.element_size()
                    self._where[index, which, at:at + count] = store.data_ptr() + step * torch.arange(count)
            at += count
        for reader in self._readers:
            self._list[reader].kind = KINDS[stores[0].dtype]
        self._stores, self._rows = stores, rows

    # The list.

    def _layer(self, layer: Any, x: Tensor, window: int | None) -> Tensor:
        if type(layer) not in (Block, PostNormBlock):
            raise NoForm
        before = type(layer) is Block
        x = self._residual(layer.residual, x)
        y = self._attention(layer.attention, self._norm(layer.attention_norm, x) if before else x, window)
        x = self._add(x, y)
        x = x if before else self._norm(layer.attention_norm, x, "stream")
        y = self._feed_forward(layer.feed_forward, self._norm(layer.feed_forward_norm, x) if before else x)
        x = self._add(x, y)
        return x if before else self._norm(layer.feed_forward_norm, x, "stream")

    def _head(self, model: Any, x: Tensor) -> None:
        head = model.head
        if type(head) not in (Head, QuantizedHead, TiedHead):
            raise NoForm
        x = self._norm(model.norm, x)
        self._logits = self._products(x, (head.embedding if type(head) is TiedHead else head,), "logits")
        self._soft_cap: float | None = head.soft_cap

    def _residual(self, part: Any, x: Tensor) -> Tensor:
        if type(part) is PlainResidual:
            return x
        if type(part) is not X0Residual:
            raise NoForm
        factors = [self._keep(factor.detach().float().reshape(1)) for factor in (part.carry, part.origin)]
        return self._each("mix", [x, self._x0, *factors], "stream")

    def _norm(self, part: Any, x: Tensor, into: str = "normalised") -> Tensor:
        if type(part) is nn.Identity:
            return x
        if type(part) not in (RMSNorm, LayerNorm):
            raise NoForm
        name, width = "rms_norm" if type(part) is RMSNorm else "layer_norm", x.shape[1]
        weights = [self._floats(getattr(part, key, None)) for key in ("weight", "bias")]
        return self._do(name, [x, *weights], self._vector(into, width), width, real=part.eps)

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._each("add", [x, y], "stream")

    def _attention(self, part: Any, x: Tensor, window: int | None) -> Tensor:
        if type(part) is not Attention or part.value_gate is not None or part.kernel is not None:
            raise NoForm
        N, K, H = part.num_heads, part.num_kv_heads, part.head_dim
        if H % (2 * self._lanes):
            raise NoForm
        heads = self._products(x, (part.query, part.key, part.value), "heads")
        if {type(part.query_norm), type(part.key_norm)} - {RMSNorm, nn.Identity}:
            raise NoForm
        position, normalised = self._model.position, type(part.query_norm) is RMSNorm
        turned = position.rotation(Span(T=1, device=heads.device), torch.float32) is not None
        if normalised or turned:
            weights = [self._floats(getattr(norm, "weight", None)) for norm in (part.query_norm, part.key_norm)]
            self._do("heads", [None, *weights], heads, N, K, H, normalised, turned,
                     real=part.query_norm.eps if normalised else 0.0)
        keys, values = self._where[self._layers.index(part.layer)]
        self._do("append", [heads[:, N * H:], keys, values], None, K, H)
        slopes = None
        if isinstance(position, ALiBi | RoPEALiBi):
            slopes = self._keep(torch.tensor(position.slopes, dtype=torch.float32))
        y = self._do("attend", [heads, keys, values, slopes], self._vector("attended", N * H), N, K, H, window or 0)
        self._readers += [len(self._operations) - 2, len(self._operations) - 1]
        return self._products(y, (part.output,), "added")

    def _feed_forward(self, part: Any, x: Tensor) -> Tensor:
        if type(part) is SwiGLU:
            both = self._products(x, (part.gate, part.up), "inner")
            width = part.gate.out_features
            y = self._each("gate", [both[:, :width], both[:, width:]], "gated")
            return self._products(y, (part.down,), "added")
        if type(part) is not FeedForward:
            raise NoForm
        kind = type(part.activation)
        if kind is not ReLU2 and kind is not nn.GELU:
            raise NoForm
        name = "relu2" if kind is ReLU2 else "gelu_tanh" if part.activation.approximate == "tanh" else "gelu"
        y = self._each(name, [self._products(x, (part.up,), "inner")], "gated")
        return self._products(y, (part.down,), "added")

    def _products(self, x: Tensor, parts: tuple[Any, ...], into: str) -> Tensor:
        """The products of x with several matrices, after one another in one vector."""
        forms, inputs = [_matrix_of(part) for part in parts], x.shape[1]
        y = self._vector(into, sum(len(matrix) for matrix, _, _, _ in forms))
        in_order = x
        if any(form == 4 for _, _, form, _ in forms):
            in_order = self._do("sorted", [x], self._vector("sorted", inputs), inputs)
        at = 0
        for part, (matrix, scale, form, group) in zip(parts, forms):
            group = group or inputs
            if inputs % group or group % (self._lanes * (2 if form == 4 else 1)):
                raise NoForm
            if form == torch.bfloat16 and multiplies_bf16():
                self.most = 1
            self._keep(matrix, scale)
            bias = self._floats(getattr(part, "bias", None))
            self._do("product", [in_order if form == 4 else x, matrix, scale, bias], y[:, at:], len(matrix), inputs,
                     group, kind=KINDS[form], together=part is not parts[-1])
            at += len(matrix)
        return y

    def _each(self, name: str, reads: list[Any], into: str) -> Tensor:
        width = reads[0].shape[1]
        return self._do(name, reads, self._vector(into, width), width)

    def _do(self, name: str, reads: list[Any], writes: Any, *numbers: int, **more: Any) -> Any:
        self._operations.append(Operation.of(name, reads, writes, *numbers, **more))
        return writes

    def _vector(self, name: str, width: int) -> Tensor:
        """One for each text; layers that follow one another use the same."""
        name = f"{name} {width}"
        if name not in self._vectors:
            self._vectors[name] = torch.zeros(MOST, width)
        return self._vectors[name]

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

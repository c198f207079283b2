"""Tensor parallelism: every matrix product shared by the processes along `tensor` (Megatron-LM: arXiv:1909.08053).

Queries, keys, values and the first matrices of the feed-forward are cut along their outputs (each process computes some
heads, some inner channels), the matrices that write to the stream along their inputs, so that one sum per half of a
layer is all that is exchanged. With sequence parallelism (arXiv:2205.05198) the stream lies in parts along the tokens
between the halves: it is gathered before a half and summed into parts after it, which costs the same messages and
divides norms, residuals and their activations too.

Weights become DTensors, which say to FSDP, checkpoints and norms how they lie; the products take their local parts, and
so do not pay for DTensor's dispatch. What stays whole but sees only some tokens or heads (norms in the stack, norms of
queries and keys, keys and values shared by several processes) has only a part of its gradient on each process:
`divide_matrices` returns these names, to be summed once a step.

Dropout draws different numbers on each process, which is right where activations lie in parts (along tokens or heads);
where they are whole on every process it would be wrong, so dropout of the stream asks for sequence parallelism.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dougong.core.errors import ConfigError
from dougong.nn.attention import Attention
from dougong.nn.dropout import Dropout, dropout
from dougong.nn.embedding import Embedding
from dougong.nn.feed_forward import FeedForward, SwiGLU
from dougong.nn.linear import Linear
from dougong.nn.mask import Mask
from dougong.runtime.layout import LayoutConfig
from dougong.runtime.mesh import Mesh

Kind = Literal["gather", "scatter", "sum", "slice", "nothing"]
_gather: Any = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
_scatter: Any = getattr(collectives, "reduce_scatter_single", None) or collectives.reduce_scatter_tensor
"""renamed by PyTorch"""


def why_not_tensor(config: Any, layout: LayoutConfig) -> str | None:
    """Why the model of this config cannot be shared by `layout.tensor` processes so; None if it can."""
    size = layout.tensor
    if size == 1:
        return None
    if not hasattr(config, "decoder"):
        return f"layout.tensor={size} divides the layers of a decoder, and model.kind={config.kind} is none."
    section = config.decoder()
    num_heads, num_kv_heads, _ = section.attention.heads(section.dim)
    if num_heads % size:
        return (f"layout.tensor={size} does not divide num_heads={num_heads}: each process computes whole heads.\n"
                f"Try layout.tensor={math.gcd(size, num_heads)}.")
    if num_kv_heads % size and size % num_kv_heads:
        return (f"layout.tensor={size} and num_kv_heads={num_kv_heads}: one must divide the other, so that key/value "
                "heads are divided or shared evenly.")
    if section.feed_forward.kind == "moe":
        return (f"layout.tensor={size} divides dense feed-forwards, and this model's is a mixture of experts.\n"
                "Try layout.expert, which gives each process some of the experts.")
    if section.feed_forward.width(section.dim) % size:
        width = section.feed_forward.width(section.dim)
        return f"layout.tensor={size} does not divide ffn_dim={width}.\nTry layout.tensor={math.gcd(size, width)}."
    if layout.vocabulary_parallel and section.vocab_size and section.vocab_size % size:
        return (f"layout.tensor={size} does not divide vocab_size={section.vocab_size}.\n"
                "Try layout.vocabulary_parallel=false, or a vocabulary that it divides.")
    stretch = layout.context * size
    if layout.sequence_parallel and section.context and section.context % stretch:
        return (f"rows of context={section.context} tokens do not divide into {stretch} parts (layout.context x "
                "layout.tensor).\nTry layout.sequence_parallel=false.")
    if not layout.sequence_parallel and (section.dropout or section.embedding_dropout):
        return ("dropout of the stream must be the same on all processes along tensor, which only "
                "layout.sequence_parallel=true spares.\nTry that, or dropout=0 and embedding_dropout=0.")
    return None


@dataclass(frozen=True)
class Team:
    """The processes that share each product, and how activations pass between the whole and its parts."""

    mesh: DeviceMesh
    group: Any
    size: int
    rank: int
    sequence: bool
    """whether the stream lies in parts along the tokens"""

    def enter(self, x: Tensor) -> Tensor:
        """The stream -> all its tokens, of which every process then computes something different."""
        return self._move(x, "gather", "scatter") if self.sequence else self._move(x, "nothing", "sum")

    def leave(self, x: Tensor) -> Tensor:
        """Summands of all tokens -> the stream."""
        return self._move(x, "scatter", "gather") if self.sequence else self._move(x, "sum", "nothing")

    def split(self, x: Tensor) -> Tensor:
        """All tokens, alike on every process -> the stream."""
        if not self.sequence:
            return x
        if x.shape[1] % self.size:
            raise ConfigError(f"rows of {x.shape[1]} tokens do not divide by layout.tensor={self.size}.\n"
                              "Try layout.sequence_parallel=false.")
        return self._move(x, "slice", "gather")

    def join(self, x: Tensor) -> Tensor:
        """The stream -> all tokens, of which every process then computes the same."""
        return self._move(x, "gather", "slice") if self.sequence else x

    def add_up(self, x: Tensor) -> Tensor:
        """Summands, one on each process -> their sum on all."""
        return self._move(x, "sum", "nothing")

    def concatenate(self, x: Tensor) -> Tensor:
        """Parts of the last axis -> the whole on every process. Not differentiable."""
        return collectives.wait_tensor(_gather(x.detach().contiguous(), x.ndim - 1, self.group))

    def _move(self, x: Tensor, there: Kind, back: Kind) -> Tensor:
        return _Move.apply(x, there, back, self.group, self.size, self.rank)  # type: ignore[return-value]


class _Move(torch.autograd.Function):
    """An exchange along the tokens (dim 1) of (B, T, …), and its transpose for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Kind, back: Kind, group: Any, size: int, rank: int) -> Tensor:
        ctx.back, ctx.place = back, (group, size, rank)
        return _exchange(x, there, group, size, rank)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _exchange(gradient, ctx.back, *ctx.place), None, None, None, None, None


def _exchange(x: Tensor, kind: Kind, group: Any, size: int, rank: int) -> Tensor:
    if kind == "gather":
        return collectives.wait_tensor(_gather(x.contiguous(), 1, group))
    if kind == "scatter":
        return collectives.wait_tensor(_scatter(x.contiguous(), "sum", 1, group))
    if kind == "sum":
        return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))
    return x.chunk(size, 1)[rank].contiguous() if kind == "slice" else x.view_as(x)


def mine(parameter: Tensor, rows: slice = slice(None)) -> Tensor:
    """The part of a weight that this process computes with: its own of a DTensor, else `rows` of the whole."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter[rows]


class ColumnLinear(Linear):
    """All tokens -> this process's outputs. Fewer key/value heads than processes stay whole; `rows` are those used."""

    rows: slice

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, mine(self.weight, self.rows), None if self.bias is None else mine(self.bias, self.rows))


class RowLinear(Linear):
    """This process's inputs -> its summand of the outputs; the bias, which stays whole, is in the first one's."""

    team: Team

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias * float(self.team.rank == 0)
        return self.multiply(x, mine(self.weight), bias)


class ColumnEmbedding(Embedding):
    """A table of which every process looks up its channels."""

    rows: slice

    def forward(self, ids: Tensor) -> Tensor:
        whole = isinstance(self.weight, DTensor)
        return F.embedding(ids, mine(self.weight) if whole else self.weight[:, self.rows])


def divide_matrices(model: Any, mesh: Mesh) -> list[str]:
    """Divides a decoder (or a part of one) in place along `tensor`; returns the names of the parameters whose gradients
    are to be summed along it. Raises ConfigError, with the reason, where it cannot be divided so.
    """
    if reason := why_not_tensor(model.config, mesh.layout):
        raise ConfigError(reason)
    along = mesh.along("tensor")
    assert along is not None
    team = Team(along, along.get_group(), mesh.size("tensor"), mesh.rank("tensor"), mesh.layout.sequence_parallel)
    for block in model.stack.values():
        _divide_attention(block.attention, team)
        _divide_feed_forward(block.feed_forward, team)
    _divide_ends(model, team, mesh.layout.vocabulary_parallel)
    return [name for name, p in model.named_parameters()
            if not isinstance(p, DTensor) and _sees_a_part(name, model, team)]


def _divide_attention(attention: Attention, team: Team) -> None:
    shared = attention.num_kv_heads % team.size != 0
    head = team.rank * attention.num_kv_heads // team.size      # where shared: the one head this process reads
    width = attention.head_dim
    _columns(attention.query, team)
    for linear in (attention.key, attention.value):
        _columns(linear, team, slice(head * width, (head + 1) * width) if shared else None)
    if attention.value_gate is not None:
        _columns(attention.value_gate, team, slice(head, head + 1) if shared else None)
    _rows(attention.output, team)
    attention.register_forward_pre_hook(partial(_enter_attention, team), with_kwargs=True)
    attention.register_forward_hook(partial(_leave, team))


def _enter_attention(team: Team, _module: nn.Module, inputs: tuple[Tensor, ...],
                     named: dict[str, Any]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    mask: Mask = named["mask"]
    if mask.bias is not None and mask.bias.shape[1] > 1:        # heads with their own biases (ALiBi)
        mask = replace(mask, bias=mask.bias.chunk(team.size, 1)[team.rank])
    return (team.enter(inputs[0]),), {**named, "mask": mask}


def _divide_feed_forward(module: SwiGLU | FeedForward, team: Team) -> None:
    for linear in (module.gate, module.up) if isinstance(module, SwiGLU) else (module.up,):
        _columns(linear, team)
    _rows(module.down, team)
    module.register_forward_pre_hook(lambda _module, inputs: (team.enter(inputs[0]),))
    module.register_forward_hook(partial(_leave, team))


def _leave(team: Team, _module: nn.Module, _inputs: Any, y: Any) -> Tensor:
    return team.leave(y)


def _divide_ends(model: Any, team: Team, vocabulary_parallel: bool) -> None:
    """Stem and head, where this part of the decoder has them. The stem computes with all tokens, then splits them; the
    stream after the last norm is gathered for the head."""
    from dougong.parallel.vocabulary import divide_embedding, divide_head

    stem = getattr(model, "stem", None)
    if stem is not None:
        for layer, table in stem.values.items():
            _divide_values(table, model.stack[layer].attention, team)
        if vocabulary_parallel and stem.tokens is not None:
            divide_embedding(stem.tokens, team)
        p, stem.dropout = stem.dropout.p, Dropout(0.0)      # on the parts, where every process draws its own numbers
        stem.register_forward_hook(lambda module, _inputs, x: dropout(team.split(x), p, training=module.training))
    if getattr(model, "head", None) is not None:
        if vocabulary_parallel:
            divide_head(model.head, team)
        gather: Callable[[Tensor], Tensor] = team.enter if vocabulary_parallel else team.join
        model.norm.register_forward_hook(lambda _module, _inputs, x: gather(x))


def _divide_values(table: Any, attention: Any, team: Team) -> None:
    """A table of value embeddings: the channels of this process's key/value heads."""
    table.__class__ = ColumnEmbedding
    if attention.num_kv_heads % team.size == 0:
        divide_parameter(table, "weight", 1, team)
    else:
        table.rows = attention.value.rows


def _columns(linear: Any, team: Team, rows: slice | None = None) -> None:
    linear.__class__ = ColumnLinear
    linear.rows = rows or slice(None)
    if rows is None:
        divide_parameter(linear, "weight", 0, team)
        if linear.bias is not None:
            divide_parameter(linear, "bias", 0, team)


def _rows(linear: Any, team: Team) -> None:
    linear.__class__ = RowLinear
    linear.team = team
    divide_parameter(linear, "weight", 1, team)


def divide_parameter(module: nn.Module, name: str, dim: int, team: Team) -> None:
    """Replaces a parameter by this process's part of it along `dim`."""
    whole: Tensor = getattr(module, name).detach()
    part = whole.chunk(team.size, dim)[team.rank].contiguous()
    divided = DTensor.from_local(part, team.mesh, [Shard(dim)], run_check=False, shape=whole.shape,
                                 stride=whole.stride())
    setattr(module, name, nn.Parameter(divided, requires_grad=getattr(module, name).requires_grad))


def _sees_a_part(name: str, model: nn.Module, team: Team) -> bool:
    """Whether a whole parameter meets only some tokens or heads on each process."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, ColumnLinear | RowLinear | ColumnEmbedding) or ".query_norm." in name or ".key_norm." in name:
        return True
    return team.sequence and name.startswith(("stack.", "norm."))

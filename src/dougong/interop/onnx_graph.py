"""A decoder as an ONNX graph, in the layout that readers of Hugging Face's exports expect.

Inputs: `input_ids` and `position_ids` (batch, sequence), `attention_mask` (batch, past + sequence; 0 hides a token),
and for each layer `past_key_values.N.key` and `.value` (batch, kv heads, past, head width; past is 0 at first).
Outputs: `logits` (batch, sequence, vocabulary), and `present.N.key` and `.value`, which are the next call's past.

torch.export traces the model itself with lengths as symbols, so whatever a family is made of comes along. Only what
decides by lengths (the growing table of angles, the choice of a kernel, the division of rows among experts) is
exchanged for a form that does not.
"""

import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dougong.core.errors import ConfigError, MissingExtraError
from dougong.interop.onnx_file import EXTERNAL, MODEL
from dougong.models.compose import Decoder
from dougong.nn.attention import Attention, Cache
from dougong.nn.mask import Mask
from dougong.nn.moe import MoE
from dougong.nn.position import LearnedPosition, Position, RoPE, Rotation, Span, rope_at

OPSET = 18
"""the oldest that says all that is needed, so that old readers know it too"""
ONE_FILE_BYTES = 1_900_000_000
"""of weights; above it they lie beside the graph, since protobuf holds no message of 2 GiB"""


def write_onnx(directory: Path, model: nn.Module, *, dtype: torch.dtype = torch.float32, about: Mapping[str, str],
               one_file_bytes: int = ONE_FILE_BYTES) -> list[str]:
    """Writes `model.onnx` (and `model.onnx_data`) and syncs them; returns the files' names.

    `model` is a copy that nobody else needs: its parts are exchanged. `dtype` is how its weights are stored; the
    computation is in float32, and so is the cache. `about` becomes the file's metadata. Raises ConfigError for a model
    that is no decoder, MissingExtraError without onnx and onnxscript.
    """
    if not isinstance(model, Decoder):
        raise ConfigError(f"{type(model).__name__} is no decoder, and the ONNX form here (tokens and cached keys in, "
                          "logits out) holds nothing else.")
    onnx_ir, optimizer = _packages()
    names = cache_names(model)
    traced = _Traced(_exchanged(model.to(dtype).eval()))
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            traced, _example(model, len(names)), dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
            dynamic_shapes=_dynamic(len(names)),
            input_names=["input_ids", "attention_mask", "position_ids", *names],
            output_names=["logits", *(name.replace("past_key_values", "present") for name in names)])
        assert program is not None
        graph = program.model
        # weights stay as they are named and stored: a reader turns and widens them when it loads them
        optimizer.optimize_ir(graph, should_fold=lambda node: False if node.op_type in ("Transpose", "Cast", "Gather")
                           else None)
    _constants_apart(onnx_ir, graph.graph, {name for name, _ in (*traced.named_parameters(), *traced.named_buffers())})
    _strip(onnx_ir, graph, about)
    weights = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value)
    apart = weights > one_file_bytes
    onnx_ir.save(graph, directory / MODEL, external_data=EXTERNAL if apart else None)
    files = [MODEL, EXTERNAL] if apart else [MODEL]
    for name in files:
        with open(directory / name, "rb+") as file:
            os.fsync(file.fileno())
    return files


def cache_names(model: Decoder) -> list[str]:
    """The cache's inputs in their order."""
    return [f"past_key_values.{layer}.{part}" for layer in range(len(model.stack)) for part in ("key", "value")]


class _Traced(nn.Module):
    """The model with everything it needs to know handed in."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor,
                past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        cache = _Handed(past)
        torch._check(attention_mask.shape[1] == cache.length + input_ids.shape[1])
        span = _Given(T=input_ids.shape[1], device=input_ids.device, length=cache.length, segment_BS=attention_mask,
                      position_BT=position_ids)
        self.model.span = lambda *_: span  # type: ignore[method-assign]
        return self.model(input_ids, cache=cache), cache.present


class _Handed(Cache):
    """A cache that comes as tensors and leaves as longer ones."""

    def __init__(self, past: list[Tensor]) -> None:
        self.past, self.present = past, list[Tensor]()
        self.length, self.start_B = past[0].shape[2], None

    def update(self, layer: int, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        held = self.past[2 * layer:2 * layer + 2]
        k_BKSH, v_BKSH = (torch.cat(pair, 2) for pair in zip(held, (k_BKTH, v_BKTH)))
        self.present += [k_BKSH, v_BKSH]
        return k_BKSH, v_BKSH

    def advance(self, T: int) -> None:
        """Nothing: the caller counts."""


@dataclass(frozen=True, kw_only=True)
class _Given(Span):
    """A span whose positions are said. The attention mask divides a row as packed documents do: what is padding is read
    by padding alone, wherever it stands."""

    position_BT: Tensor

    def index(self) -> Tensor:
        return self.position_BT

    def index_in_document(self) -> Tensor:
        return self.position_BT

    def segments(self) -> Tensor:
        assert self.segment_BS is not None
        return self.segment_BS


def _exchanged(model: Decoder) -> Decoder:
    """The model with those parts exchanged that decide by lengths."""
    model.position = _PlacedPosition(model.position)
    for module in list(model.modules()):
        if isinstance(module, Attention):
            module.kernel = _attend
        if isinstance(part := getattr(module, "feed_forward", None), MoE):
            module.feed_forward = _ExpertByExpert(part)
    return model


class _PlacedPosition(Position):
    """A scheme that reads positions where it would count them, and computes angles where it would look them up."""

    def __init__(self, scheme: Position) -> None:
        super().__init__()
        self.scheme = scheme

    def embed(self, span: Span) -> Tensor | None:
        if isinstance(self.scheme, LearnedPosition):
            return F.embedding(span.index(), self.scheme.weight).float()
        return self.scheme.embed(span)

    def rotation(self, span: Span, dtype: torch.dtype) -> Rotation | None:
        if isinstance(self.scheme, RoPE):
            return rope_at(span.index(), self.scheme.head_dim, self.scheme.theta, dtype)
        return self.scheme.rotation(span, dtype)

    def bias(self, span: Span) -> Tensor | None:
        return self.scheme.bias(span)


def _attend(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Mask, *, dropout: float = 0.0) -> Tensor:
    """Softmax attention in plain products. Query heads that share keys are a dimension of their own, so keys are not
    repeated."""
    assert mask.bias is not None and not dropout
    K, bias = k_BKSH.shape[1], mask.bias
    q = q_BNTH.unflatten(1, (K, -1))
    bias = bias.unflatten(1, (K, -1)) if bias.shape[1] > 1 else bias[:, :, None]
    scores = (q @ k_BKSH[:, :, None].transpose(-1, -2)) * q.shape[-1] ** -0.5 + bias
    return (scores.softmax(-1) @ v_BKSH[:, :, None]).flatten(1, 2)


class _ExpertByExpert(nn.Module):
    """A mixture in which each expert picks its tokens: what is computed is what `MoE` computes, without sorting."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x_BTD: Tensor) -> Tensor:
        moe, x_MD = self.moe, x_BTD.flatten(0, -2)
        weight_Mk, expert_Mk = moe.route(x_MD)
        gate, up, down = (stack.to(x_MD.dtype) for stack in (moe.experts.gate, moe.experts.up, moe.experts.down))
        y_MD = torch.zeros_like(x_MD)
        for expert in range(moe.section.num_experts):
            token_R, slot_R = (expert_Mk == expert).nonzero(as_tuple=True)
            rows_RD = x_MD[token_R]
            rows_RF = F.silu(rows_RD @ gate[expert].t()) * (rows_RD @ up[expert].t())
            y_MD = y_MD.index_add(0, token_R, rows_RF @ down[expert].t() * weight_Mk[token_R, slot_R][:, None])
        y_BTD = y_MD.view_as(x_BTD)
        return y_BTD if moe.shared is None else y_BTD + moe.shared(x_BTD)


def _example(model: Decoder, parts: int) -> tuple[Any, ...]:
    """Inputs of sizes that differ from each other and from 0 and 1, which tracing takes for constants."""
    B, T, past = 2, 3, 5
    attention = next(module for module in model.modules() if isinstance(module, Attention))
    held = torch.zeros(B, attention.num_kv_heads, past, attention.head_dim)
    tokens = torch.zeros(B, T, dtype=torch.long)
    return tokens, torch.ones(B, past + T, dtype=torch.long), tokens.clone(), [held.clone() for _ in range(parts)]


def _dynamic(parts: int) -> tuple[Any, ...]:
    tokens = {0: "batch_size", 1: "sequence_length"}
    return (tokens, {0: "batch_size", 1: "total_sequence_length"}, tokens,
            [{0: "batch_size", 2: "past_sequence_length"}] * parts)


def _constants_apart(onnx_ir: Any, graph: Any, weights: Collection[str]) -> None:
    """Makes nodes of the constants among the initializers, so that these are the weights and nothing else."""
    for name, value in list(graph.initializers.items()):
        if name not in weights:
            node = onnx_ir.node("Constant", [], attributes={"value": value.const_value})
            del graph.initializers[name]
            value.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
            graph.insert_before(graph[0], node)


def _strip(onnx_ir: Any, model: Any, about: Mapping[str, str]) -> None:
    """Takes out what the tracer noted of each node: source lines and their paths, which name people."""
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for name, value in list(model.graph.initializers.items()):
        ours = name.removeprefix("model.").replace("scheme.", "").replace(".moe.", ".")
        if ours != name:
            value.name = ours
            if value.const_value is not None:
                value.const_value.name = ours
    model.graph.metadata_props.clear()
    model.graph.name, model.graph.doc_string = "decoder", None
    model.metadata_props.clear()
    model.metadata_props.update(about)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracer's remarks on packages that nobody asked for and axes that share a name on purpose."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _packages() -> tuple[Any, Any]:
    try:
        import onnx  # noqa: F401
        import onnx_ir
        from onnxscript import optimizer
    except ImportError as error:
        raise MissingExtraError(error.name or "onnxscript", "onnx", "Writing ONNX files") from None
    return onnx_ir, optimizer

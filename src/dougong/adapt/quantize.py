"""A model's matrices as integers: which of them, in which form, and how one model becomes the other and back.

A method (`METHODS`) decides the integers; where they stand is the same for all: in `QuantizedLinear` and
`QuantizedEmbedding` under the names of the parts they replace, so that a file of tensors says by names and a table of
forms what it holds.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from dougong.core.errors import CheckpointError, ConfigError
from dougong.data.batch import Batch
from dougong.models.heads import Head, QuantizedHead, TiedHead
from dougong.nn.embedding import Embedding
from dougong.nn.init import FanIn
from dougong.nn.linear import Linear
from dougong.nn.moe import Experts
from dougong.nn.quantized import GROUP, Activations, Quantized, QuantizedEmbedding, QuantizedLinear, quantize

_STAY = ("router", "value_gate")
"""small matrices that decide instead of carry: an error there moves whole tokens, and their bytes are few"""


@dataclass(frozen=True)
class Form:
    """How one matrix is stored; `group` None is a whole row."""

    bits: int
    group: int | None = GROUP
    activations: Activations = "float"

    def to_dict(self) -> dict[str, Any]:
        return {"bits": self.bits, "group": self.group, "activations": self.activations}


class Method(Protocol):
    """Finds integers (int8, one each) and scales for every part that `matrices` names. `batches` are of the training
    split; a method may change other weights of the model to suit."""

    def __call__(self, model: nn.Module, batches: Sequence[Batch], *, bits: int,
                 group: int | None) -> dict[str, tuple[Tensor, Tensor]]: ...


def round_to_nearest(model: nn.Module, batches: Sequence[Batch] = (), *, bits: int,
                     group: int | None = GROUP) -> dict[str, tuple[Tensor, Tensor]]:
    """Each weight to the nearest integer of its group; looks at no data."""
    return {name: quantize(part.weight.detach(), bits, group)  # type: ignore[operator]
            for name, part in matrices(model).items()}


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """The parts that can be stored as integers, by name: linear maps, and tables of tokens."""
    return {name: part for name, part in model.named_modules()
            if type(part) in (Linear, Head, Embedding) and name.rpartition(".")[2] not in _STAY}


def take(model: nn.Module, found: Mapping[str, tuple[Tensor, Tensor]], form: Form) -> None:
    """Puts integers in the place of the model's floats. Raises ConfigError where nothing was found."""
    if not found:
        raise ConfigError(f"{type(model).__name__} has no linear map or embedding of tokens, and nothing else is "
                          "stored as integers.")
    for name, (integers_OI, scale_OG) in found.items():
        part = model.get_submodule(name)
        replace_part(model, name, with_integers(part, form, integers_OI, scale_OG))


def refuse_integers(model: nn.Module) -> None:
    if any(isinstance(part, Quantized) for part in model.modules()):
        raise ConfigError("the weights are integers already. Compress the run that they were made from: rounding twice "
                          "errs twice.")


def remaining(model: nn.Module) -> list[str]:
    """What is worth saying of the weights that stay as they are."""
    experts = sum(p.numel() for part in model.modules() if isinstance(part, Experts) for p in part.parameters())
    return [f"the experts' {experts:,} weights stay float: their grouped product has no kernel for integers here."] \
        if experts else []


def with_integers(part: nn.Module, form: Form, integers_OI: Tensor, scale_OG: Tensor) -> Quantized:
    """The part that holds these integers in place of a linear map, a head or an embedding."""
    made = empty(part, form).to(integers_OI.device)
    made.set(integers_OI, scale_OG)
    if getattr(part, "bias", None) is not None:
        made.bias = nn.Parameter(part.bias.detach().clone(), requires_grad=False)  # type: ignore[union-attr,operator]
    return made


def empty(part: nn.Module, form: Form) -> Quantized:
    """Room for the integers of a part, to be loaded."""
    kind = {"bits": form.bits, "group": form.group, "activations": form.activations}
    if isinstance(part, Embedding):
        return QuantizedEmbedding(part.num_embeddings, part.embedding_dim, **kind)
    assert isinstance(part, Linear)
    if isinstance(part, Head):
        head = QuantizedHead(part.in_features, part.out_features, **kind)
        head.soft_cap = part.soft_cap
        return head
    return QuantizedLinear(part.in_features, part.out_features, bias=part.bias is not None, **kind)


def make_room(model: nn.Module, forms: Mapping[str, Form]) -> nn.Module:
    """Replaces the named parts by empty ones, so that a file of integers loads. Raises CheckpointError for names that
    the model has no matrix under."""
    there = matrices(model)
    for name, form in forms.items():
        if name not in there:
            raise CheckpointError(f"the file says that {name!r} is stored as integers, and this model has no such "
                                  "matrix. Open it with the recipe it was made with.")
        replace_part(model, name, empty(there[name], form))
    return model


def replace_part(model: nn.Module, name: str, part: nn.Module) -> None:
    """Puts a part in the place of another; a head tied to an embedding follows it."""
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(name)
    model.get_submodule(parent)._modules[leaf] = part
    for head in model.modules():
        if isinstance(head, TiedHead) and head.embedding is old:
            head.tie(part)  # type: ignore[arg-type]


def dequantised(model: nn.Module) -> nn.Module:
    """A copy in which every part computes with floats again: what the integers stand for, in float32."""
    copied = copy.deepcopy(model)
    for name, part in list(copied.named_modules()):
        if isinstance(part, Quantized):
            replace_part(copied, name, _floats(part))
    return copied


def _floats(part: Quantized) -> nn.Module:
    if isinstance(part, QuantizedEmbedding):
        made: Any = Embedding(*part.shape)
    elif isinstance(part, QuantizedHead):
        made = Head(part.in_features, part.out_features, soft_cap=part.soft_cap, init=FanIn())
    else:
        assert isinstance(part, QuantizedLinear)
        made = Linear(part.in_features, part.out_features, bias=part.bias is not None)
        made.bias = part.bias
    made.weight = nn.Parameter(part.weight, requires_grad=False)
    return made


def integers_of(model: nn.Module) -> dict[str, Quantized]:
    """Name of the weight that each stands for ("stack.0.attention.query.weight") -> its integers."""
    return {f"{name}.weight": part for name, part in model.named_modules() if isinstance(part, Quantized)}


def bits_per_weight(model: nn.Module) -> float:
    """Bits stored for a weight of the whole model, scales and what stayed float included."""
    stored = weights = 0
    seen: set[int] = set()
    for part in model.modules():
        if isinstance(part, Quantized):
            weights += part.shape[0] * part.shape[1]
            stored += 8 * sum(b.numel() * b.element_size() for b in (part.values, part.scale))
        for parameter in part.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                weights += parameter.numel()
                stored += 8 * parameter.numel() * parameter.element_size()
    return stored / max(1, weights)

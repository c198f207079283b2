"""Structured pruning: whole feed-forward channels, key/value groups and layers go, and an ordinary smaller model stays.

What goes is measured on calibration text. A channel or a group of heads counts by what the loss would change by
without it, to first order: |Σ a · ∂loss/∂a| over a row's tokens, a being its activation (Molchanov et al. 2019,
arXiv:1906.10771, eq. 7). A layer counts by what the loss does change by when it is left out, as in Minitron
(arXiv:2407.14679, section 2.2). A config asks the same widths of every layer, so every layer loses equally many, each
its own least ones. How the cut is shared between layers, groups and channels is tried: of the shapes that fit, the one
of the least loss is taken. Training on, from the larger model's answers, makes up for most of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dougong.core.config import replace
from dougong.core.errors import ConfigError
from dougong.data.batch import Batch
from dougong.models import count
from dougong.models.heads import keep_value_head
from dougong.nn.feed_forward import FeedForward, SwiGLU
from dougong.objectives.causal_lm import CausalLMConfig

_MULTIPLE = 16
"""feed-forward widths tried"""
_LEAST = 4
"""no axis is cut to less than a quarter"""


@dataclass(frozen=True)
class Importance:
    """What each part is worth, in nats of the calibration text per row: by layer and channel, by layer and key/value
    group, and by layer."""

    channels_LF: Float[Tensor, "L F"]
    groups_LK: Float[Tensor, "L K"]
    layers_L: Float[Tensor, " L"]


@dataclass(frozen=True)
class Shape:
    """How many of each are kept."""

    layers: int
    groups: int
    channels: int


@dataclass(frozen=True)
class Pruned:
    """The smaller model, its shape, which layers it has, and its loss (nats per token, calibration text) beside that of
    the whole, before any training."""

    model: Any
    shape: Shape
    layers: tuple[int, ...]
    parameters: int
    loss: float
    loss_before: float


def prune(model: Any, batches: Sequence[Batch], *, ratio: float,
          say: Callable[[str], None] = lambda text: None) -> Pruned:
    """A model with at most `1 - ratio` of the parameters, embeddings counted. Raises ConfigError where it cannot be."""
    if not 0 < ratio < 1:
        raise ConfigError(f"a ratio of {ratio} cannot be pruned: it is the share of the parameters that goes, such as "
                          "0.3.")
    shapes = shapes_within(model, round((1 - ratio) * count.parameters(model.config)["total"]))
    say("measuring what each part is worth")
    importance = measure(model, batches)
    tried = []
    for number, shape in enumerate(shapes):
        say(f"trying shape {number + 1} of {len(shapes)}")
        tried.append((mean_loss(made := cut(model, shape, importance), batches), number, shape, made))
    loss, _, shape, made = min(tried, key=lambda one: one[:2])
    return Pruned(made, shape, _kept(importance.layers_L, shape.layers), count.parameters(made.config)["total"], loss,
                  mean_loss(model, batches))


def whole_shape(model: Any) -> Shape:
    """That of the model as it is. Raises ConfigError for experts, and where no single number is the width."""
    block = next(iter(model.stack.values()))
    if not isinstance(block.feed_forward, SwiGLU | FeedForward):
        raise ConfigError(f"model.kind={model.config.kind} has experts for feed-forwards, and only plain ones are "
                          "pruned so far.")
    if getattr(model.config, "feed_forward", None) is not None:
        raise ConfigError(f"model.kind={model.config.kind} with a feed-forward of its own (model.feed_forward): only "
                          "models whose width is one number, model.ffn_dim, are pruned so far: qwen3, llama, gpt2 or "
                          "nano.")
    return Shape(len(model.stack), block.attention.num_kv_heads, block.feed_forward.down.in_features)


def shapes_within(model: Any, most: int) -> list[Shape]:
    """For each number of layers and of groups, the widest feed-forward with which the parameters are within `most`.

    Raises ConfigError where even the smallest shape is larger.
    """
    whole, known = whole_shape(model), {field.name for field in fields(model.config)}
    section = model.config.decoder()
    alike = len(set(section.windows())) == 1 and not section.value_layers()
    heads = "head_dim" in known
    found, smallest = [], most + 1
    for layers in range(whole.layers, _least(whole.layers) - 1, -1) if alike else (whole.layers,):
        for groups in range(whole.groups, _least(whole.groups) - 1, -1) if heads else (whole.groups,):
            one, two = (count.parameters(changed(model.config, Shape(layers, groups, width)))["total"]
                        for width in (_MULTIPLE, 2 * _MULTIPLE))
            widest = min(whole.channels, int((most - one) / (two - one) + 1) * _MULTIPLE)
            smallest = min(smallest, one + (two - one) * max(0, _least(whole.channels) // _MULTIPLE - 1))
            if widest >= _least(whole.channels):
                found.append(Shape(layers, groups, widest))
    if not found:
        total = count.parameters(model.config)["total"]
        raise ConfigError(f"no shape of this model has {most:,} parameters or fewer: with a quarter of its layers, "
                          f"heads and channels about {smallest:,} of {total:,} are left, embeddings above all.\nTry a "
                          f"ratio below {1 - smallest / total:.2f}, or a smaller vocabulary (--trim-vocabulary).")
    # those that cut one axis further than another shape that fits bring nothing
    return [shape for shape in found if not any(_within(shape, other) for other in found if other != shape)]


def _least(number: int) -> int:
    return -(-number // _LEAST)


def _within(a: Shape, b: Shape) -> bool:
    return a.layers <= b.layers and a.groups <= b.groups and a.channels <= b.channels


def changed(config: Any, shape: Shape) -> Any:
    """The family's config with the numbers of this shape."""
    section = config.decoder()
    num_heads, num_kv_heads, head_dim = section.attention.heads(section.dim)
    changes = {"num_layers": shape.layers, "ffn_dim": shape.channels}
    if shape.groups != num_kv_heads:
        changes |= {"num_heads": shape.groups * (num_heads // num_kv_heads), "num_kv_heads": shape.groups,
                    "head_dim": head_dim}
    return replace(config, **changes)


def measure(model: Any, batches: Sequence[Batch]) -> Importance:
    """One backward pass of each batch for channels and groups, one forward without each layer for the layers."""
    whole, names = whole_shape(model), list(model.stack)
    device = next(model.parameters()).device
    channels = torch.zeros(whole.layers, whole.channels, device=device)
    groups = torch.zeros(whole.layers, whole.groups, device=device)
    objective, rows = CausalLMConfig().build(), 0
    kept: dict[tuple[str, str], Tensor] = {}

    def keep(key: tuple[str, str], x: Tensor) -> None:
        x.retain_grad()
        kept[key] = x

    handles = [part.register_forward_pre_hook(lambda _, inputs, key=(name, what): keep(key, inputs[0]))
               for name, block in model.stack.items()
               for what, part in (("channels", block.feed_forward.down), ("groups", block.attention.output))]
    try:
        for batch in batches:
            with torch.enable_grad():
                sum(objective.losses(model, batch).sums.values()).backward()  # type: ignore[union-attr]
            for place, name in enumerate(names):
                channels[place] += _worth(kept[name, "channels"]).abs().sum(0)
                groups[place] += _worth(kept[name, "groups"]).unflatten(1, (whole.groups, -1)).sum(2).abs().sum(0)
            rows += batch.rows
            kept.clear()
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    before = mean_loss(model, batches)
    without = [mean_loss(model, batches, [other for other in names if other != name]) for name in names]
    tokens = sum(float(batch["weight"].sum()) for batch in batches) / max(1, rows)
    return Importance(channels / max(1, rows), groups / max(1, rows),
                      (torch.tensor(without) - before) * tokens)


def _worth(x_BTI: Tensor) -> Float[Tensor, "B I"]:
    """Σ x · ∂loss/∂x over a row's tokens."""
    assert x_BTI.grad is not None, "the batch went back through the model"
    return (x_BTI.detach() * x_BTI.grad).float().sum(1)


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[Batch], layers: Sequence[str] | None = None) -> float:
    """Nats per token, of the model with these layers only."""
    nats, weight = 0.0, 0.0
    for batch in batches:
        x_BTD, _ = model.stream(batch["tokens"], segment_BT=batch.get("segment"), layers=layers)
        lost = F.cross_entropy(model.head(model.norm(x_BTD)).flatten(0, 1).float(), batch["targets"].flatten(),
                               reduction="none")
        nats += float((lost * batch["weight"].flatten()).sum())
        weight += float(batch["weight"].sum())
    return nats / max(weight, 1.0)


@torch.no_grad()
def cut(model: Any, shape: Shape, importance: Importance) -> Any:
    """A new model of this shape with the most important parts of the old one, in their order."""
    made = changed(model.config, shape).build()
    keep_value_head(made, model)
    made.to(next(model.parameters()).device)
    made.compute_dtype = model.compute_dtype
    old, chosen = model.state_dict(), {}
    for name in made.state_dict():
        if not name.startswith("stack."):
            chosen[name] = old[name]
    for place, layer in enumerate(_kept(importance.layers_L, shape.layers)):
        attention = model.stack[str(layer)].attention
        groups = torch.tensor(_kept(importance.groups_LK[layer], shape.groups))
        kept = {"heads": _widened(groups, attention.num_heads // attention.num_kv_heads * attention.head_dim),
                "groups": _widened(groups, attention.head_dim), "gates": groups,
                "channels": torch.tensor(_kept(importance.channels_LF[layer], shape.channels))}
        prefix = f"stack.{layer}."
        for name, tensor in old.items():
            if name.startswith(prefix):
                chosen[f"stack.{place}.{name.removeprefix(prefix)}"] = _selected(name, tensor, kept)
    made.load_state_dict(chosen)
    return made.eval()


_AXES = {"attention.query": ("heads", 0), "attention.key": ("groups", 0), "attention.value": ("groups", 0),
         "attention.output": ("heads", 1), "attention.value_gate": ("gates", 0), "feed_forward.gate": ("channels", 0),
         "feed_forward.up": ("channels", 0), "feed_forward.down": ("channels", 1)}
"""what each map has along which axis of its weight"""


def _selected(name: str, tensor: Tensor, kept: dict[str, Tensor]) -> Tensor:
    what, axis = _AXES.get(".".join(name.split(".")[2:-1]), ("", 0))
    if not what or axis >= tensor.ndim:     # norms, and the biases of what writes to the stream
        return tensor
    return tensor.index_select(axis, kept[what].to(tensor.device))


def _kept(importance: Tensor, number: int) -> tuple[int, ...]:
    """Places of the most important ones, ascending."""
    return tuple(sorted(importance.argsort(descending=True, stable=True)[:number].tolist()))


def _widened(places: Tensor, width: int) -> Tensor:
    """Rows of the blocks of `width` at these places."""
    return (places[:, None] * width + torch.arange(width)).flatten()

"""What a decoder needs for one step, as straight lines in layers and rows, found by counting shallow models.

Bytes kept for the backward pass are linear in layers and in rows; those inside attention and feed-forward are parted
along `tensor`, those as wide as the stream are not. So a handful of counts on the meta device (two depths, two numbers
of rows, whole heads and half of them) give them for every depth, batch and layout, without a formula for any layer.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from dougong.adapt.lora import adapted_on_meta, trained, trained_matrices
from dougong.core.config import replace
from dougong.models import count
from dougong.models.compose import DecoderConfig
from dougong.parallel.stages import head_work
from dougong.plan.step import Forward, Step, count_forward, period_of

FP32 = 4
ITEMSIZE = {"bf16": 2, "fp32": FP32}


@dataclass(frozen=True)
class Line:
    """Bytes in one row and besides all rows: of one layer, or of what is not a layer."""

    fixed: float
    per_row: float

    def of(self, rows: float) -> float:
        return self.fixed + self.per_row * rows

    def __sub__(self, other: "Line") -> "Line":
        return Line(self.fixed - other.fixed, self.per_row - other.per_row)

    def times(self, factor: float) -> "Line":
        return Line(self.fixed * factor, self.per_row * factor)


class Counts:
    """Counts of one model trained in one way; each is made when first asked for."""

    def __init__(self, step: Step) -> None:
        self.step = dataclasses.replace(step, micro_rows=1, micro_batches=1, ema=False)
        self.section: DecoderConfig = step.model.decoder()
        self._found: dict[tuple[str, int, int, int], Forward] = {}
        num_layers, dim, vocab_size = self.section.num_layers, self.section.dim, self.section.vocab_size
        assert num_layers and dim and vocab_size, "the plan is made for a resolved recipe"
        self.context: int = step.context or step.model.context
        self.layers, self.dim, self.vocab_size = num_layers, dim, vocab_size
        self.itemsize = ITEMSIZE[step.precision]
        self.stream_bytes = self.context * self.dim * self.itemsize
        """one row of the residual stream"""
        self.kept, self.kept_inside = cache(self._kept), cache(self._kept_inside)
        self.ends_kept, self.head_peak = cache(self._ends_kept), cache(self._head_peak)

    @cached_property
    def parameters(self) -> dict[str, Any]:
        return count.parameters(self.step.model)

    @cached_property
    def adapter_parameters(self) -> int | None:
        """What an adapter trains, everything else being frozen; None where every weight is trained."""
        return None if self.step.adapt is None else trained(self._adapted)

    @cached_property
    def _adapted(self) -> Any:
        return adapted_on_meta(self.step.model, self.step.adapt)

    @cached_property
    def trained_share(self) -> float:
        """Trained numbers for each parameter of the model."""
        return 1.0 if self.adapter_parameters is None else self.adapter_parameters / self.parameters["total"]

    @cached_property
    def weight_bytes(self) -> float:
        """Held for each parameter; frozen ones lie as they compute, or as integers."""
        return FP32 if self.step.adapt is None else self._whole("weights") / self.parameters["total"]

    @cached_property
    def end_bytes(self) -> float:
        """Of each parameter of stem and head, as FSDP gathers them."""
        return FP32 if self.step.adapt is None else self.itemsize

    @cached_property
    def flops_per_token(self) -> int:
        if self.step.adapt is None:
            return count.flops_per_token(self.step.model, self.context) or 0
        factors, whole = trained_matrices(self._adapted)
        return count.flops_per_token(self.step.model, self.context, adapter=factors, whole=whole) or 0

    @cached_property
    def layer_parameters(self) -> float:
        """Of one layer, on average."""
        return sum(n for part, n in self.parameters["by_part"].items() if part.startswith("stack")) / self.layers

    @cached_property
    def head_work(self) -> float:
        """Work of the head in layers, by which training cuts a pipeline."""
        return head_work(self.step.model)

    @cached_property
    def layer_experts(self) -> float:
        """Of those, what `expert` divides: 0 without a mixture of experts."""
        section = self.section.feed_forward
        return 3.0 * section.num_experts * section.width(self.dim) * self.dim if section.kind == "moe" else 0.0

    @cached_property
    def layer_whole(self) -> float:
        """Of those, what `tensor` does not divide: norms and scalars."""
        small = sum(n for part, n in self.parameters["by_part"].items()
                    if part.startswith("stack") and part.endswith(("norm", "residual")))
        return small / self.layers

    @cached_property
    def end_parameters(self) -> dict[str, float]:
        """Of the stem and of the head; a tied head's table is the stem's."""
        parts = self.parameters["by_part"]
        return {"stem": parts.get("stem", 0) + parts.get("position", 0),
                "head": parts.get("head", 0) + parts.get("norm", 0)}

    @cached_property
    def optimizer_copies(self) -> float:
        """Bytes of optimiser state for each byte of fp32 weights, of the layers and of the ends taken together."""
        return self._whole("optimizer") / (FP32 * self.parameters["total"])

    def _whole(self, kind: str) -> float:
        """Bytes of a kind that does not depend on rows, in the model of all its layers."""
        few, more = (getattr(self._forward("none", n * self._period, 1, 1), kind) for n in (1, 2))
        return few + (more - few) / self._period * (self.layers - self._period)

    def _kept(self, mode: str) -> Line:
        """One layer's bytes for the backward pass under a mode of checkpointing, on one device."""
        return Line(0.0, self.stream_bytes) if mode == "full" else self._lines(mode, 1)[0]

    def _kept_inside(self, mode: str) -> Line:
        """Of those, what `tensor` divides."""
        if mode == "full":
            return Line(0.0, 0.0)
        parts = self._parts
        return (self._lines(mode, 1)[0] - self._lines(mode, parts)[0]).times(parts / (parts - 1)) if parts > 1 else \
            self._lines(mode, 1)[0]

    def _ends_kept(self) -> Line:
        """Kept by what is not a layer: embedded tokens, the last stream, gradients of the head known in advance."""
        return self._lines("none", 1)[1]

    def _head_peak(self, rows: float) -> float:
        """Bytes that the loss takes for a moment, above what is kept: a chunk's logits and their gradient."""
        one, two = (self._forward("none", self._period, n, 1).above for n in (1, 2))
        chunk = max(512, getattr(self.step.objective, "chunk_logits", 1 << 62) // self.vocab_size)
        filled = chunk / self.context      # rows from which a chunk is full
        return one + (two - one) * (min(rows, filled) - 1) if filled > 1 else two

    @cached_property
    def _period(self) -> int:
        return period_of(self.step.model)

    @cached_property
    def _parts(self) -> int:
        """How many parts the narrowed model's heads and inner width are one of: 2 where they can be halved."""
        attention, inner = self.section.attention, self.section.feed_forward
        heads, groups, _ = attention.heads(self.dim)
        return 2 if heads % 2 == groups % 2 == 0 and inner.width(self.dim) % 2 == 0 else 1

    def _lines(self, mode: str, part: int) -> tuple[Line, Line]:
        """(a layer's line, the ends' line), heads and inner width divided by `part`."""
        few, more = self._period, 2 * self._period
        a, b = ([self._forward(mode, depth, rows, part).kept for rows in (1, 2)] for depth in (few, more))
        layer = [(y - x) / (more - few) for x, y in zip(a, b)]
        ends = [x - few * slope for x, slope in zip(a, layer)]
        return tuple(Line(2 * one - two, two - one) for one, two in (layer, ends))   # type: ignore[return-value]

    def _forward(self, mode: str, depth: int, rows: int, part: int) -> Forward:
        if (key := (mode, depth, rows, part)) not in self._found:
            model = _narrowed(self.section, depth, part)
            self._found[key] = count_forward(
                dataclasses.replace(self.step, model=model, checkpoint=mode, micro_rows=rows))
        return self._found[key]


def _narrowed(section: DecoderConfig, depth: int, part: int) -> DecoderConfig:
    """The same decoder with so many layers, and heads and inner width divided by `part`."""
    heads, groups, width = section.attention.heads(section.dim)
    attention = replace(section.attention, num_heads=heads // part, num_kv_heads=groups // part, head_dim=width)
    inner = replace(section.feed_forward, ffn_dim=section.feed_forward.width(section.dim) // part)
    return replace(section, num_layers=depth, attention=attention, feed_forward=inner)

"""Model shapes a budget may be spent on: a ladder of sizes, and what one shape costs to train and to serve."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from dougong.models import count
from dougong.plan.budget import Serving

STEPS_PER_DECADE = 6
"""sizes in a factor of ten: neighbours differ by 1.47, and the loss at equal compute is flat over more than that"""
_BYTES = {"bf16": 2, "int8": 1}
_CACHE_BYTES = 2   # keys and values stay in bf16


@dataclass(frozen=True)
class Shape:
    """A family's config with every width given, under the size it was asked for by."""

    size: str
    model: Any

    @cached_property
    def parameters(self) -> int:
        return self._counts["total"]

    @cached_property
    def matrices(self) -> int:
        """Weights that multiply every token, head included: the N of `plan.laws`."""
        return self._counts["matrices"]

    @cached_property
    def _counts(self) -> dict[str, Any]:
        return count.parameters(self.model)

    @cached_property
    def flops_per_token(self) -> float:
        """Of training, attention included, at the model's own context."""
        return count.flops_per_token(self.model, self.model.context) or 0

    def serving_bytes(self, precision: str = "bf16", rows: int = 1) -> float:
        """Weights, and keys and values of `rows` texts of a whole context; the program around them not included."""
        return self.parameters * _BYTES[precision] + rows * self.model.context * self.cache_bytes_per_token

    @property
    def cache_bytes_per_token(self) -> int:
        section = self.model.decoder()
        _, kv_heads, head_dim = section.attention.heads(section.dim)
        return 2 * section.num_layers * kv_heads * head_dim * _CACHE_BYTES

    def fits(self, serving: Serving | None) -> bool:
        return serving is None or self.serving_bytes(serving.precision, serving.rows) <= serving.bytes

    def to_dict(self) -> dict[str, Any]:
        model = self.model
        names = ("dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim", "vocab_size", "context")
        return {"size": self.size, "parameters": self.parameters, "matrices": self.matrices,
                "flops_per_token": self.flops_per_token,
                **{name: getattr(model, name) for name in names if getattr(model, name, None) is not None}}


def ladder(low: float, high: float) -> Iterator[str]:
    """Sizes from `low` to `high` parameters, evenly spread on a logarithmic scale: `1M`, `1.5M`, `2.2M`, …"""
    first, last = (math.floor(STEPS_PER_DECADE * math.log10(low)), math.ceil(STEPS_PER_DECADE * math.log10(high)))
    for step in range(first, last + 1):
        yield written(10 ** (step / STEPS_PER_DECADE))


def written(size: float) -> str:
    """A size as the dial takes it, in two digits: 2154434 is `2.2M`."""
    unit, scale = next((unit, scale) for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3), ("K", 1e3))
                       if size >= scale * 0.995 or unit == "K")
    digits = size / scale
    return f"{digits:.0f}{unit}" if digits >= 9.95 else f"{digits:.1f}".removesuffix(".0") + unit


@dataclass(frozen=True)
class Choice:
    """One shape with the whole budget spent on it. `loss` is in the law's unit; `interval` only after a probe."""

    shape: Shape
    tokens: float
    epochs: float | None
    seconds_per_step: float | None
    loss: float
    interval: tuple[float, float] | None = None
    fits: bool = True

    def to_dict(self) -> dict[str, Any]:
        values = {key: value for key, value in asdict(self).items() if key != "shape"}
        return {**self.shape.to_dict(), **values}

"""Where a token stands: five schemes with one face, each acting at its own place.

`embed` is added to the embedded tokens (learned, sinusoidal), `rotation` turns queries and keys (RoPE),
`bias` is added to the attention scores (ALiBi). A scheme overrides the one it uses. Tables are computed on
demand and kept outside the module's state, so nothing is stored in checkpoints and nothing is stale after
`to_empty`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dougong.core.config import config
from dougong.core.errors import ConfigError
from dougong.nn.init import Init, Normal

Rotation = tuple[Tensor, Tensor]
"""cos and signed sin of both halves, each (T, H) or (B, T, H); see `rotate`"""


@dataclass(frozen=True)
class Span:
    """Where the T tokens of one forward stand."""

    T: int
    device: torch.device
    length: int = 0
    """tokens of their row before them: held by a cache, or by other processes"""
    start_B: Tensor | None = None
    """first valid index of each row, for left-padded batches"""
    segment_BS: Tensor | None = None
    """document of each token of the row, from its first to these T and possibly further, where rows are packed; equal
    numbers stand side by side"""

    @property
    def end(self) -> int:
        return self.length + self.T

    def index(self) -> Int[Tensor, "*b T"]:
        """Positions counted from each row's `start_B`; padding before it gets 0."""
        index_T = torch.arange(self.length, self.end, device=self.device)
        return index_T if self.start_B is None else (index_T - self.start_B[:, None]).clamp(min=0)

    def index_in_document(self) -> Int[Tensor, "*b T"]:
        """`index`, but restarting with each packed document, as the document would be read alone."""
        index = self.index()
        if self.segment_BS is None:
            return index
        segment_BS = self.segments()
        begins_BS = torch.ones_like(segment_BS, dtype=torch.bool)
        begins_BS[:, 1:] = segment_BS[:, 1:] != segment_BS[:, :-1]
        index_S = torch.arange(self.end, device=self.device)
        return index - torch.where(begins_BS, index_S, 0).cummax(-1).values[:, self.length:]

    def segments(self) -> Int[Tensor, "B S"]:
        """Documents of the row's tokens up to the end of these T."""
        assert self.segment_BS is not None and self.start_B is None and self.segment_BS.shape[1] >= self.end, \
            "packed segments and a cache do not mix: cached keys have no segments"
        return self.segment_BS[:, :self.end]

    def in_attention(self) -> "Span":
        """Where the tokens stand that meet in attention: these, unless processes exchange them (`parallel.context`)."""
        return self


class Position(nn.Module):
    """No position at all: attention under a causal mask can still count (Haviv et al. 2022,
    arXiv:2203.16634)."""

    def embed(self, span: Span) -> Float[Tensor, "*b T D"] | None:
        """What is added to the embedded tokens; counted within each packed document."""
        return None

    def rotation(self, span: Span, dtype: torch.dtype) -> Rotation | None:
        """What turns queries and keys; only differences matter, so packed documents need no restart."""
        return None

    def bias(self, span: Span) -> Float[Tensor, "N T S"] | None:
        """What is added to the scores of the T tokens against all S up to their end."""
        return None


@config
class NoPositionConfig:
    """No position information besides the causal mask."""

    kind: Literal["none"] = "none"

    def build(self, *, dim: int, head_dim: int, num_heads: int, context: int | None,
              init: Init | None) -> Position:
        return Position()


@config
class RoPEConfig:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864, eq. 34), halves paired as in Hugging Face's
    models."""

    kind: Literal["rope"] = "rope"
    theta: float = 10_000.0
    """base of the wavelengths; larger for longer contexts"""

    def build(self, *, dim: int, head_dim: int, num_heads: int, context: int | None,
              init: Init | None) -> "RoPE":
        if head_dim % 2:
            raise ConfigError(f"head_dim={head_dim} is odd: RoPE turns pairs of channels. Try "
                              f"head_dim={head_dim + 1}.")
        return RoPE(head_dim, theta=self.theta)


@config
class LearnedConfig:
    """One learned vector per position, as in GPT-2."""

    kind: Literal["learned"] = "learned"

    def build(self, *, dim: int, head_dim: int, num_heads: int, context: int | None,
              init: Init | None) -> "LearnedPosition":
        if context is None:
            raise ConfigError("context=None: learned positions need to know how many there are. "
                              "Try context=256.")
        return LearnedPosition(context, dim, init=init or Normal(0.02))


@config
class SinusoidalConfig:
    """Sines and cosines of geometrically spaced wavelengths (Vaswani et al. 2017, arXiv:1706.03762, section
    3.5)."""

    kind: Literal["sinusoidal"] = "sinusoidal"
    theta: float = 10_000.0

    def build(self, *, dim: int, head_dim: int, num_heads: int, context: int | None,
              init: Init | None) -> "Sinusoidal":
        if dim % 2:
            raise ConfigError(f"dim={dim} is odd: sinusoidal positions come in pairs. Try dim={dim + 1}.")
        return Sinusoidal(dim, theta=self.theta)


@config
class ALiBiConfig:
    """Scores fall linearly with distance, each head at its own slope (Press et al. 2021,
    arXiv:2108.12409)."""

    kind: Literal["alibi"] = "alibi"

    def build(self, *, dim: int, head_dim: int, num_heads: int, context: int | None,
              init: Init | None) -> "ALiBi":
        return ALiBi(num_heads)


@config
class RoPEALiBiConfig:
    """Both at once: RoPE tells where, ALiBi prefers what is near. Small models of characters learn fastest so
    (docs/log.md)."""

    kind: Literal["rope_alibi"] = "rope_alibi"
    theta: float = 1024.0
    """base of the wavelengths"""
    steepest: float = 1.0
    """log2 of the first head's slope"""
    octaves: float = 6.0
    """halvings from the first head's slope to the last's"""

    def build(self, *, dim: int, head_dim: int, num_heads: int, context: int | None,
              init: Init | None) -> "RoPEALiBi":
        if head_dim % 2:
            raise ConfigError(f"head_dim={head_dim} is odd: RoPE turns pairs of channels. Try head_dim={head_dim + 1}.")
        slopes = [2 ** (self.steepest - self.octaves * head / max(1, num_heads - 1)) for head in range(num_heads)]
        return RoPEALiBi(head_dim, theta=self.theta, slopes=slopes)


class LearnedPosition(Position):
    """A table of `context` vectors."""

    def __init__(self, context: int, dim: int, *, init: Init) -> None:
        super().__init__()
        self.context = context
        self.weight = nn.Parameter(torch.empty(context, dim))
        self.init = {"weight": init}

    def embed(self, span: Span) -> Float[Tensor, "*b T D"]:
        if span.end > self.context and span.start_B is None:
            raise ConfigError(f"{span.end} tokens, but the model has learned positions for "
                              f"context={self.context}. Give it fewer tokens, or train with a longer "
                              "context.")
        return nn.functional.embedding(span.index_in_document(), self.weight)

    def extra_repr(self) -> str:
        return f"{self.context} x {self.weight.shape[1]}"


class RoPE(Position):
    """Rotation angles of every position, from a table that grows as needed."""

    def __init__(self, head_dim: int, *, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        self._tables: dict[tuple[torch.device, torch.dtype], Rotation] = {}

    def rotation(self, span: Span, dtype: torch.dtype) -> Rotation:
        cos, sin = self._table(span.end, span.device, dtype)
        if span.start_B is None:
            return cos[span.length:span.end], sin[span.length:span.end]
        index_BT = span.index()
        return cos[index_BT], sin[index_BT]

    def _table(self, needed: int, device: torch.device, dtype: torch.dtype) -> Rotation:
        table = self._tables.get((device, dtype))
        if table is None or len(table[0]) < needed:
            # An inference tensor could not be used in training later, so leave that mode while making the
            # table.
            with torch.inference_mode(False), torch.no_grad():
                table = rope_table(1 << (needed - 1).bit_length(), self.head_dim, self.theta, device, dtype)
            self._tables[device, dtype] = table
        return table

    def extra_repr(self) -> str:
        return f"{self.head_dim}, theta={self.theta}"


def rope_table(length: int, head_dim: int, theta: float, device: torch.device,
               dtype: torch.dtype) -> Rotation:
    """`rope_at` of positions 0 to length - 1."""
    return rope_at(torch.arange(length, device=device), head_dim, theta, dtype)


def rope_at(position: Int[Tensor, "*b T"], head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """cos and sin of position / theta^(2i/H), angles in float32 as the published models compute them."""
    exponent_h = torch.arange(0, head_dim, 2, device=position.device).float() / head_dim
    angle = position.float()[..., None] * (1.0 / theta**exponent_h)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x_BTNH: Float[Tensor, "B T N H"], rotation: Rotation) -> Float[Tensor, "B T N H"]:
    """Turns the pairs (i, i + H/2) by their angles: x · cos + (x with its halves exchanged) · sin.

    Tokens come before heads, as the projections leave them: every pass then runs over one piece of memory.
    """
    cos, sin = (part.unsqueeze(-2) for part in rotation)
    if torch.compiler.is_compiling() or not x_BTNH.requires_grad:
        return _turn(x_BTNH, cos, sin)
    return _Rotate.apply(x_BTNH, cos, sin)  # type: ignore[return-value]


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int = 1) -> Tensor:
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin, value=sign)


class _Rotate(torch.autograd.Function):
    """The way back is the turn by the opposite angle; nothing of x is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, sin, sign=-1), None, None


class Sinusoidal(Position):
    """Fixed vectors: sines in the even channels, cosines in the odd ones."""

    def __init__(self, dim: int, *, theta: float) -> None:
        super().__init__()
        self.dim, self.theta = dim, theta

    def embed(self, span: Span) -> Float[Tensor, "*b T D"]:
        exponent = torch.arange(0, self.dim, 2, device=span.device).float() / self.dim
        angle = span.index_in_document()[..., None].float() / self.theta**exponent
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


class ALiBi(Position):
    """A fixed slope per head."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.slopes = alibi_slopes(num_heads)
        self._on: dict[torch.device, Tensor] = {}

    def bias(self, span: Span) -> Float[Tensor, "N T S"]:
        return _linear_bias(self.slopes, self._on, span)


class RoPEALiBi(RoPE):
    """RoPE's rotation with ALiBi's bias."""

    def __init__(self, head_dim: int, *, theta: float, slopes: list[float]) -> None:
        super().__init__(head_dim, theta=theta)
        self.slopes = slopes
        self._on: dict[torch.device, Tensor] = {}

    def bias(self, span: Span) -> Float[Tensor, "N T S"]:
        return _linear_bias(self.slopes, self._on, span)


def _linear_bias(slopes: list[float], on: dict[torch.device, Tensor], span: Span) -> Float[Tensor, "N T S"]:
    """-slope · distance for every head, query and key. `on` keeps the slopes on each device: a GPU has to be waited for
    at every copy from the host."""
    if span.device not in on:
        with torch.inference_mode(False):       # as in RoPE
            on[span.device] = torch.tensor(slopes, device=span.device)
    index_S = torch.arange(span.end, device=span.device)
    distance_TS = index_S - index_S[span.length:, None]
    return on[span.device][:, None, None] * distance_TS.float()


def alibi_slopes(num_heads: int) -> list[float]:
    """2^(-8/n), 2^(-16/n), … for n heads; between powers of two, every other slope of the next power fills
    up."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(num_heads - power)]

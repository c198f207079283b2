"""Mixture of experts: a router sends each token to a few of many feed-forwards (Shazeer et al. 2017, arXiv:1701.06538).

Tokens are sorted by expert, so that each expert's tokens lie together and all experts take part in one grouped product.
The sort is stable, no token is dropped and nothing is added up in an order of chance: results do not depend on threads.

E experts, M tokens of all rows, k experts chosen by each, R = M·k rows of tokens sorted by expert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Generator, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dougong.core.config import config
from dougong.core.errors import ConfigError
from dougong.nn.feed_forward import MULTIPLE_OF, SwiGLU
from dougong.nn.init import FanIn, Init
from dougong.nn.linear import Linear
from dougong.nn.ranges import Count, Positive
from dougong.runtime.collectives import all_sum

Exchange = Callable[["Experts", Tensor, Tensor], Tensor]
"""(experts, rows sorted by expert, where each expert's end) -> rows: how rows reach experts held elsewhere"""


@config
class MoEConfig:
    """Experts are SwiGLUs; some may be shared by all tokens (DeepSeekMoE: arXiv:2401.06066)."""

    kind: Literal["moe"] = "moe"
    num_experts: Count = 8
    """experts that the router chooses from"""
    top_k: Count = 2
    """experts that each token visits"""
    ffn_dim: Count | None = None
    """inner width of an expert; derived: 8/3 of the model's width over the experts a token visits, rounded up to 64, so
    a token costs what it costs in a dense SwiGLU"""
    shared_experts: Annotated[int, Field(ge=0)] = 0
    """experts that every token visits, unweighted: one SwiGLU of so many times ffn_dim"""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """how the router's outputs become scores: against each other, or each alone (DeepSeek-V3: arXiv:2412.19437)"""
    normalised: bool = True
    """the scores of a token's experts are divided by their sum"""
    scale: Positive = 1.0
    """factor on the chosen experts' outputs (2.5 in DeepSeek-V3)"""
    balance: Literal["bias", "none"] = "bias"
    """bias: what the router chooses by is moved after each step towards equal loads, without a loss of its own (Wang et
    al. 2024, arXiv:2408.15664); none: loads are left to the gradient"""
    balance_rate: Positive = 1e-3
    """how far a step moves the bias"""

    def width(self, dim: int) -> int:
        visited = 3 * MULTIPLE_OF * (self.top_k + self.shared_experts)
        return self.ffn_dim or -(-8 * dim // visited) * MULTIPLE_OF

    def build(self, *, dim: int, init: Init | None = None, output_init: Init | None = None) -> "MoE":
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k} of num_experts={self.num_experts}: a token cannot visit more "
                              f"experts than there are. Try top_k={min(2, self.num_experts)}.")
        return MoE(self, dim=dim, init=init, output_init=output_init)


class MoE(nn.Module):
    """Router, experts, and the experts that all share.

    `exchange` (None: this process holds all experts) is how rows reach experts on other processes.
    """

    balance_bias: Tensor | None
    """what is added to the scores by which experts are chosen (E)"""
    load: Tensor | None
    """tokens that chose each expert since the last step (E)"""

    def __init__(self, section: MoEConfig, *, dim: int, init: Init | None, output_init: Init | None) -> None:
        super().__init__()
        self.section, self.top_k = section, section.top_k
        E, width = section.num_experts, section.width(dim)
        self.router = Linear(dim, E, init=init)
        self.experts = Experts(E, dim, width, init=init, output_init=output_init)
        self.shared = SwiGLU(dim, section.shared_experts * width, bias=False, init=init, output_init=output_init) \
            if section.shared_experts else None
        balanced = section.balance == "bias"
        self.register_buffer("balance_bias", torch.zeros(E) if balanced else None)
        self.register_buffer("load", torch.zeros(E) if balanced else None, persistent=False)
        self.exchange: Exchange | None = None

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        x_MD = x_BTD.flatten(0, -2)
        weight_Mk, expert_Mk = self.route(x_MD)
        sorted_R, order_R = expert_Mk.flatten().sort(stable=True)
        place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
        experts_E = torch.arange(self.section.num_experts, device=sorted_R.device)
        ends_E = torch.searchsorted(sorted_R, experts_E, right=True, out_int32=True)
        if self.load is not None and self.training and torch.is_grad_enabled():
            self.load.add_(ends_E.diff(prepend=ends_E.new_zeros(1)))
        rows_RD = take_rows(x_MD, order_R, place_R, self.top_k)
        rows_RD = self.experts(rows_RD, ends_E) if self.exchange is None else \
            self.exchange(self.experts, rows_RD, ends_E)
        y_MkD = take_rows(rows_RD, place_R, order_R, 1).unflatten(0, expert_Mk.shape)
        y_BTD = (y_MkD * weight_Mk.to(y_MkD.dtype)[..., None]).sum(1).view_as(x_BTD)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)

    def route(self, x_MD: Float[Tensor, "M D"]) -> tuple[Float[Tensor, "M k"], Int[Tensor, "M k"]]:
        """Weights and numbers of each token's experts; scores are computed in float32 at least."""
        logits_ME = self.router(x_MD.to(torch.promote_types(x_MD.dtype, torch.float32)))
        score_ME = logits_ME.softmax(-1) if self.section.score == "softmax" else logits_ME.sigmoid()
        wanted_ME = score_ME if self.balance_bias is None else score_ME + self.balance_bias
        expert_Mk = wanted_ME.topk(self.top_k, dim=-1).indices
        weight_Mk = score_ME.gather(1, expert_Mk)
        if self.section.normalised:     # sigmoids may all be near 0
            weight_Mk = weight_Mk / weight_Mk.sum(-1, keepdim=True).clamp(min=1e-20)
        return weight_Mk * self.section.scale, expert_Mk

    @torch.no_grad()
    def after_step(self, group: Any, *, applied: bool) -> None:
        """Moves the bias of experts below the mean load up and of those above it down (arXiv:2408.15664, algorithm 1).

        `group` are the processes that read other tokens: all agree on the loads of the global batch. A step that was
        not `applied` (its loss was not finite) moves nothing.
        """
        if self.balance_bias is None or self.load is None:
            return
        load_E = all_sum(self.load, group)
        if applied:
            self.balance_bias += self.section.balance_rate * (load_E.mean() - load_E).sign()
        self.load.zero_()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    def extra_repr(self) -> str:
        return f"{self.top_k} of {self.section.num_experts}, {self.section.score}, balance={self.section.balance}"


class Experts(nn.Module):
    """E SwiGLUs as three stacks of matrices; each matrix is a matrix of its own to `init` and to Muon."""

    def __init__(self, num_experts: int, dim: int, ffn_dim: int, *, init: Init | None,
                 output_init: Init | None) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(num_experts, ffn_dim, dim))
        self.up = nn.Parameter(torch.empty(num_experts, ffn_dim, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, ffn_dim))
        into, out = EachMatrix(init or FanIn()), EachMatrix(output_init or FanIn())
        self.init = {"gate": into, "up": into, "down": out}

    def forward(self, x_RD: Float[Tensor, "R D"], ends_E: Int[Tensor, "E"]) -> Float[Tensor, "R D"]:
        """Rows of expert e end before row `ends_E[e]` and begin where those of the expert before it end."""
        gate_EFD, up_EFD, down_EDF = (_held(stack).to(x_RD.dtype) for stack in (self.gate, self.up, self.down))
        hidden_RF = F.silu(grouped_product(x_RD, gate_EFD, ends_E)) * grouped_product(x_RD, up_EFD, ends_E)
        return grouped_product(hidden_RF, down_EDF, ends_E)

    def extra_repr(self) -> str:
        experts, width, dim = self.gate.shape
        return f"{experts} x ({dim} -> {width} -> {dim})"


def _held(stack: Tensor) -> Tensor:
    """Of a stack that lies on several processes (a DTensor), the experts that this one holds."""
    return stack.to_local() if hasattr(stack, "to_local") else stack  # type: ignore[attr-defined]


@dataclass(frozen=True)
class EachMatrix:
    """A stack of matrices, each filled by `rule` from its own inputs."""

    rule: Init

    def __call__(self, parameter: Tensor, generator: Generator) -> None:
        for matrix in parameter:
            self.rule(matrix, generator)


def grouped_product(x_RI: Float[Tensor, "R I"], weight_EOI: Float[Tensor, "E O I"],
                    ends_E: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
    """Each expert's rows times its matrix: one grouped kernel where PyTorch has it, else a product for each expert
    (which waits for the device once, to know how many rows there are)."""
    if _has_kernel(x_RI, weight_EOI):
        return F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=ends_E)
    if is_shape_only(x_RI):    # any division of the rows will do
        counts = [len(x_RI)] + [0] * (len(weight_EOI) - 1)
    else:
        counts = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    return torch.cat([F.linear(rows, matrix) for rows, matrix in zip(x_RI.split(counts), weight_EOI)])


def _has_kernel(x_RI: Tensor, weight_EOI: Tensor) -> bool:
    """`grouped_mm` wants rows whose bytes are a multiple of 16, in its backward also those of the outputs, and knows
    three types; its shape rule, which tracing asks, knows bf16 alone."""
    aligned = all(width * x_RI.element_size() % 16 == 0 for width in weight_EOI.shape[1:])
    there = x_RI.device.type == "cpu" or (
        x_RI.device.type == "cuda" and torch.cuda.get_device_capability(x_RI.device) >= (8, 0))
    traced = torch.compiler.is_compiling() or is_shape_only(x_RI)
    known = x_RI.dtype == torch.bfloat16 if traced else x_RI.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return there and aligned and known and len(x_RI) > 0


def is_shape_only(x: Tensor) -> bool:
    """Whether x has no numbers, as in a plan."""
    return x.device.type == "meta" or isinstance(x, FakeTensor)


def take_rows(x: Tensor, order_R: Tensor, place_R: Tensor, copies: int) -> Tensor:
    """Row i of the result is row `order_R[i] // copies` of x; `place_R` is the inverse of `order_R`."""
    return _TakeRows.apply(x, order_R, place_R, copies)  # type: ignore[return-value]


class _TakeRows(torch.autograd.Function):
    """A permutation of copies. Its way back is the inverse and a sum over copies that lie side by side: index_select's
    own would add in the order in which threads arrive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.copies = copies
        return x.index_select(0, order if copies == 1 else order // copies)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (place,) = ctx.saved_tensors
        back = gradient.index_select(0, place)
        return back if ctx.copies == 1 else back.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None

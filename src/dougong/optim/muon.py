"""Muon: momentum whose update is orthogonalised, matrix by matrix (Jordan et al. 2024,
kellerjordan.github.io/posts/muon).

Matrices of one shape are stacked and orthogonalised by one batched product, so a deep narrow model costs a
few large operations instead of many small ones. What is not a hidden matrix takes AdamW inside the same
optimiser object, with one `state_dict`.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adamw import adamw

from dougong.runtime.parts import local

# steepest at zero while mapping [0, 1] into about [0.7, 1.2] (the post)
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7

Scale = Literal["original", "match_rms_adamw"]


def orthogonalise(x_KMN: Float[Tensor, "K M N"], *, steps: int = 5) -> Float[Tensor, "K M N"]:
    """Newton–Schulz: replaces the singular values of each matrix by about 1, computing in the dtype it is
    given."""
    a, b, c = _COEFFICIENTS
    wide = x_KMN.shape[1] <= x_KMN.shape[2]
    x = x_KMN / torch.linalg.vector_norm(x_KMN, dim=(1, 2), keepdim=True).clamp(min=_EPS)
    for _ in range(steps):      # the Gram matrix of the short side; multiplied from that side
        gram = x @ x.mT if wide else x.mT @ x
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a) if wide else torch.baddbmm(x, x, gram, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Groups with `algorithm="muon"` hold matrices (or stacks of them) and take Muon; those with `"adamw"` take
    torch's fused AdamW.

    Momentum is an exponential average, as in torch.optim.Muon. `dtype` is the type of the Newton–Schulz
    products; momentum stays in the parameter's. With `cautious` weight decay falls only on entries that the
    update shrinks too (Chen et al. 2025, arXiv:2510.12402).
    """

    _step_supports_amp_scaling = True
    """torch's sign that `found_inf`, a 0 or 1 on the device, decides whether the step is taken"""
    found_inf: Tensor | None = None

    def __init__(self, groups: Iterable[dict[str, Any]], *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(groups, {})
        self.dtype = dtype
        for group in self.param_groups:
            assert group["algorithm"] in ("muon", "adamw")
            assert group["algorithm"] == "adamw" or all(p.ndim in (2, 3) for p in group["params"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which knows of no fused AdamW here and would leave its counts of steps on the host."""
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            if "step" in state:
                state["step"] = state["step"].to(p.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the loop computes gradients before the step"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters and group["algorithm"] == "muon":
                self._muon(group, parameters)
            elif parameters:
                self._adamw(group, parameters)

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [local(self.state[p]["momentum"]) for p in parameters]
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        if self.found_inf is not None:      # a step left out: the average moves towards itself
            gradients = [torch.where(self.found_inf > 0, m, g) for m, g in zip(momenta, gradients)]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        for members in _alike(parameters):
            stacked = _stack([updates[i] for i in members], self.dtype)
            for i, update in zip(members, self._orthogonal(stacked, parameters[members[0]], group["steps"]).unbind()):
                self._move(group, parameters[i], update)

    def _orthogonal(self, stacked: Tensor, like: Tensor, steps: int) -> Tensor:
        """The stacked updates of parameters that lie `like` one of them, orthogonalised.

        Matrices in parts are exchanged so that each process gets whole ones, an equal share of them, and go back when
        done: no process orthogonalises what another does. A parameter of three axes is a stack of matrices already,
        divided, if at all, between them.
        """
        if like.ndim == 3:
            return orthogonalise(stacked.flatten(0, 1), steps=steps).view_as(stacked)
        if local(like) is like:
            return orthogonalise(stacked, steps=steps)
        from dougong.optim.divided import whole_matrices

        return whole_matrices(stacked, like, lambda whole: orthogonalise(whole, steps=steps))

    def _move(self, group: dict[str, Any], parameter: Tensor, update: Tensor) -> None:
        p, decay = local(parameter), group["lr"] * group["weight_decay"]
        kept: Any = 1 - decay
        if self.found_inf is not None:
            update = torch.where(self.found_inf > 0, 0.0, update)
            kept = torch.where(self.found_inf > 0, 1.0, kept)
        if decay and group["cautious"]:
            p.sub_(p * (p * update > 0), alpha=decay)
        elif decay:
            p.mul_(kept)
        p.add_(update, alpha=-group["lr"] * _rate_scale(group["scale"], parameter.shape[-2:]))

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if "step" not in self.state[p]:
                self.state[p].update(step=torch.zeros((), dtype=torch.float32, device=p.device),
                                     exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        states = [self.state[p] for p in parameters]
        adamw([local(p) for p in parameters], [local(p.grad) for p in parameters],  # type: ignore[arg-type]
              [local(s["exp_avg"]) for s in states], [local(s["exp_avg_sq"]) for s in states], [],
              [s["step"] for s in states],
              fused=True, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
              weight_decay=group["weight_decay"], eps=group["eps"], maximize=False, found_inf=self.found_inf)


def _alike(parameters: list[Tensor]) -> list[list[int]]:
    """Indices grouped by shape (and by how they lie on processes), in the order of first appearance."""
    kinds: dict[Any, list[int]] = {}
    for index, p in enumerate(parameters):
        lying = (p.shape, getattr(p, "device_mesh", None), getattr(p, "placements", None))
        kinds.setdefault(lying, []).append(index)
    return list(kinds.values())


def _stack(updates: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The updates as one (K M N), cast while they are copied."""
    stacked = torch.empty(len(updates), *updates[0].shape, dtype=dtype, device=updates[0].device)
    torch._foreach_copy_(list(stacked.unbind()), updates)
    return stacked


def _rate_scale(scale: Scale, shape: torch.Size) -> float:
    """`original`: √max(1, rows/columns). `match_rms_adamw`: 0.2 √max(rows, columns), so that AdamW's rates
    and decays carry over (Liu et al. 2025, arXiv:2502.16982, section 2.2)."""
    rows, columns = shape
    return math.sqrt(max(1.0, rows / columns)) if scale == "original" else 0.2 * math.sqrt(max(rows, columns))

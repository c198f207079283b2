"""One reference in one process, and the same steps under any layout: everything a step computes is compared.

    trace = reference(case)
    check(trace, run_processes(layout.processes, divided, case, layout))

Losses alone prove little: AdamW hides a gradient that is twice as large. So each step's metrics, every whole gradient
before clipping, its norm, and every weight afterwards are compared, under the names of the undivided model, on every
process that holds them. NaN equals nothing.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dougong.core.config import replace
from dougong.data.batch import Batch
from dougong.models.compose import DecoderConfig
from dougong.nn.attention import AttentionConfig
from dougong.nn.feed_forward import SwiGLUConfig
from dougong.nn.float8 import multiply_in_float8
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.optim.build import AdamWConfig
from dougong.optim.schedules import ConstantConfig
from dougong.runtime.collectives import all_sum
from dougong.runtime.device import Runtime, RuntimeConfig
from dougong.runtime.layout import DATA, LayoutConfig
from dougong.train.state import TrainState
from dougong.train.step import GradientFunction, plain_gradients, take_step

CPU = RuntimeConfig(device="cpu", precision="fp32", threads=1)
LOSS_TOLERANCE, GRADIENT_TOLERANCE, WEIGHT_TOLERANCE = 1e-6, 1e-5, 1e-5
ADAMW = AdamWConfig(lr=1e-2, eps=1e-3)
"""with the usual eps an element whose gradient is rounding noise would move by the whole rate"""


def decoder(**changes: Any) -> DecoderConfig:
    """Qwen3's shape, small: grouped heads, QK-norm, tied; weights wide enough that every part matters."""
    heads = AttentionConfig(num_heads=4, num_kv_heads=2, qk_norm="learned")
    base = DecoderConfig(vocab_size=96, context=16, dim=32, num_layers=2, attention=heads,
                         feed_forward=SwiGLUConfig(ffn_dim=64), init_std=None, embedding_std=0.5)
    return replace(base, **changes)


@dataclass(frozen=True)
class Case:
    """What is trained, on what, and how: everything but the layout."""

    model: Any = field(default_factory=decoder)
    objective: Any = field(default_factory=CausalLMConfig)
    optimizer: Any = ADAMW
    rows: int = 8
    """of the global batch"""
    T: int = 16
    packed: bool = False
    """three documents in each row"""
    micro_batches: int = 1
    steps: int = 2
    clip_norm: float = 1.0
    checkpoint_activations: str = "none"
    compiled: bool = False
    """each layer, where the model is divided"""
    float8: bool = False
    seed: int = 0

    def batch(self, step: int) -> Batch:
        """The global batch of a step: each token has its own weight, some have none, the last row is mostly padding."""
        draw = torch.Generator().manual_seed(1000 * self.seed + step)
        vocabulary = self.model.vocab_size
        tokens = torch.randint(vocabulary, (self.rows, self.T + 1), generator=draw)
        weight = torch.rand(self.rows, self.T, generator=draw).round(decimals=2)
        weight[-1, self.T // 4:] = 0.0
        fields = {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous(), "weight": weight}
        if self.packed:
            ends = torch.randint(1, self.T, (self.rows, 2), generator=draw)
            fields["segment"] = (torch.arange(self.T)[None, :, None] >= ends[:, None]).sum(-1)
        return Batch(**fields)


@dataclass
class Step:
    """What one step computed; tensors whole, by name."""

    metrics: dict[str, float]
    grad_norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    skipped: str | None = None


Trace = list[Step]


def reference(case: Case) -> Trace:
    """The steps in one process, whole batch at once, nothing divided."""
    return _train(case, _build(case), Runtime.start(CPU), plain_gradients, micro_batches=1)


def divided(case: Case, layout: LayoutConfig, fault: Callable[[nn.Module], Any] | None = None) -> Trace:
    """This process's part of the same steps; to be run by `run_processes`.

    `fault(model)` plants something wrong: it is called between the gradients and the step.
    """
    from dougong.parallel.parallelize import parallelize

    runtime = Runtime.start(CPU, layout)
    with torch.device("meta"):
        model = _build(case)
    parallel = parallelize(model, case.objective.build(), runtime, micro_batches=case.micro_batches,
                           compile=_compile if case.compiled else None)
    return _train(case, parallel.model.to_empty(device="cpu"), runtime, parallel.gradients,
                  micro_batches=case.micro_batches, fault=fault)


def _build(case: Case) -> Any:
    model = case.model.build()
    if case.float8:
        multiply_in_float8(model)
    return model


def check(expected: Trace, traces: Sequence[Trace]) -> None:
    """Fails with everything that differs: every process is held against the reference, and together they must hold
    every name."""
    wrong = list(_differences(expected, traces))
    assert not wrong, "\n".join(wrong[:40])


def _train(case: Case, model: nn.Module, runtime: Runtime, gradients: GradientFunction, *, micro_batches: int,
           fault: Callable[[nn.Module], Any] | None = None) -> Trace:
    model.initialise(case.seed)
    model.train()
    for module in model.modules():
        if hasattr(module, "checkpoint_activations"):
            module.checkpoint_activations = case.checkpoint_activations
    state = TrainState(model, case.optimizer.build(model), ConstantConfig().build(case.steps), loader=_no_loader())
    objective, mesh, trace = case.objective.build(), runtime.mesh, []
    for number in range(case.steps):
        seen: dict[str, Tensor] = {}

        def recording(*arguments: Any, seen: dict[str, Tensor] = seen) -> Any:
            losses = gradients(*arguments)
            if fault is not None:
                fault(model)
            seen.update({name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})
            return losses

        batch = _slice(case.batch(number), mesh.data_rank, mesh.data_size)
        weight = float(all_sum(torch.tensor(objective.weight(batch), dtype=torch.float64), mesh.group(*DATA)))
        result = take_step(state, objective, batch, runtime, weight=weight, micro_rows=batch.rows // micro_batches,
                           clip_norm=case.clip_norm, gradients=recording)
        state.step += 1
        trace.append(Step(result.metrics, result.grad_norm, seen,
                          {name: _whole(p) for name, p in model.named_parameters()}, result.skipped))
    return trace


def _compile(model: nn.Module) -> None:
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)      # shape checks cannot be traced; this process was forked
    for block in model.get_submodule("stack").children():
        block.compile(backend="aot_eager", fullgraph=True)


def _slice(batch: Batch, rank: int, size: int) -> Batch:
    return batch.split(batch.rows // size)[rank]


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def _no_loader() -> Any:
    return None


def _differences(expected: Trace, traces: Sequence[Trace]) -> Iterator[str]:
    for rank, trace in enumerate(traces):
        if len(trace) != len(expected):
            yield f"rank {rank}: {len(trace)} steps, {len(expected)} expected"
    for number, want in enumerate(expected):
        for rank, trace in enumerate(traces):
            got, place = trace[number], f"step {number}, rank {rank}"
            if got.skipped or want.skipped:
                yield f"{place}: skipped ({got.skipped}; the reference: {want.skipped})"
            yield from _names(place, want.metrics, got.metrics)
            pairs = [(f"{place}, {name}", got.metrics[name], want.metrics[name], LOSS_TOLERANCE)
                     for name in want.metrics.keys() & got.metrics.keys()]
            pairs.append((f"{place}, gradient norm", got.grad_norm, want.grad_norm, GRADIENT_TOLERANCE))
            for what, value, right, tolerance in pairs:
                if not math.isclose(value, right, rel_tol=tolerance):       # false for NaN
                    yield f"{what}: {value!r}, expected {right!r}"
            yield from _tensors(f"{place}, gradient of", want.gradients, got.gradients, GRADIENT_TOLERANCE,
                                noise=1e-3 * want.grad_norm)
            yield from _tensors(f"{place}, weight", want.weights, got.weights, WEIGHT_TOLERANCE, noise=1e-2)
        for what in ("gradients", "weights"):
            together = {name for trace in traces for name in getattr(trace[number], what)}
            yield from _names(f"step {number}, {what} of all processes", getattr(want, what), together)


def _names(what: str, want: Any, got: Any) -> Iterator[str]:
    missing, extra = sorted(set(want) - set(got)), sorted(set(got) - set(want))
    if missing or extra:
        yield f"{what}: missing {missing}, extra {extra}"


def _tensors(what: str, want: dict[str, Tensor], got: dict[str, Tensor], tolerance: float, *,
             noise: float) -> Iterator[str]:
    """Differences are measured against the tensor's largest element, but against `noise` where that is smaller: some
    gradients are 0 but for rounding (a key's bias moves all scores alike). A single number is one sum of terms that
    cancel, so it is measured against a thousand times that."""
    for name in want.keys() & got.keys():
        if want[name].shape != got[name].shape:
            yield f"{what} {name}: shape {tuple(got[name].shape)}, expected {tuple(want[name].shape)}"
            continue
        error, size = float((got[name] - want[name]).abs().max()), float(want[name].abs().max())
        if not error <= tolerance * max(size, noise * (1 if want[name].ndim else 1000)):       # true for NaN
            yield f"{what} {name}: differs by {error:.3g} of {size:.3g}"

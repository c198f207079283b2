"""The real divided model on fake tensors: what one process of thousands holds and sends, without another process.

`parallelize` divides the model over a process group that answers at once and moves nothing; one forward and backward
run on tensors without values under a counter. Memory and messages are linear in layers, so two shallow models tell of a
deep one. Not simulated: passing activations through pipeline stages (a stage is simulated by itself, and its
micro-batches in flight are multiplied), the optimiser's step (its state is added), fragmentation, time.
"""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dougong.adapt.lora import hold_frozen
from dougong.core.config import replace
from dougong.data.batch import Batch
from dougong.parallel.data import CopiedGradients
from dougong.parallel.gradients import plain_gradients
from dougong.parallel.parallelize import parallelize
from dougong.plan.counts import FP32, Counts
from dougong.plan.memory_counter import MemoryCounter
from dougong.plan.schedule import pipeline
from dougong.plan.stand_ins import kernels_of
from dougong.plan.step import period_of
from dougong.plan.work import Work
from dougong.runtime.device import Runtime
from dougong.runtime.layout import LayoutConfig
from dougong.runtime.mesh import Mesh

_SHALLOW = 4
"""layers from which FSDP gathers one while it computes another, as it goes on to do in all of a deep model"""


@dataclass(frozen=True)
class Simulated:
    """Of one process: bytes at the peak (optimiser state included, no allowance), kept activations, and messages."""

    peak_bytes: float
    weights: float
    kept: float
    messages: dict[str, float] = field(default_factory=dict)
    """collective -> how many in one micro-batch's forward and backward"""
    message_bytes: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def combine(self, other: "Simulated", factor: float) -> "Simulated":
        """self + factor · (self - other), every figure by itself."""
        def line(a: float, b: float) -> float:
            return a + factor * (a - b)

        names = {*self.messages, *other.messages}
        return Simulated(
            line(self.peak_bytes, other.peak_bytes), line(self.weights, other.weights), line(self.kept, other.kept),
            {n: line(self.messages.get(n, 0), other.messages.get(n, 0)) for n in names},
            {n: line(self.message_bytes.get(n, 0), other.message_bytes.get(n, 0)) for n in names})


def simulate(work: Work, layout: LayoutConfig, *, checkpoint: str, micro_rows: int, micro_batches: int) -> Simulated:
    """One process of a layout, from models of two depths. Raises AssertionError inside a process group."""
    begin = time.perf_counter()
    counts = Counts(work.step())
    each = pipeline(layout.schedule, layout.pipeline, micro_batches) if layout.pipeline > 1 else None
    stage = replace(layout, pipeline=1)
    layers = -(-counts.layers // layout.pipeline)
    period = period_of(work.model)
    few = period * -(-_SHALLOW // period)
    more = few + max(2, period)
    with fake_processes(stage):
        runtime = _runtime(work, stage)
        _run(work, runtime, checkpoint, micro_rows, micro_batches, period)     # DTensor's rules, tried on whole shapes
        if layers <= more:
            found = _run(work, runtime, checkpoint, micro_rows, micro_batches, layers)
        else:
            a, b = (_run(work, runtime, checkpoint, micro_rows, micro_batches, n) for n in (few, more))
            found = b.combine(a, (layers - more) / (more - few))
    state = found.weights / counts.weight_bytes * FP32 * counts.optimizer_copies
    waiting = 0.0 if each is None else (each.in_flight[0] / each.stages_each - 1) * found.kept
    return dataclasses.replace(found, peak_bytes=found.peak_bytes + state + waiting,
                               seconds=time.perf_counter() - begin)


@contextlib.contextmanager
def fake_processes(layout: LayoutConfig) -> Iterator[None]:
    """This process as the first of many that do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a simulation makes its own processes"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _runtime(work: Work, layout: LayoutConfig) -> Runtime:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[work.precision]
    return Runtime(device=torch.device("cpu"), dtype=dtype, mesh=Mesh.start(layout, "cpu"))


def _run(work: Work, runtime: Runtime, checkpoint: str, micro_rows: int, micro_batches: int,
         layers: int) -> Simulated:
    with torch.device("meta"):
        model = replace(work.model, num_layers=layers).build()
    model.compute_dtype = runtime.dtype
    if work.adapt is not None:
        hold_frozen(work.adapt.apply(model, seed=0))
    if checkpoint != "none":
        model.stack.checkpoint_activations = checkpoint
    objective = work.objective.build()
    divided = parallelize(model.train(), objective, runtime)
    counter, fake = MemoryCounter(), FakeTensorMode(allow_non_fake_inputs=True)
    with kernels_of(work.device), fake:
        materialise(divided.model)
        with counter:
            parameters = list(divided.model.parameters())
            counter.label(parameters, "weights")
            weights = counter.now["weights"]
            batches = [_batch(work, micro_rows) for _ in range(min(2, micro_batches))]
            kept = _observed(objective, counter)
            # copies hold what one process holds; DDP waits for answers that nobody gives
            gradients = plain_gradients if isinstance(divided.gradients, CopiedGradients) else divided.gradients
            gradients(divided.model, kept, batches, 2.0, runtime)   # type: ignore[arg-type]
    share = 1 / len(batches)
    return Simulated(counter.peak_bytes, weights, kept.bytes, _named(counter.collectives, share),
                     _named(counter.collective_bytes, share))


class _observed:
    """The objective, and the activations held when its forward is done."""

    def __init__(self, objective: Any, counter: MemoryCounter) -> None:
        self.objective, self.counter, self.bytes = objective, counter, 0.0
        self.not_additive = objective.not_additive

    def losses(self, model: nn.Module, batch: Batch) -> Any:
        self.counter.kind = "activations"
        before = self.counter.now["activations"]
        losses = self.objective.losses(model, batch)
        self.bytes = self.counter.now["activations"] - before
        self.counter.kind = "temporary"
        return losses


def materialise(model: nn.Module) -> None:
    """Gives parameters and buffers of the meta device fake storage on the CPU, parts of DTensors as well; FSDP is told.

    `to_empty` cannot: torch does not swap tensors that a fake mode watches.
    """
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in known:
                    known[id(parameter)] = _fake(parameter)
                module._parameters[name] = known[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    for module in model.modules():
        state = module._get_fsdp_state() if isinstance(module, FSDPModule) else None
        for group in getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]:
            for parameter in group.fsdp_params if group is not None else ():
                parameter.reset_sharded_param()


def _fake(parameter: nn.Parameter) -> nn.Parameter:
    if isinstance(parameter, DTensor):
        local = torch.empty_like(parameter._local_tensor, device="cpu")
        data: Tensor = DTensor(local, parameter._spec, requires_grad=False)   # type: ignore[call-arg]
    else:
        data = torch.empty_like(parameter.detach(), device="cpu")
    fresh = nn.Parameter(data, requires_grad=parameter.requires_grad)
    vars(fresh).update(vars(parameter))   # type: ignore[union-attr]
    return fresh


def _batch(work: Work, rows: int) -> Batch:
    tokens = torch.zeros(rows, work.context, dtype=torch.long)
    return Batch(tokens=tokens, targets=torch.zeros_like(tokens), weight=torch.ones(rows, work.context))


def _named(counts: Counter[tuple[str, str]], share: float) -> dict[str, float]:
    named: Counter[str] = Counter()
    for (_, name), value in counts.items():
        named[name] += value * share   # type: ignore[assignment]
    return dict(named)

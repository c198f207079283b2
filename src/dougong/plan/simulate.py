"""The real divided model on fake tensors: what one process of thousands holds and sends, without another process.

`parallelize` divides the model over a process group that answers at once and moves nothing; one forward and backward
run on tensors without values under a counter. Memory and messages are linear in layers, so two shallow models tell of a
deep one. Of a pipeline the process that holds most is simulated by itself, with the layers and the ends that training
gives it, and its micro-batches in flight are multiplied; processes beside it that only copy, or take stretches of rows,
are taken for copies, though training divides weights along `context` there. Not simulated: passing activations from
stage to stage, the optimiser's step (its state is added), fragmentation, time.
"""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
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
from dougong.objectives.losses import Losses
from dougong.parallel.data import CopiedGradients
from dougong.parallel.gradients import plain_gradients
from dougong.parallel.parallelize import parallelize
from dougong.parallel.pipeline import split
from dougong.plan.counts import FP32, Counts
from dougong.plan.memory import Part, heaviest
from dougong.plan.memory_counter import MemoryCounter
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
    held = heaviest(counts, layout, checkpoint, micro_rows, micro_batches, gpu=False, ema=work.ema)
    layers = held.part.layers
    beside = layout if layout.pipeline == 1 else replace(layout, pipeline=1, gathered="step")
    period = period_of(work.model)
    few = period * -(-_SHALLOW // period)
    more = few + max(2, period)
    with fake_processes(beside):
        run = partial(_run, work, layout, held.part, _runtime(work, beside), checkpoint, micro_rows, micro_batches)
        shallow = run(min(period, layers))      # DTensor's rules, tried on whole shapes
        if layers <= more:
            found = run(layers)
        else:
            a, b = (run(n) for n in (few, more))
            found = b.combine(a, (layers - more) / (more - few))
    state = found.weights / counts.weight_bytes * FP32 * counts.optimizer_copies
    each = (found.kept - shallow.kept) / (layers - period) if layers > period else found.kept / layers
    ends, of_ends = found.kept - layers * each, held.in_flight[-1 if held.part.last else 0]
    waiting = (held.part.layer_forwards(held.in_flight) - layers) * each + max(0, of_ends - 1) * ends
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


def _run(work: Work, layout: LayoutConfig, part: Part, runtime: Runtime, checkpoint: str, micro_rows: int,
         micro_batches: int, layers: int) -> Simulated:
    model = _model(work, layout, part, micro_batches, layers)
    model.compute_dtype = runtime.dtype
    if work.adapt is not None:
        hold_frozen(work.adapt.apply(model, seed=0))
    if checkpoint != "none":
        model.stack.checkpoint_activations = checkpoint
    objective: Any = _StageObjective(work.objective.build(), part, layout)
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


def _model(work: Work, layout: LayoutConfig, part: Part, micro_batches: int, layers: int) -> Any:
    """So many layers on the meta device; of a pipeline, of those that one process has, with its ends."""
    with torch.device("meta"):
        model = (work.model if layout.pipeline > 1 else replace(work.model, num_layers=layers)).build()
    if layout.pipeline > 1:
        place: Any = SimpleNamespace(layout=layout, rank=lambda axis: part.process)
        split(model, place, micro_batches=micro_batches)
        for container in (model.stack, model.stem.values):
            for name in set(container) - set(sorted(model.stack, key=int)[:layers]):
                del container[name]
    return model


class _StageObjective:
    """The objective where a process computes the loss; else the sum of what it passes on, of which every number has a
    gradient too. What arrives from the stage before is made here."""

    def __init__(self, objective: Any, part: Part, layout: LayoutConfig) -> None:
        self.objective, self.part, self.not_additive = objective, part, objective.not_additive
        self.slices = layout.tensor if layout.sequence_parallel else 1

    def losses(self, model: Any, batch: Batch) -> Losses:
        if self.part.first and self.part.last:
            return self.objective.losses(model, batch)
        carry = None if self.part.first else (self._arrived(model, batch["tokens"]),) * 2
        if self.part.last:
            rest: Any = _Rest(model, carry)
            return self.objective.losses(rest, batch)
        return Losses({"model": model.hidden(batch["tokens"], carry=carry).sum()}, {})

    def _arrived(self, model: Any, tokens_BT: Tensor) -> Tensor:
        B, T = tokens_BT.shape
        return torch.empty(B, T // self.slices, model.config.decoder().dim, dtype=model.compute_dtype,
                           requires_grad=True)


class _Rest:
    """What an objective takes for a whole model: the layers of a last stage, going on from what arrived."""

    def __init__(self, model: Any, carry: Any) -> None:
        self._model, self._carry = model, carry

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def hidden(self, tokens_BT: Tensor, *, segment_BT: Tensor | None = None) -> Tensor:
        return self._model.hidden(tokens_BT, segment_BT=segment_BT, carry=self._carry)


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

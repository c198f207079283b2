"""One training step of one process without any number: the real model, loss and optimiser on the meta device.

Every storage that the step would hold is counted as it comes and goes. Layers are alike, so a deep model is planned
from two shallow ones: memory is linear in layers.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from dougong.adapt.lora import hold_frozen
from dougong.core.config import replace
from dougong.data.batch import Batch
from dougong.models.heads import add_value_head
from dougong.objectives.objective import batch_fields
from dougong.plan.memory_counter import MemoryCounter
from dougong.plan.stand_ins import kernels_of

_SHALLOW = 2


@dataclass(frozen=True)
class Step:
    """What is trained in one step, without the recipe around it: the sections that decide memory and time."""

    model: Any
    objective: Any
    optim: Any
    micro_rows: int
    micro_batches: int = 1
    context: int = 0
    precision: str = "fp32"
    device: str = "cpu"
    checkpoint: str = "none"
    ema: bool = False
    adapt: Any = None

    def shape(self) -> tuple[int, int]:
        return self.micro_rows, self.context or self.model.context


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment of a step when most are held, by kind; `kinds` add up to `peak_bytes`.

    `weights, gradients, optimizer, activations` (kept for the backward pass, casts of weights included), `temporary`
    (what the pass at that moment computes with), `inputs`.
    """

    kinds: dict[str, float]

    @property
    def peak_bytes(self) -> float:
        return sum(self.kinds.values())


def step_memory(step: Step) -> Memory:
    """Peak of one step of one process, from two shallow models where the model is deep and its layers are alike."""
    layers = getattr(step.model, "num_layers", None) or 0
    period = period_of(step.model)
    few, more = _SHALLOW * period, 2 * _SHALLOW * period
    if layers <= more:
        return Memory(dict(count_step(step).at_peak))
    rest = layers % period
    shallow, deeper = (count_step(replace_layers(step, n + rest)).at_peak for n in (few, more))
    slope = {kind: (deeper[kind] - shallow[kind]) / (more - few) for kind in {*deeper, *shallow}}
    return Memory({kind: deeper[kind] + slope[kind] * (layers - more - rest) for kind in slope})


@dataclass(frozen=True)
class Forward:
    """Bytes found in one forward: what it keeps, its peak above that, and what was there before."""

    kept: float
    above: float
    weights: float
    optimizer: float


def count_step(step: Step) -> MemoryCounter:
    """Runs one step (the second, when the optimiser's state exists) on the meta device under a counter."""
    counter, model, objective, optimizer, batches = _ready(step)
    with kernels_of(step.device), counter:
        run_step(counter, model, objective, optimizer, batches)
    return counter


def count_forward(step: Step) -> Forward:
    """Runs one forward with its loss under a counter."""
    counter, model, objective, _, batches = _ready(step)
    with kernels_of(step.device), counter:
        counter.kind = "activations"
        losses = objective.losses(model, batches[0])
        now = counter.now
        found = Forward(now["activations"], counter.peak_bytes - sum(now.values()), now["weights"], now["optimizer"])
        del losses
    return found


def _ready(step: Step) -> tuple[MemoryCounter, Any, Any, Any, list[Batch]]:
    """Counter, model, objective, optimiser and micro-batches before the second step of a run."""
    device, dtype = torch.device("meta"), {"bf16": torch.bfloat16, "fp32": torch.float32}[step.precision]
    with device:
        model = step.model.build().train()
        if outputs := getattr(step.objective, "value_outputs", None):
            add_value_head(model, outputs)
    model.compute_dtype = dtype
    if step.adapt is not None:
        hold_frozen(step.adapt.apply(model, seed=0))
    if step.checkpoint != "none":
        model.stack.checkpoint_activations = step.checkpoint
    optimizer, objective = step.optim.build(model), step.objective.build()
    counter = MemoryCounter()
    with kernels_of(step.device), counter:
        _prepare(counter, model, optimizer, ema=step.ema)
        batches = [_batch(step, device) for _ in range(step.micro_batches)]
        counter.label((t for batch in batches for t in batch.values()), "inputs")
    return counter, model, objective, optimizer, batches


def run_step(counter: MemoryCounter, model: Any, objective: Any, optimizer: Any, batches: list[Batch]) -> None:
    """Forward, backward, gradient norm and optimiser, as `train.step` does them, each phase's storages under its kind.

    Of several micro-batches two are run: the first finds no gradients, the others find them all.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(lambda p: counter.label([p.grad], "gradients")) for p in parameters]
    for batch in batches[:2]:
        counter.kind = "activations"
        losses = objective.losses(model, batch)
        counter.kind = "temporary"
        for loss in losses.sums.values():
            (loss / 2.0).backward()
        del losses, loss
    torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    optimizer.step()
    for hook in hooks:
        hook.remove()
    optimizer.zero_grad(set_to_none=True)


def replace_layers(step: Step, layers: int) -> Step:
    return dataclasses.replace(step, model=replace(step.model, num_layers=layers))


def _prepare(counter: MemoryCounter, model: Any, optimizer: Any, *, ema: bool) -> None:
    """Weights, then optimiser state, which the first step makes; then everything is as at the second."""
    trained = [p for p in model.parameters() if p.requires_grad]
    counter.label([*model.parameters(), *model.buffers()], "weights")
    shadow = [torch.empty_like(p) for p in trained] if ema else []
    counter.label(shadow, "weights")
    for p in trained:
        p.grad = torch.empty_like(p)
    _fuse(optimizer, False)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _fuse(optimizer, True)
    counter.label((t for slots in optimizer.state.values() for t in slots.values() if isinstance(t, torch.Tensor)),
                  "optimizer")
    model.shadow_of_the_count = shadow     # held as long as the model is
    counter.peak_bytes = 0
    counter._look()


def _fuse(optimizer: Any, wanted: bool) -> None:
    """Torch refuses to begin with its fused form on the meta device, where a real device has it; it goes on with it."""
    optimizer._need_device_dtype_check_for_fused = False
    for group in optimizer.param_groups:
        if "fused" in group:
            group |= {"fused": wanted, "foreach": not wanted}
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if "step" in state:
                state["step"] = torch.zeros((), device=p.device)


def _batch(step: Step, device: torch.device) -> Batch:
    return Batch(**{name: torch.empty(shape, dtype=dtype, device=device)
                    for name, (shape, dtype) in batch_fields(step.objective, *step.shape()).items()})


def period_of(model: Any) -> int:
    """Layers after which the kinds of layer repeat (windows, value embeddings)."""
    section = model.decoder() if hasattr(model, "decoder") else None
    if section is None:
        return 1
    pattern = len(section.window_pattern) if section.window is not None else 1
    return pattern * (2 if section.value_embeddings == "alternate" and pattern % 2 else 1)

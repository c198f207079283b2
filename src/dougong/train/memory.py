"""How many rows fit in memory at once, found before training begins."""

import contextlib
from pathlib import Path

import torch
from torch import Tensor, nn

from dougong.core.errors import ConfigError
from dougong.data.batch import Batch
from dougong.models.count import Products
from dougong.objectives.objective import Objective
from dougong.runtime import seeds
from dougong.runtime.device import Runtime, memory_bytes
from dougong.train.shadow import moving, tracked
from dougong.train.state import TrainState
from dougong.train.step import why_not_additive

_TRANSIENT = 1.5        # gradients of activations and temporaries beside what autograd keeps; see the test
_COPIES_TO_COME = 3     # gradients and at most two moments, each as large as the weights that are trained
_HEADROOM = 0.9


def choose_micro_rows(state: TrainState, objective: Objective, runtime: Runtime, batch: Batch,
                      micro_rows: int | None = None) -> tuple[int, str]:
    """Rows that go through the model at once, and the reason.

    None asks for the most that fit: the whole batch, or an equal part of it. The need is what autograd keeps
    for two rows, counted, times the rows; on a GPU the choice is then tried once, forward and backward.
    Nothing of the state changes. Raises ConfigError with the next sizes to try when the given (or any) number
    does not fit.
    """
    available = available_bytes(runtime.device)
    sample = batch.split(min(2, batch.rows))[0]
    per_row = _TRANSIENT * kept_bytes(state.model, objective, sample, runtime) / sample.rows
    fixed = _COPIES_TO_COME * sum(t.numel() * t.element_size() for t in moving(state.model).values())
    need = {rows: fixed + rows * per_row
            for rows in [*_parts(batch.rows), *([micro_rows] if micro_rows else [])]}
    fitting = [rows for rows in _parts(batch.rows) if need[rows] <= _HEADROOM * available]
    whole = why_not_additive(state.model, objective) is not None
    for rows in [micro_rows] if micro_rows else [batch.rows] if whole else fitting:
        if need[rows] <= _HEADROOM * available and _runs(state.model, objective, batch, rows, runtime):
            return rows, f"{rows} rows need about {_size(need[rows])} of the {_size(available)} that are free"
    rows, setting = micro_rows or batch.rows, "train.rows" if whole else "train.micro_rows"
    smaller = [size for size in fitting if size < rows]
    advice = f"Try {setting}={smaller[0]}" if smaller else \
        "Not even one row fits: try a smaller model, a shorter context or train.gradient_checkpointing=true"
    others = f" (or {', '.join(map(str, smaller[1:4]))})" if smaller[1:] else ""
    raise ConfigError(f"{rows} rows at once need about {_size(need[rows])}, and {_size(available)} are free: "
                      f"{_size(fixed)} for gradients and optimiser, {_size(per_row)} for each "
                      f"row.\n{advice}{others}.")


def kept_bytes(model: nn.Module, objective: Objective, batch: Batch, runtime: Runtime) -> int:
    """Bytes that autograd keeps between forward and backward of `batch`, weights not counted; one forward.

    Uncompiled, which usually keeps more: a compiled layer that has met two rows would take the rows of the run for a
    second shape, and compile for any number of them.
    """
    own = {t.untyped_storage().data_ptr() for t in tracked(model).values()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    selective = getattr(getattr(model, "stack", None), "checkpoint_activations", "none") == "selective"
    products = Products() if selective else contextlib.nullcontext()
    eager = torch.compiler.set_stance("force_eager") if runtime.compile else contextlib.nullcontext()
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with _nothing_happened(model), eager, products, hooks:
        losses = objective.losses(model, batch.to(runtime.device))
        # read while the graph is alive: freed addresses would be counted as one
        total = sum(kept.values()) + (products.alive() if isinstance(products, Products) else 0)
        del losses
    return total


def available_bytes(device: torch.device) -> float:
    """Memory this process may still take: the device's free memory, or the system's within its control
    group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return memory_bytes() or float("inf")     # macOS says how much there is, not how much is free
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return max(0, min(free, _left_in(Path("/sys/fs/cgroup"))))


def _left_in(group: Path) -> float:
    """Bytes that a control group leaves to its processes; infinity without a limit. Files that were read make way."""
    if not (group / "memory.max").exists() or (limit := (group / "memory.max").read_text().strip()) == "max":
        return float("inf")
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(limit) - int((group / "memory.current").read_text()) + int(stat.get("inactive_file", 0))


class _nothing_happened:
    """Puts random numbers, buffers and gradients back as they were."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.rng = seeds.rng_state()
        self.buffers = [(b, b.clone()) for b in self.model.buffers()]

    def __exit__(self, *_: object) -> None:
        seeds.set_rng_state(self.rng)
        with torch.no_grad():
            for buffer, before in self.buffers:
                buffer.copy_(before)
        self.model.zero_grad(set_to_none=True)


def _runs(model: nn.Module, objective: Objective, batch: Batch, rows: int, runtime: Runtime) -> bool:
    """Whether one forward and backward of `rows` rows survives; only a GPU refuses without killing the
    process."""
    if runtime.device.type != "cuda":
        return True
    with _nothing_happened(model):
        try:
            for loss in objective.losses(model, batch.split(rows)[0].to(runtime.device)).sums.values():
                loss.backward(retain_graph=True)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()


def _parts(rows: int) -> list[int]:
    """Sizes of equal parts of `rows`, largest first."""
    return [size for size in range(rows, 0, -1) if rows % size == 0]


def _size(count: float) -> str:
    unit, name = (1e9, "GB") if count >= 1e8 else (1e6, "MB") if count >= 1e5 else (1e3, "kB")
    return f"{count / unit:.1f} {name}"

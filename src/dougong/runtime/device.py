"""Where and how a model computes: device, precision, threads; measured once, then frozen into the recipe."""

import ctypes
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from dougong.core.config import config
from dougong.core.errors import ConfigError
from dougong.runtime.allocator import keep_freed_memory
from dougong.runtime.layout import LayoutConfig
from dougong.runtime.mesh import Mesh
from dougong.runtime.processes import START_TIMEOUT_S, from_first, join, process_rank, wait_for_all, wait_up_to

_BF16_GAIN = 1.3   # bf16 must beat fp32 by this much on matrix products, or its coarser rounding is not worth it


@config
class RuntimeConfig:
    """Device, precision and threads. What is None is measured at the first start and then kept."""

    device: Literal["cpu", "cuda", "mps"] | None = None
    """derived: CUDA, then MPS, then CPU"""
    precision: Literal["fp32", "bf16"] | None = None
    """derived: bf16 where its matrix products are at least 1.3 times as fast; master weights stay fp32"""
    float8: bool = False
    """matrix products of the layers in 8-bit floating point while training; for GPUs from compute capability 8.9 on"""
    threads: Annotated[int, Field(ge=1)] | None = None
    """derived: the cores this process may use"""
    compile: bool | None = None
    """torch.compile each block; derived: on for CUDA, off where its start-up time does not pay"""
    deterministic: bool = False
    """refuse operations without a deterministic implementation (on CPU all we use have one)"""


@dataclass(frozen=True)
class Runtime:
    """The one value that says where computation happens. Passed, never global."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    threads: int = 1
    compile: bool = False
    deterministic: bool = False
    mesh: Mesh = field(default_factory=Mesh)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and speaks for all."""
        return self.mesh.devices is None or process_rank() == 0

    def from_first(self, value: Any) -> Any:
        """The `value` of that process on all that compute together; `value` itself where this one computes alone."""
        return value if self.mesh.devices is None else from_first(value)

    @classmethod
    def start(cls, section: RuntimeConfig, layout: LayoutConfig | None = None) -> "Runtime":
        """Applies a resolved section to torch (threads, determinism) and returns the value.

        With a layout, joins the processes that were launched together and arranges them by it; without one, this
        process computes by itself. Raises ConfigError when the device is absent or the layout does not fit the number
        of processes.
        """
        name = section.device or best_device()
        check_device(name)
        threads = section.threads or usable_cores()
        torch.set_num_threads(threads)
        be_deterministic(section.deterministic)
        if name == "cpu":
            keep_freed_memory()
        mesh = Mesh()
        if layout is not None:
            join(name)
            wait_for_all()      # one may have prepared data for long; new groups wait half an hour for their members
            mesh = Mesh.start(layout, name)
            wait_up_to(START_TIMEOUT_S, mesh.groups)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, None: torch.float32}[section.precision]
        device = torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)
        return cls(device=device, dtype=dtype, threads=threads,
                   compile=bool(section.compile), deterministic=section.deterministic, mesh=mesh)


def be_deterministic(strict: bool) -> None:
    """`torch.use_deterministic_algorithms`, which imports PyTorch's compiler (two seconds), only where it changes
    something."""
    if torch.are_deterministic_algorithms_enabled() != strict:
        torch.use_deterministic_algorithms(strict)


def check_device(name: str) -> None:
    """Raises ConfigError where this machine has no such device, with what is known of the reason."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[name]:
        raise ConfigError(f"runtime.device={name} is not available here. "
                          f"Available: {', '.join(device for device, there in available.items() if there)}."
                          + (_why_no_cuda() if name == "cuda" else ""))


def _why_no_cuda() -> str:
    """What PyTorch knows of a GPU that it does not find, and what to look at next."""
    if torch.version.cuda is None:
        return (f"\nThis PyTorch ({torch.__version__}) is built without CUDA. Where `nvidia-smi` shows a GPU, install "
                "one that is built with it: pytorch.org/get-started")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (f"\nThis PyTorch ({torch.__version__}) is built for CUDA {torch.version.cuda}, and finds no GPU"
            f"{'' if hidden is None else f' (CUDA_VISIBLE_DEVICES={hidden!r})'}. Look whether `nvidia-smi` shows one, "
            "and whether its driver is new enough for this CUDA.")


def best_device() -> Literal["cpu", "cuda", "mps"]:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def usable_cores() -> int:
    """Cores this process may run on (affinity), not those the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_team() -> bool:
    """Ends the threads that have computed for this one; its next computation begins new ones. False where OpenMP has no
    such call.

    For a thread that prepares what another goes on with: with two teams on the same cores OpenMP lets none wait awake,
    and its threads are woken anew for each of a text's hundreds of operations (of 16 clients at once a step took 54 ms
    instead of 46, and reading their prompts 2.5 s instead of 1.7).
    """
    try:
        pause = ctypes.CDLL(torch._C.__file__).omp_pause_resource_all
    except (OSError, AttributeError):
        return False
    return pause(1) == 0    # omp.h: omp_pause_soft


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype, *, width: int = 1024, seconds: float = 0.25) -> float:
    """Measured peak of a square matrix product: best of the repeats that fit in `seconds`.

    Draws from a generator of its own: measuring must not move the random numbers of a run.
    """
    width = width if device.type == "cpu" else 8 * width
    own = torch.Generator(device).manual_seed(0)
    a = torch.randn(width, width, device=device, dtype=dtype, generator=own)
    b = torch.randn(width, width, device=device, dtype=dtype, generator=own)
    sync = {"cuda": torch.cuda.synchronize, "mps": getattr(torch.mps, "synchronize", None)}.get(device.type)
    torch.mm(a, b)
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < seconds:
        if sync:
            sync()
        start = time.perf_counter()
        torch.mm(a, b)
        if sync:
            sync()
        best = min(best, time.perf_counter() - start)
    return 2 * width**3 / best


def measure_precision(device: torch.device) -> tuple[Literal["fp32", "bf16"], str]:
    """The faster sensible precision and the reason, with both figures."""
    fp32 = matmul_flops_per_s(device, torch.float32)
    try:
        bf16 = matmul_flops_per_s(device, torch.bfloat16)
    except RuntimeError:
        return "fp32", f"no bf16 matrix product on {device.type}"
    chosen = "bf16" if bf16 >= _BF16_GAIN * fp32 else "fp32"
    return chosen, f"matrix products here: bf16 {bf16 / 1e9:,.0f} GFLOP/s, fp32 {fp32 / 1e9:,.0f} GFLOP/s"


def multiplies_bf16() -> bool:
    """Whether this processor has products of bf16 of its own; else they are made of conversions, and slow."""
    return any(getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported",
                                                                      "_is_amx_tile_supported"))


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Processor, cores, memory, system: what a reader needs to judge a speed."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    facts = {"processor": processor, "cores": usable_cores(), "memory_bytes": memory_bytes(),
             "system": f"{platform.system()} {platform.machine()}", "device": device.type}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
    return facts


def memory_bytes() -> int:
    """What programs may use: the machine's memory, or less where a container limits it; 0 where no system says."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(pages, int(text)) if text.isdigit() else pages


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: the device's on CUDA, else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024

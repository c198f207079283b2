"""What a training machine can do: speed, memory, links, power; each figure with its source.

Peaks are dense (no sparsity), per device. `memory_bytes` is what a program finds (`torch.cuda` total memory), which is
less than the number in the name. Links are bytes per second that one device can send while it receives as many: half
of the bidirectional figure on the data sheet. Nothing here is a price: prices change by the week; the user gives one.
"""

import math
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from dougong.core.config import config, from_dict, read_yaml, replace, yaml_problem
from dougong.core.errors import ConfigError, did_you_mean

Positive = Annotated[float, Field(gt=0)]
GIB = 2**30


@config
class Machine:
    """One kind of device and the hosts it stands in. A YAML file with these keys describes a machine of your own;
    `like: h100` in it takes what is not given from a known one."""

    name: str
    device: Literal["cuda", "cpu", "mps"] = "cuda"
    peak_bf16_flops: Positive
    """dense matrix products in bf16, FLOP/s"""
    peak_fp32_flops: Positive
    """matrix products in fp32 as torch computes them by default (no TF32), FLOP/s"""
    memory_bytes: Positive
    memory_bytes_per_s: Positive
    host_devices: Annotated[int, Field(ge=1)] = 8
    """devices in one host"""
    host_link_bytes_per_s: Positive
    """between devices of one host, each way"""
    network_bytes_per_s: Positive
    """out of a host, each way, for each device"""
    latency_s: Annotated[float, Field(ge=0)] = 15e-6
    """one collective of a few devices, before any byte (NCCL over NVLink: 10 to 20 µs; Demystifying NCCL,
    arXiv:2507.04786)"""
    watts: Positive
    """of one device under load"""
    host_watts: Annotated[float, Field(ge=0)] = 0.0
    """what a host draws besides its devices; cooling of the building is left out"""
    efficiency: Annotated[float, Field(gt=0, le=1)] = 0.45
    """share of the peak that a training step's matrix products reach, everything between them included, communication
    and pipeline bubble excluded"""
    efficiency_source: str = ""
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    """of one device, in any currency; given by the user"""

    def peak(self, precision: str) -> float:
        return self.peak_bf16_flops if precision == "bf16" else self.peak_fp32_flops

    def hosts(self, devices: int) -> int:
        return -(-devices // self.host_devices)

    def link(self, neighbours: int) -> float:
        """Bytes per second, each way, of a device that talks within a block of so many neighbouring ranks."""
        return self.host_link_bytes_per_s if neighbours <= self.host_devices else self.network_bytes_per_s

    def power(self, devices: int) -> float:
        """Watts of so many devices and of the hosts around them."""
        return devices * self.watts + self.hosts(devices) * self.host_watts


_BF16_PUBLISHED = "bf16 training reported at 41-48 % of the peak (Megatron-LM's README, up to 6,144 H100)"

KINDS: dict[str, Machine] = {machine.name: machine for machine in (
    # H100 SXM5 data sheet: 989.4 TFLOP/s bf16 and 66.9 fp32 dense, 80 GB HBM3 at 3.35 TB/s, NVLink 900 GB/s both ways,
    # 700 W. Memory found: 79.1 GiB (torch). DGX H100 guide: 8 x 400 Gb/s, 10.2 kW for the host.
    Machine(name="h100", peak_bf16_flops=989.4e12, peak_fp32_flops=66.9e12, memory_bytes=79.1 * GIB,
            memory_bytes_per_s=3.35e12, host_link_bytes_per_s=450e9, network_bytes_per_s=50e9, watts=700,
            host_watts=4600, efficiency=0.45, efficiency_source=_BF16_PUBLISHED),
    # H200 SXM data sheet: as H100, but 141 GB HBM3e at 4.8 TB/s. Memory found: 139.8 GiB. DGX H200: 10.2 kW.
    Machine(name="h200", peak_bf16_flops=989.4e12, peak_fp32_flops=66.9e12, memory_bytes=139.8 * GIB,
            memory_bytes_per_s=4.8e12, host_link_bytes_per_s=450e9, network_bytes_per_s=50e9, watts=700,
            host_watts=4600, efficiency=0.45, efficiency_source=_BF16_PUBLISHED + "; the H200 computes as the H100"),
    # A100 data sheet: 312 TFLOP/s bf16 and 19.5 fp32 dense, NVLink 600 GB/s both ways, SXM 400 W; 80 GB HBM2e at
    # 2.039 TB/s, or 40 GB HBM2 at 1.555 TB/s. DGX A100: 8 x 200 Gb/s for computing, 6.5 kW.
    Machine(name="a100-80", peak_bf16_flops=312e12, peak_fp32_flops=19.5e12, memory_bytes=79.1 * GIB,
            memory_bytes_per_s=2.039e12, host_link_bytes_per_s=300e9, network_bytes_per_s=25e9, watts=400,
            host_watts=3300, efficiency=0.5,
            efficiency_source="44-52 % of the peak from 18B to 1T parameters (arXiv:2104.04473, table 1)"),
    Machine(name="a100-40", peak_bf16_flops=312e12, peak_fp32_flops=19.5e12, memory_bytes=39.4 * GIB,
            memory_bytes_per_s=1.555e12, host_link_bytes_per_s=300e9, network_bytes_per_s=25e9, watts=400,
            host_watts=3300, efficiency=0.5,
            efficiency_source="44-52 % of the peak from 18B to 1T parameters (arXiv:2104.04473, table 1)"),
    # HGX B200 at 1,000 W: 2,250 TFLOP/s bf16 and 80 fp32 dense, 180 GB HBM3e at 7.7 TB/s, NVLink 1.8 TB/s both ways.
    # Memory found: 178 GiB. DGX B200 guide: 8 x 400 Gb/s, 14.3 kW.
    Machine(name="b200", peak_bf16_flops=2250e12, peak_fp32_flops=80e12, memory_bytes=178 * GIB,
            memory_bytes_per_s=7.7e12, host_link_bytes_per_s=900e9, network_bytes_per_s=50e9, watts=1000,
            host_watts=6300, efficiency=0.4, efficiency_source="assumed: a little under the H100's"),
    # L4 data sheet: 121 TFLOP/s bf16 dense (242 sparse), 30.3 fp32, 24 GB GDDR6 at 300 GB/s, PCIe 4 x16 64 GB/s both
    # ways, 72 W. Memory found: 22 GiB. Hosts and network: a cloud's eight with 100 Gb/s between them.
    Machine(name="l4", peak_bf16_flops=121e12, peak_fp32_flops=30.3e12, memory_bytes=22 * GIB,
            memory_bytes_per_s=300e9, host_link_bytes_per_s=24e9, network_bytes_per_s=1.5e9, watts=72, host_watts=500,
            efficiency=0.35, efficiency_source="assumed: 72 W do not hold the peak clock"),
    # Ada white paper: 165.2 TFLOP/s bf16 with fp32 sums, 82.6 fp32, 24 GB at 1,008 GB/s, PCIe 4 x16 without peer
    # access, 450 W. Hosts: a workstation of two, 10 Gb/s between them.
    Machine(name="rtx4090", peak_bf16_flops=165.2e12, peak_fp32_flops=82.6e12, memory_bytes=23.6 * GIB,
            memory_bytes_per_s=1.008e12, host_devices=2, host_link_bytes_per_s=20e9, network_bytes_per_s=0.6e9,
            watts=450, host_watts=150, efficiency=0.45, efficiency_source="assumed: as data-centre GPUs"),
    # GA102 white paper: 71 TFLOP/s bf16 with fp32 sums, 35.6 fp32, 24 GB at 936 GB/s, 350 W.
    Machine(name="rtx3090", peak_bf16_flops=71e12, peak_fp32_flops=35.6e12, memory_bytes=23.6 * GIB,
            memory_bytes_per_s=936e9, host_devices=2, host_link_bytes_per_s=20e9, network_bytes_per_s=0.6e9,
            watts=350, host_watts=150, efficiency=0.45, efficiency_source="assumed: as data-centre GPUs"),
)}


def machine(name: str) -> Machine:
    """A known kind by its name, or "here" for this machine, measured. Raises ConfigError with the nearest name."""
    plain = name.strip().lower().replace("_", "-").replace(" ", "")
    if plain == "here":
        return here()
    plain = {"a100": "a100-80", "rtx-4090": "rtx4090", "4090": "rtx4090", "rtx-3090": "rtx3090",
             "3090": "rtx3090"}.get(plain, plain)
    if plain not in KINDS:
        raise ConfigError(f"unknown GPU {name!r}.{did_you_mean(plain, [*KINDS, 'here'])}\n"
                          "A machine of your own: --machine FILE.yaml, with `like: h100` and what differs, such as "
                          "memory_bytes, peak_bf16_flops and peak_fp32_flops.")
    return KINDS[plain]


def known_gpu(title: str, memory_bytes: float = 0.0) -> Machine | None:
    """The kind that a device calls itself, such as "NVIDIA A100-SXM4-40GB"; of two that share a name the one nearest in
    memory. None for others: an L40S is no L4, and a laptop's chip or a card without NVLink is not its namesake."""
    words = set(title.lower().replace("rtx ", "rtx").replace("-", " ").split())
    if words & {"laptop", "pcie", "nvl"}:
        return None
    same = [kind for kind in KINDS.values() if kind.name.split("-")[0] in words]
    return min(same, key=lambda kind: abs(kind.memory_bytes - memory_bytes), default=None)


def load_machine(path: Path | str) -> Machine:
    """A machine from a YAML file: `like:` a known kind, then what differs. Raises ConfigError for what is no such file
    and for unknown keys."""
    try:
        values = read_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text. Save it as UTF-8.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {yaml_problem(error)}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} should hold keys and values, such as `like: h100`.")
    values = {"name": Path(path).stem, **values}
    if like := values.pop("like", None):
        known = machine(str(like))
        same = {name: getattr(known, name) for name in Machine.__dataclass_fields__ if name != "name"}
        if "efficiency" in values:
            same["efficiency_source"] = f"given in {Path(path).name}"
        values = {**same, **values}
    return from_dict(Machine, values, where="machine")


@cache
def here() -> Machine:
    """This machine, its peaks and memory bandwidth measured in about a second (once a process)."""
    import torch

    from dougong.runtime.device import best_device, matmul_flops_per_s, memory_bytes, usable_cores

    device = torch.device(best_device())
    fp32 = matmul_flops_per_s(device, torch.float32)
    try:
        bf16 = matmul_flops_per_s(device, torch.bfloat16)
    except RuntimeError:
        bf16 = fp32
    if device.type == "cuda":
        return _gpu_here(bf16, fp32)
    bandwidth = _copy_bytes_per_s(device)
    return Machine(name="here", device=best_device(), peak_bf16_flops=bf16, peak_fp32_flops=fp32,
                   memory_bytes=float(memory_bytes() or 8 * GIB), memory_bytes_per_s=bandwidth, host_devices=1,
                   host_link_bytes_per_s=bandwidth / 4, network_bytes_per_s=1e8, latency_s=1e-4,
                   watts=15 + 10 * usable_cores(),   # a laptop's board, and its processor's cores under load
                   efficiency=0.4, efficiency_source="assumed; a few real steps measure it")


def _gpu_here(bf16: float, fp32: float) -> Machine:
    """The GPUs of this host: the known kind that the name tells, with what was measured and found."""
    import torch

    found = torch.cuda.get_device_properties(0)
    known, why = known_gpu(found.name, found.total_memory), ""
    if known is None:
        known = min(KINDS.values(), key=lambda kind: abs(math.log(kind.peak_bf16_flops / bf16)))
        why = f"{found.name} is not listed; links, power and the rest are those of the nearest by peak: "
    return replace(known, name="here", peak_bf16_flops=bf16, peak_fp32_flops=fp32, memory_bytes=found.total_memory,
                   host_devices=torch.cuda.device_count(), efficiency=min(1.0, known.efficiency * 1.2),
                   efficiency_source=f"{why}{known.name}'s, on a peak measured here ({known.efficiency_source})")


def _copy_bytes_per_s(device: Any) -> float:
    """Bytes read and written per second by the best of a few copies of 64 MiB."""
    import time

    import torch

    source = torch.ones(1 << 24, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        target.copy_(source)
        target[0].item()
        best = min(best, time.perf_counter() - begin)
    return 2 * source.nbytes / best

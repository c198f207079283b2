"""Device, seeds and sums: named, saved, put back, and measured without moving a run."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dougong.core.config import from_dict
from dougong.core.errors import ConfigError
from dougong.runtime.collectives import all_sum
from dougong.runtime.device import (
    Runtime,
    RuntimeConfig,
    end_team,
    machine_facts,
    matmul_flops_per_s,
    measure_precision,
    peak_memory_bytes,
)
from dougong.runtime.layout import AXES
from dougong.runtime.seeds import derive, rng_state, seed_all, set_rng_state

CPU = torch.device("cpu")


def drawn():
    return [random.random(), float(np.random.random()), float(torch.rand(())), float(torch.randn(()))]


def test_derived_seeds_are_stable_and_unrelated():
    assert derive(0, "model") == derive(0, "model") == 3211678333516522061
    names = [derive(seed, name) for seed in range(50) for name in ("model", "order", "training")]
    assert len(set(names)) == len(names) and all(0 <= seed < 2**63 for seed in names)
    assert derive(1, "2/3") == derive(1, "2", 3), "parts are joined by a slash"


def test_every_generator_is_seeded_and_put_back():
    seed_all(5)
    first = drawn()
    seed_all(5)
    assert drawn() == first
    state = rng_state()
    expected = [drawn() for _ in range(3)]
    seed_all(99)
    set_rng_state(state)
    assert [drawn() for _ in range(3)] == expected


def test_the_generator_of_mps_is_put_back_through_json(monkeypatch):
    there = torch.Generator().manual_seed(3)    # stands for MPS's
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", there.get_state)
    monkeypatch.setattr(torch.mps, "set_rng_state", there.set_state)
    state = rng_state()
    expected = torch.rand(3, generator=there)
    set_rng_state({**json.loads(json.dumps({k: v for k, v in state.items() if k != "torch"})), "torch": state["torch"]})
    assert torch.equal(torch.rand(3, generator=there), expected)
    monkeypatch.undo()
    set_rng_state(state)        # where there is no MPS


def test_measuring_does_not_move_the_random_numbers():
    seed_all(1)
    expected = drawn()
    seed_all(1)
    assert matmul_flops_per_s(CPU, torch.float32, width=64, seconds=0.01) > 1e6
    measure_precision(CPU)
    assert drawn() == expected


def test_precision_is_chosen_by_what_is_measured(monkeypatch):
    for bf16, chosen in ((1.0, "fp32"), (1.29, "fp32"), (1.31, "bf16")):
        monkeypatch.setattr("dougong.runtime.device.matmul_flops_per_s",
                            lambda device, dtype, bf16=bf16: (bf16 if dtype == torch.bfloat16 else 1.0) * 1e9)
        assert measure_precision(CPU)[0] == chosen


def test_a_runtime_is_what_its_section_says():
    before = torch.get_num_threads()
    runtime = Runtime.start(RuntimeConfig(device="cpu", precision="bf16", threads=1, compile=False))
    assert (runtime.device, runtime.dtype, runtime.threads, runtime.compile) == (CPU, torch.bfloat16, 1, False)
    torch.set_num_threads(before)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_a_team_ends_and_the_next_computation_begins_another():
    before = torch.get_num_threads()
    torch.set_num_threads(3)        # no machine's default
    try:
        x = torch.ones(512, 512)
        product, team = x @ x, threads()
        if not end_team():
            pytest.skip("this OpenMP has no omp_pause_resource_all")
        for _ in range(100):       # they end a moment later
            if threads() < team:
                break
            time.sleep(0.02)
        assert threads() == team - 2 and torch.get_num_threads() == 3
        assert torch.equal(x @ x, product) and threads() == team
    finally:
        torch.set_num_threads(before)


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_an_absent_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"runtime\.device=cuda is not available here\. Available: cpu"):
        Runtime.start(RuntimeConfig(device="cuda"))


@pytest.mark.parametrize("threads", [0, -2])
def test_threads_are_at_least_one(threads):
    with pytest.raises(ConfigError, match="threads"):
        from_dict(RuntimeConfig, {"threads": threads})


def test_the_sum_over_one_process_is_the_value_itself():
    value = torch.tensor([1.5, 2.0])
    assert all_sum(value, Runtime().mesh.group(*AXES)) is value


def test_facts_are_of_this_machine():
    facts = machine_facts(CPU)
    assert facts["cores"] >= 1 and facts["memory_bytes"] > 2**28 and facts["processor"] and facts["device"] == "cpu"
    held = peak_memory_bytes(CPU)
    ballast = torch.ones(40_000_000)
    assert peak_memory_bytes(CPU) >= held + 0.5 * ballast.nbytes or held > 1e9

"""The plan's arithmetic against the divided model itself, run on fake tensors."""

import dataclasses
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from dougong.adapt.lora import LoRAConfig
from dougong.models.families.llama import LlamaConfig
from dougong.models.families.qwen3_moe import Qwen3MoEConfig
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.optim import OPTIMIZERS
from dougong.plan.counts import Counts
from dougong.plan.machine import machine
from dougong.plan.memory import memory
from dougong.plan.simulate import simulate
from dougong.plan.traffic import traffic
from dougong.plan.work import Work
from dougong.runtime.layout import LayoutConfig

MODEL = LlamaConfig(vocab_size=4096, context=512, dim=512, num_layers=8, num_heads=8, num_kv_heads=8, ffn_dim=1536)
LAYOUTS = [LayoutConfig(replicate=4), LayoutConfig(replicate=1, shard=4),
           LayoutConfig(replicate=1, shard=4, gathered="step"), LayoutConfig(replicate=2, shard=2),
           LayoutConfig(replicate=1, tensor=4), LayoutConfig(replicate=1, shard=2, tensor=2),
           LayoutConfig(replicate=1, shard=2, context=2), LayoutConfig(replicate=1, context=4),
           LayoutConfig(replicate=2, context=2)]


def work(model, precision="bf16", rows=16):
    return Work(model=model, objective=CausalLMConfig(), optim=OPTIMIZERS["adamw"](), rows=rows, context=model.context,
                steps=1, precision=precision)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout}, {layout.gathered}")
@pytest.mark.parametrize("mode", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_arithmetic_is_within_a_tenth_of_the_simulation(layout, mode):
    job = work(MODEL)
    found = simulate(job, layout, checkpoint=mode, micro_rows=4, micro_batches=1)
    told = sum(memory(Counts(job.step()), layout, mode, 4, 1, gpu=False).values())
    assert math.isfinite(found.peak_bytes)
    assert 0.9 < told / found.peak_bytes < 1.1
    assert not dist.is_initialized()


PIPELINES = [LayoutConfig(replicate=1, pipeline=2), LayoutConfig(replicate=1, pipeline=4),
             LayoutConfig(replicate=1, pipeline=2, schedule="interleaved", tensor=2),
             LayoutConfig(replicate=1, pipeline=2, schedule="zbv")]


@pytest.mark.parametrize("layout", PIPELINES, ids=lambda layout: f"{layout}, {layout.schedule}")
@pytest.mark.parametrize("vocab_size", [4096, 65_536])
def test_a_pipelines_arithmetic_is_within_a_tenth_of_the_simulation_of_what_its_process_holds(layout, vocab_size):
    job = work(dataclasses.replace(MODEL, vocab_size=vocab_size), rows=32)
    found = simulate(job, layout, checkpoint="none", micro_rows=4, micro_batches=8)
    told = memory(Counts(job.step()), layout, "none", 4, 8, gpu=False)
    assert 0.9 < sum(told.values()) / found.peak_bytes < 1.1
    assert told["weights"] == pytest.approx(found.weights, rel=0.01), "of one end alone, where it has one"


@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=lambda layout: f"{layout}, {layout.gathered}")
def test_an_adapters_memory_and_messages_are_those_of_the_simulation(layout):
    job = dataclasses.replace(work(MODEL), adapt=LoRAConfig(rank=16))
    found, counts = simulate(job, layout, checkpoint="none", micro_rows=2, micro_batches=1), Counts(job.step())
    assert 0.9 < sum(memory(counts, layout, "none", 2, 1, gpu=False).values()) / found.peak_bytes < 1.1
    told = {item.what: item.bytes for item in traffic(counts, layout, machine("h100"), "none", 2, 1)}
    for name, what in (("_allgather_base_", "weights gathered"),
                       ("_reduce_scatter_base_", "gradients summed, each to its owner")):
        received = found.message_bytes.get(name, 0) * (1 - 1 / layout.shard)
        assert told.get(what, 0) == pytest.approx(received, rel=0.1)


MIXTURE = Qwen3MoEConfig(vocab_size=4096, context=512, dim=512, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64,
                         num_experts=16, top_k=2, ffn_dim=768)
WITH_EXPERTS = [LayoutConfig(replicate=1, shard=4), LayoutConfig(replicate=1, expert=4),
                LayoutConfig(replicate=2, expert=2), LayoutConfig(replicate=1, shard=2, expert=2),
                LayoutConfig(replicate=1, expert=2, context=2)]


@pytest.mark.parametrize("layout", WITH_EXPERTS, ids=str)
@pytest.mark.parametrize("mode", ["none", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_memory_and_messages_of_experts_are_those_of_the_simulation(layout, mode, precision):
    """Tokens are simulated as many to each expert."""
    job = work(MIXTURE, precision)
    found = simulate(job, layout, checkpoint=mode, micro_rows=4, micro_batches=1)
    counts = Counts(job.step())
    assert 0.9 < sum(memory(counts, layout, mode, 4, 1, gpu=False).values()) / found.peak_bytes < 1.1
    told = {(item.axis, item.what): item for item in traffic(counts, layout, machine("h100"), mode, 4, 1)}
    assert sum(told[key].collectives for key in told if key[1] == "weights gathered") == \
        round(found.messages["_allgather_base_"])
    assert sum(told[key].collectives for key in told if key[1].startswith("gradients summed, each")) == \
        round(found.messages["_reduce_scatter_base_"])
    exchanged = sum(told[key].collectives for key in told if "tokens" in key[1])
    assert exchanged == round(found.messages.get("all_to_all_single", 0))
    summed = sum(told[key].collectives for key in told if key[1] == "gradients summed")
    assert summed == round(found.messages.get("allreduce_", 0))


def test_messages_are_those_that_the_arithmetic_tells():
    layout = LayoutConfig(replicate=1, shard=2, tensor=2)
    job = work(MODEL)
    found = simulate(job, layout, checkpoint="none", micro_rows=4, micro_batches=1)
    told = {item.what: item for item in traffic(Counts(job.step()), layout, machine("h100"), "none", 4, 1)}
    assert told["weights gathered"].collectives == round(found.messages["_allgather_base_"])
    assert told["gradients summed, each to its owner"].collectives == round(found.messages["_reduce_scatter_base_"])
    between = found.messages["all_gather_into_tensor"] + found.messages["reduce_scatter_tensor"]
    assert told["activations gathered and summed"].collectives == pytest.approx(between, rel=0.05)


LARGE = LlamaConfig(vocab_size=128_256, context=8192, dim=16_384, num_layers=126, num_heads=128, num_kv_heads=8,
                    ffn_dim=53_248)


def simulated_alone():
    """What the simulation of a step of `LARGE` found, and the most memory that this process has held."""
    found = simulate(work(LARGE, rows=2048), LayoutConfig(replicate=1, shard=2048, tensor=8), checkpoint="full",
                     micro_rows=1, micro_batches=1)
    status = Path("/proc/self/status").read_text()      # of this program alone; getrusage counts its parent's too
    return found.peak_bytes, found.weights, found.seconds, 1024 * int(status.split("VmHWM:")[1].split()[0])


def test_405_billion_on_16384_devices_in_a_minute_and_two_gib():
    layout = LayoutConfig(replicate=1, shard=2048, tensor=8)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        peak, weights, seconds, held = pool.submit(simulated_alone).result()
    told = sum(memory(Counts(work(LARGE, rows=2048).step()), layout, "full", 1, 1, gpu=False).values())
    assert 0.9 < told / peak < 1.1
    # more than an equal share: where a matrix has fewer rows than processes, the first ones hold a row each
    assert 1.0 <= weights / (4 * 405.85e9 / 16_384) < 1.4
    assert seconds < 60
    assert held < 2 * 2**30

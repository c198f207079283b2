"""What several processes gain, and what their code costs one: the same model, the same global batch, each core busy.

    python benchmarks/parallel.py [--quick] [--json PATH]

Asked: two processes with a core each at least 1.6 times one process with one core; at size 1, `fit` within noise of a
loop written by hand (forward, backward, clip, optimiser). The contenders take turns, so a machine that slows down slows
them alike; ratios are taken within a round, the median is reported with the lowest and highest round.
"""

import argparse
import datetime
import multiprocessing
import os
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from machine import header, spread, write

from dougong.data.batch import Batch
from dougong.models.families.qwen3 import Qwen3Config
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.optim.build import AdamWConfig
from dougong.parallel.parallelize import parallelize
from dougong.runtime.device import Runtime, RuntimeConfig
from dougong.runtime.layout import LayoutConfig
from dougong.train import TrainConfig, fit
from dougong.train.state import TrainState

MODEL = Qwen3Config(vocab_size=2048, context=256, dim=256, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=64)
ROWS, WARM = 16, 3      # 4,096 tokens a step, as recipe `first`
ASKED_TWO, NOISE = 1.6, 0.03


class Rows:
    """Batches of random tokens, made beforehand: this process's slice of each global batch."""

    epoch = None

    def __init__(self, rank: int, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(MODEL.vocab_size, (ROWS, MODEL.context + 1), generator=generator)
        mine = tokens[rank * ROWS // size:(rank + 1) * ROWS // size]
        self.batch = Batch(tokens=mine[:, :-1].contiguous(), targets=mine[:, 1:].contiguous(),
                           weight=torch.ones(len(mine), MODEL.context))

    def __iter__(self) -> Any:
        while True:
            yield self.batch


def trained(layout: LayoutConfig, threads: int, steps: int) -> list[float]:
    """Seconds of each step through `fit`, in however many processes there are."""
    runtime = Runtime.start(RuntimeConfig(device="cpu", precision="fp32", threads=threads), layout)
    with torch.device("meta"):
        model = MODEL.build()
    objective = CausalLMConfig().build()
    parallel = parallelize(model, objective, runtime)
    model = parallel.model.to_empty(device="cpu")
    model.initialise(0)
    state = TrainState(model, AdamWConfig(lr=1e-3).build(model), lambda step: 1.0,
                       Rows(runtime.mesh.data_rank, runtime.mesh.data_size))
    config = TrainConfig(steps=WARM + steps, rows=ROWS)
    return [result.seconds for result in fit(state, objective, runtime, config, gradients=parallel.gradients)][WARM:]


def by_hand(threads: int, steps: int) -> list[float]:
    """The same steps written out: what any loop must do."""
    Runtime.start(RuntimeConfig(device="cpu", precision="fp32", threads=threads))
    model = MODEL.build()
    model.initialise(0)
    objective, optimizer, batch = CausalLMConfig().build(), AdamWConfig(lr=1e-3).build(model), Rows(0, 1).batch
    seconds = []
    for _ in range(WARM + steps):
        begin = time.perf_counter()
        losses = objective.losses(model, batch)
        (losses.sums["model"] / batch["weight"].sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.metrics["loss"].item()
        seconds.append(time.perf_counter() - begin)
    return seconds[WARM:]


CONTENDERS = {
    "1 process, 1 thread, by hand": (1, lambda steps: by_hand(1, steps)),
    "1 process, 1 thread": (1, lambda steps: trained(LayoutConfig(), 1, steps)),
    "1 process, 2 threads": (1, lambda steps: trained(LayoutConfig(), 2, steps)),
    "2 processes, replicate 2": (2, lambda steps: trained(LayoutConfig(), 1, steps)),
    "2 processes, shard 2": (2, lambda steps: trained(LayoutConfig(shard=2), 1, steps)),
    "2 processes, tensor 2": (2, lambda steps: trained(LayoutConfig(tensor=2), 1, steps)),
}


def _child(rank: int, size: int, folder: str, name: str, steps: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    if size > 1:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size,
                                timeout=datetime.timedelta(seconds=300))
    torch.save(CONTENDERS[name][1](steps), f"{folder}/{rank}.pt")
    os._exit(0)


def median_step(name: str, steps: int) -> float:
    """Median seconds of a step of the slowest process, in processes forked for it."""
    size, context = CONTENDERS[name][0], multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        children = [context.Process(target=_child, args=(rank, size, folder, name, steps)) for rank in range(size)]
        for child in children:
            child.start()
        for child in children:
            child.join()
            assert child.exitcode == 0, f"{name}: a process ended with {child.exitcode}; its error stands above"
        return max(statistics.median(torch.load(f"{folder}/{rank}.pt")) for rank in range(size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds of 8 steps instead of 7 of 20")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)    # threads do not survive a fork
    report = header()
    rounds, steps = (3, 8) if options.quick else (7, 20)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name in CONTENDERS:
            seconds[name].append(median_step(name, steps))
    tokens = ROWS * MODEL.context
    for name, values in seconds.items():
        print(f"{name:<32}{tokens / statistics.median(values):>10,.0f} tokens/s", flush=True)
    base = seconds["1 process, 1 thread"]
    ratios = {name: spread([one / own for one, own in zip(base, values)]) for name, values in seconds.items()}
    cost = spread([one / hand for one, hand in zip(base, seconds["1 process, 1 thread, by hand"])])
    for name, ratio in ratios.items():
        print(f"{name:<32}{ratio['median']:>6.2f} x one thread  ({ratio['min']:.2f} to {ratio['max']:.2f})")
    print(f"\nfit / by hand, seconds a step: {cost['median']:.3f} ({cost['min']:.3f} to {cost['max']:.3f}); asked: "
          f"within noise\ntwo processes / one: {ratios['2 processes, replicate 2']['median']:.2f}, asked {ASKED_TWO}")
    write(options.json, {**report, "model": "qwen3, 4 layers of 256, 2,048 tokens, context 256, 16 rows",
                         "seconds_per_step": {name: spread(values) for name, values in seconds.items()},
                         "speed_over_one_thread": ratios, "fit_over_by_hand": cost})


if __name__ == "__main__":
    main()

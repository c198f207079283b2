"""What saving in the background costs training: blocks of steps with one save each, beside blocks without.

    GOMP_SPINCOUNT=10000 python benchmarks/checkpoint.py [--quick] [--json PATH] [--every 50]

GPT-2's layout, 1.9M parameters (4 layers, width 192, context 64, 8 rows), AdamW and an average of the weights: a
checkpoint of 30 MB. In one process with 2 threads, and divided between 2 processes of one thread each (FSDP2). Blocks
take turns within one run, the first of a pair changing from pair to pair, so a machine that slows down slows both; a
block with a save ends when the file is on disk. Asked: less than 5 % of the time of 50 steps.
"""

import argparse
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import header, spread, write

ROWS, CONTEXT, VOCABULARY = 8, 64, 65
ASKED = 0.05
CASES = {"1 process, 2 threads": (1, 2), "2 processes, FSDP2, 1 thread each": (2, 1)}


def build(processes: int, threads: int) -> tuple[Any, Any, Any, Any]:
    """(state, objective, runtime, gradients) of a small model, divided where there are several processes."""
    from dougong.models.families.gpt2 import GPT2Config
    from dougong.objectives.causal_lm import CausalLMConfig
    from dougong.optim.build import AdamWConfig
    from dougong.parallel.parallelize import parallelize
    from dougong.runtime.device import Runtime, RuntimeConfig
    from dougong.runtime.layout import LayoutConfig
    from dougong.train.shadow import Shadow
    from dougong.train.state import TrainState

    runtime = Runtime.start(RuntimeConfig(device="cpu", precision="fp32", threads=threads),
                            LayoutConfig(shard=processes))
    objective = CausalLMConfig().build()
    with torch.device("meta"):
        model = GPT2Config(vocab_size=VOCABULARY, context=CONTEXT, dim=192, num_layers=4, num_heads=6,
                           ffn_dim=768).build()
    parallel = parallelize(model, objective, runtime)
    model = parallel.model.to_empty(device="cpu")
    model.initialise(0)
    state = TrainState(model, AdamWConfig(lr=1e-3).build(model), lambda step: 1.0, _Place(), Shadow(model, tau=0.01))
    return state, objective, runtime, parallel.gradients


class _Place:
    """The loader's part of a state; the batches themselves are drawn here."""

    def state_dict(self) -> dict[str, int]:
        return {"position": 0}


def work(rank: int, processes: int, threads: int, port: int, folder: str, pairs: int, every: int, pipe: Any) -> None:
    """One process: pairs of blocks, with and without a save; process 0 answers with the seconds of each."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    from dougong.core.run import RunDirectory
    from dougong.data.batch import Batch
    from dougong.runtime.processes import leave, wait_for_all
    from dougong.train.checkpoint import Checkpointer
    from dougong.train.step import take_step

    state, objective, runtime, gradients = build(processes, threads)
    checkpointer = Checkpointer(RunDirectory(folder), keep_last=1, mesh=runtime.mesh)
    draw = torch.Generator().manual_seed(rank)

    def step() -> None:
        tokens = torch.randint(VOCABULARY, (ROWS // processes, CONTEXT + 1), generator=draw)
        batch = Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], weight=torch.ones(ROWS // processes, CONTEXT))
        take_step(state, objective, batch, runtime, micro_rows=None, clip_norm=1.0, gradients=gradients,
                  weight=objective.weight(batch) * processes)
        state.step += 1
        state.shadow.update(state.model, state.step)

    def block(saving: bool) -> tuple[float, float, Any]:
        wait_for_all()
        begin = time.perf_counter()
        if saving:
            checkpointer.save(state, "interval")
        asked = time.perf_counter() - begin
        for _ in range(every):
            step()
        saved = checkpointer.wait()
        return time.perf_counter() - begin, asked, saved[0] if saved else None

    for _ in range(5):
        step()
    block(True)
    results = []
    for number in range(pairs):
        first = block(bool(number % 2))
        second = block(not number % 2)
        results.append((first, second) if number % 2 else (second, first))
    if rank == 0:
        pipe.send([{"with": w[0], "without": o[0], "step_waits": w[1], "writing": w[2].seconds, "bytes": w[2].bytes}
                   for w, o in results])
    leave()


def compare(processes: int, threads: int, pairs: int, every: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tempfile.mkdtemp(dir=Path.cwd())       # the disk of the checkout, not one in memory
    try:
        children = [context.Process(target=work, args=(rank, processes, threads, port, folder, pairs, every, there))
                    for rank in range(processes)]
        for child in children:
            child.start()
        while not here.poll(1):
            if any(child.exitcode for child in children):
                raise SystemExit("a process failed; its error stands above")
        rounds = here.recv()
        for child in children:
            child.join()
    finally:
        shutil.rmtree(folder)
    return {"cost": spread([one["with"] / one["without"] - 1 for one in rounds]),
            "step_s": spread([one["without"] / every for one in rounds]),
            "step_waits_s": spread([one["step_waits"] for one in rounds]),
            "writing_s": spread([one["writing"] for one in rounds]), "bytes": rounds[0]["bytes"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three pairs of blocks: about a minute")
    parser.add_argument("--json", help="write the report here")
    parser.add_argument("--every", type=int, default=50, help="steps between saves")
    options = parser.parse_args()
    report: dict[str, Any] = {**header(), "every": options.every, "asked": ASKED, "results": {}}
    print(f"{'':36}{'cost of saving (spread)':>30}   asked    a step   the step waits   written in   bytes")
    for name, (processes, threads) in CASES.items():
        row = report["results"][name] = compare(processes, threads, 3 if options.quick else 8, options.every)
        cost = row["cost"]
        print(f"{name:36}{cost['median']:>12.1%} ({cost['min']:.1%} to {cost['max']:.1%})   < {ASKED:.0%}   "
              f"{row['step_s']['median'] * 1e3:.0f} ms   {row['step_waits_s']['median'] * 1e3:.1f} ms   "
              f"{row['writing_s']['median'] * 1e3:.0f} ms   {row['bytes']:,}", flush=True)
    write(options.json, report)


if __name__ == "__main__":
    main()

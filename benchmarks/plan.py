"""The plan against reality: memory of real steps, their time, and 405B on 16,384 devices.

    python benchmarks/plan.py [--quick] [--json PATH]

Memory: planned peak of one step over the peak that torch's profiler finds in the CPU allocator during real steps, for
shapes, precisions, checkpointing and optimisers; asked: within 10 %. Time: 20 probed steps against the median of 60
later ones, each shape; asked: within 20 %. The large plan: seconds and resident memory of a fresh process; asked:
a minute and 2 GiB.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import header, spread, write

from dougong.models.families.gpt2 import GPT2Config
from dougong.models.families.llama import LlamaConfig
from dougong.models.families.nano import NanoConfig
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.optim import OPTIMIZERS
from dougong.plan.choose import rank
from dougong.plan.counts import Counts
from dougong.plan.machine import here
from dougong.plan.option import evaluate
from dougong.plan.probe import measured, step_times
from dougong.plan.step import Step, step_memory
from dougong.plan.work import Work
from dougong.runtime.layout import LayoutConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "unit" / "plan"))

SHAPES: dict[str, Any] = {
    "llama 2.6M": LlamaConfig(vocab_size=2048, context=256, dim=192, num_layers=4, num_heads=6, num_kv_heads=2,
                              ffn_dim=512),
    "nano 2M": NanoConfig(vocab_size=2048, context=256, dim=128, num_layers=8, num_heads=4, ffn_dim=512),
    "gpt2 0.5M": GPT2Config(vocab_size=512, context=512, dim=128, num_layers=2, num_heads=4),
}
WAYS = [("none", "adamw", 4, 1), ("none", "muon", 4, 2), ("full", "adamw", 4, 2), ("selective", "adamw", 4, 1)]


def memory(quick: bool) -> list[dict[str, Any]]:
    from measured_memory import measured_peak

    rows = []
    for name, model in list(SHAPES.items())[: 1 if quick else None]:
        for precision in ("fp32", "bf16"):
            for checkpoint, optimizer, micro_rows, micro_batches in WAYS:
                step = Step(model, CausalLMConfig(), OPTIMIZERS[optimizer](), micro_rows=micro_rows,
                            micro_batches=micro_batches, precision=precision, checkpoint=checkpoint)
                planned, found = step_memory(step).peak_bytes, measured_peak(step)
                rows.append({"shape": name, "precision": precision, "checkpoint": checkpoint, "optimizer": optimizer,
                             "planned": planned, "measured": found, "ratio": planned / found})
                print(f"memory  {name:<12} {precision} {checkpoint:<10} {optimizer:<6} planned "
                      f"{planned / 2**20:7.1f} MiB  measured {found / 2**20:7.1f}  ratio {planned / found:.3f}",
                      flush=True)
    return rows


def times(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for name, model in list(SHAPES.items())[: 1 if quick else None]:
        work = Work(model=model, objective=CausalLMConfig(), optim=OPTIMIZERS["adamw"](), rows=8, context=model.context,
                    steps=80, precision="fp32", device="cpu")
        option = rank(work, here(), 1).best[0]
        machine = measured(work, option, here())
        if machine is None:
            continue
        planned = evaluate(work, Counts(work.step()), LayoutConfig(replicate=1), machine, checkpoint="none",
                           micro_rows=option.micro_rows).step_seconds
        later = step_times(work, option.micro_rows, steps=20 if quick else 60)
        found = statistics.median(later)
        rows.append({"shape": name, "planned_s": planned, "measured_s": spread(later), "ratio": planned / found})
        print(f"time    {name:<12} planned {planned * 1000:7.1f} ms  measured {found * 1000:7.1f} "
              f"({min(later) * 1000:.1f} to {max(later) * 1000:.1f})  ratio {planned / found:.3f}", flush=True)
    return rows


def large() -> dict[str, Any]:
    """A fresh process, so that nothing of this one is counted."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "dougong", "plan", str(ROOT / "examples/plan/llama405b.yaml"),
                    "--gpus", "16384", "--gpu", "h200"], check=True, stdout=subprocess.DEVNULL)
    seconds, held = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"large   405B on 16,384: {seconds:.1f} s, {held / 2**30:.2f} GiB resident (asked: 60 s, 2 GiB)", flush=True)
    return {"seconds": seconds, "resident_bytes": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one shape")
    parser.add_argument("--json", help="write the report here")
    options = parser.parse_args()
    report = {**header(), "large": large(), "memory": memory(options.quick), "time": times(options.quick)}
    ratios = [row["ratio"] for row in report["memory"]]
    timed = ", ".join(f"{row['ratio']:.2f}" for row in report["time"])
    print(f"\nmemory: {min(ratios):.3f} to {max(ratios):.3f} of the measured peak, {len(ratios)} cases (asked: 0.9 to "
          f"1.1)\ntime: {timed} of the measured (asked: 0.8 to 1.2)")
    write(options.json, report)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

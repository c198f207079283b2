"""Training and decoding on one GPU: tokens/s, MFU, memory against the estimate, bandwidth used.

    python benchmarks/gpu.py [--quick] [--json PATH] [--tiny]

`gpt2_124m` and `qwen3_1b` in bf16 on random tokens, blocks compiled; a step is a micro-batch of as many rows as fit,
forward, backward and optimiser; the same rows with the layers in float8 beside it. MFU counts 6 FLOPs a matrix
parameter and token plus causal attention, against the peak of a large bf16 product measured here. Asked on an H200: at
least 40 % at 1B and 35 % at 124M.
`--tiny` runs a toy shape on whatever device there is, to see that the script works; its figures mean nothing.
"""

import argparse
import gc
import statistics
import time
from typing import Any

import torch
from machine import header, spread, write

from dougong.core.config import replace
from dougong.data.batch import Batch
from dougong.generate import Engine, SamplingConfig
from dougong.models import count
from dougong.nn.float8 import multiply_in_float8
from dougong.recipes.assemble import build_model, compile_blocks
from dougong.recipes.derive import resolve
from dougong.recipes.recipe import load_recipe
from dougong.runtime.device import Runtime, matmul_flops_per_s
from dougong.train.state import TrainState
from dougong.train.step import take_step

TINY = ["size=null", "model.dim=64", "model.num_layers=2", "model.num_heads=8", "model.ffn_dim=128", "model.context=64"]
ASKED = {"gpt2_124m": 0.35, "qwen3_1b": 0.40}
ROWS = {"gpt2_124m": (32, 16, 8), "qwen3_1b": (16, 8, 4)}


def train(name: str, runtime: Runtime, *, tiny: bool, steps: int) -> dict[str, Any]:
    """Tokens/s, MFU and memory of training steps at the largest number of rows that fits."""
    recipe, _ = resolve(load_recipe(name, ["train.steps=1", *(TINY if tiny else [])])[0])
    recipe = replace(recipe, model=replace(recipe.model, vocab_size=recipe.tokenizer.vocab_size))
    for rows in (2,) if tiny else ROWS[name]:
        try:
            return _train(name, recipe, runtime, rows, steps)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            print(f"{name}: {rows} rows do not fit", flush=True)
    return {"name": name, "error": "not even the fewest rows fit"}


def _train(name: str, recipe: Any, runtime: Runtime, rows: int, steps: int) -> dict[str, Any]:
    in_float8, memory8 = _steps(recipe, runtime, rows, steps, float8=True)[1:]
    gc.collect()        # nothing of its model may count into the peak of the next
    torch.cuda.empty_cache()
    model, speeds, memory = _steps(recipe, runtime, rows, steps)
    context = recipe.model.context
    flops = count.flops_per_token(recipe.model, context)
    peak = matmul_flops_per_s(runtime.device, runtime.dtype)
    return {"name": name, "rows": rows, "context": context, "parameters": count.parameters(recipe.model)["total"],
            "tokens_per_s": spread(speeds), "mfu": statistics.median(speeds) * flops / peak, "asked_mfu": ASKED[name],
            "float8": {"tokens_per_s": spread(in_float8), "memory_bytes": memory8,
                       "ratio": statistics.median(in_float8) / statistics.median(speeds)},
            "peak_flops_per_s": peak, "memory_bytes": memory, "decode": decode(model, recipe, runtime),
            "planned_activation_bytes": count.activation_bytes(recipe.model, rows=rows, context=context,
                                                               dtype=runtime.dtype)}


def _steps(recipe: Any, runtime: Runtime, rows: int, steps: int,
           *, float8: bool = False) -> tuple[torch.nn.Module, list[float], int | None]:
    """The model, tokens/s of each step, and the most memory held."""
    model = build_model(recipe, runtime)
    if float8:
        multiply_in_float8(model)
    if runtime.compile:
        compile_blocks(model)
    state = TrainState(model.train(), recipe.optim.build(model), lambda step: 1.0, loader=None)
    objective, context = recipe.objective.build(), recipe.model.context
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for step in range(-3, steps):
        tokens = torch.randint(recipe.model.vocab_size, (rows, context + 1))
        batch = Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], weight=torch.ones(rows, context))
        begin = time.perf_counter()
        take_step(state, objective, batch, runtime, micro_rows=None, clip_norm=1.0, weight=float(rows * context))
        if step >= 0:
            seconds.append(time.perf_counter() - begin)
    speeds = [rows * context / s for s in seconds]
    memory = torch.cuda.max_memory_allocated() if runtime.device.type == "cuda" else None
    return model, speeds, memory


def decode(model: torch.nn.Module, recipe: Any, runtime: Runtime) -> dict[str, float]:
    """Tokens/s of batch 1, and the bytes of weights read a second."""
    engine = Engine(model, runtime)
    room = recipe.model.context - 8
    steps = min(64, room)
    speeds = []
    for _ in range(3):
        begin = time.perf_counter()
        written = sum(len(step) for step in engine.start([[1] * 8], SamplingConfig(temperature=0, max_tokens=steps)))
        speeds.append(written / (time.perf_counter() - begin))
    matrices = count.parameters(recipe.model)["matrices"] * runtime.dtype.itemsize
    return {"tokens_per_s": statistics.median(speeds), "bytes_per_s": statistics.median(speeds) * matrices}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the small model only")
    parser.add_argument("--json", help="write the report here")
    parser.add_argument("--tiny", action="store_true", help="a toy shape, to try the script")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        print("SKIPPED: no CUDA device. `--tiny` tries the script without one.")
        return
    report = header()
    cuda = torch.cuda.is_available()
    runtime = Runtime(device=torch.device("cuda" if cuda else "cpu"), dtype=torch.bfloat16, compile=cuda)
    report["results"] = []
    for name in list(ASKED)[:1] if options.quick else ASKED:
        row = train(name, runtime, tiny=options.tiny, steps=3 if options.tiny else 20)
        report["results"].append(row)
        if "error" in row:
            print(f"{name}: {row['error']}", flush=True)
            continue
        memory = f", {row['memory_bytes'] / 2**30:.1f} GiB" if row["memory_bytes"] else ""
        print(f"{name}: {row['parameters'] / 1e6:,.0f}M parameters, {row['rows']} × {row['context']} tokens: "
              f"{row['tokens_per_s']['median']:,.0f} tokens/s, MFU {row['mfu']:.1%} (asked ≥ {row['asked_mfu']:.0%})"
              f"{memory}; in float8 {row['float8']['ratio']:.2f} times as fast; decoding "
              f"{row['decode']['tokens_per_s']:,.0f} tokens/s", flush=True)
    write(options.json, report)


if __name__ == "__main__":
    main()

"""Decoding speed beside transformers' `generate`: the same random Qwen3 weights, the same prompts, one
process.

    python benchmarks/generation.py [--quick] [--json PATH] [--threads N]

Asked: at batch 1 at least 1.5 times transformers' tokens/s in the same precision; at batch 16 at least 6
times our own batch 1. A call reads a 64-token prompt and writes 128 tokens greedily (quick: 32); its whole
time counts. The contenders take turns, so a machine that slows down slows them alike; ratios are taken within
a round, and the median is reported with the lowest and highest round.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import Qwen3Config as HuggingFaceConfig
from transformers import Qwen3ForCausalLM

from dougong import __version__
from dougong.generate import Engine, SamplingConfig
from dougong.interop.maps.qwen3 import MAP
from dougong.runtime.device import Runtime, machine_facts, usable_cores

PROMPT_TOKENS = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build() -> tuple[Qwen3ForCausalLM, torch.nn.Module]:
    """transformers' model and ours, 82M parameters, the same numbers in both."""
    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(HuggingFaceConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=1728, num_hidden_layers=12, num_attention_heads=6,
        num_key_value_heads=6, head_dim=128, max_position_embeddings=1024, tie_word_embeddings=True,
        initializer_range=0.05)).eval()
    config = MAP.config_from_hf(theirs.config.to_dict())
    ours = config.build()
    ours.load_state_dict(MAP.tensors_from_hf(config, theirs.state_dict()))
    return theirs, ours


def contenders(theirs: Qwen3ForCausalLM, ours: torch.nn.Module, dtype: torch.dtype, steps: int) -> dict:
    """Calls that return the written tokens (rows, steps), by name."""
    theirs = theirs.to(dtype)
    engine = Engine(ours, Runtime(dtype=dtype, threads=torch.get_num_threads()))
    sampling = SamplingConfig(temperature=0, max_tokens=steps)
    prompts = torch.randint(0, 8192, (16, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))

    def transformers_generate(rows: int) -> torch.Tensor:
        with torch.inference_mode():
            text = theirs.generate(prompts[:rows], attention_mask=torch.ones_like(prompts[:rows]),
                                   do_sample=False, max_new_tokens=steps, min_new_tokens=steps,
                                   pad_token_id=0)
        return text[:, PROMPT_TOKENS:]

    def dougong_engine(rows: int) -> torch.Tensor:
        written = [[token.id for token in step] for step in engine.start(prompts[:rows].tolist(), sampling)]
        return torch.tensor(written).T

    return {"transformers, batch 1": lambda: transformers_generate(1),
            "dougong, batch 1": lambda: dougong_engine(1),
            "transformers, batch 16": lambda: transformers_generate(16),
            "dougong, batch 16": lambda: dougong_engine(16)}


def measure(calls: dict, steps: int, rounds: int) -> dict[str, list[float]]:
    """Tokens/s of each contender in each round, after one call that is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            written = call()
            seconds = time.perf_counter() - begin
            assert written.shape[1] == steps, f"{name} wrote {tuple(written.shape)} tokens"
            if turn >= 0:
                speeds[name].append(written.numel() / seconds)
    return speeds


def ratio(of: list[float], to: list[float]) -> dict[str, float]:
    each = sorted(a / b for a, b in zip(of, to))
    return {"median": statistics.median(each), "low": each[0], "high": each[-1]}


def agreement(calls: dict) -> int:
    """How many tokens of a batch-1 text are the same before the first difference."""
    a, b = calls["transformers, batch 1"]()[0], calls["dougong, batch 1"]()[0]
    return int((a == b).long().cumprod(0).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="32 tokens and 3 rounds instead of 128 and 5")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args()
    steps, rounds = (32, 3) if options.quick else (128, 5)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    machine = machine_facts(torch.device("cpu"))
    versions = {"dougong": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
                "python": platform.python_version()}
    command = " ".join(["python", "benchmarks/generation.py", *sys.argv[1:]])
    print(f"{machine['processor']}, {options.threads} threads; {versions}\n{command}")
    results = {}
    for precision, dtype in DTYPES.items():
        theirs, ours = build()
        calls = contenders(theirs, ours, dtype, steps)
        same = agreement(calls)
        speeds = measure(calls, steps, rounds)
        pairs = {"batch 1, dougong / transformers": ("dougong, batch 1", "transformers, batch 1"),
                 "batch 16, dougong / transformers": ("dougong, batch 16", "transformers, batch 16"),
                 "dougong, batch 16 / batch 1": ("dougong, batch 16", "dougong, batch 1")}
        ratios = {name: ratio(speeds[of], speeds[to]) for name, (of, to) in pairs.items()}
        print(f"\n{precision}: the first {same} of {steps} greedy tokens agree")
        for name, values in speeds.items():
            spread = f"({min(values):.1f} to {max(values):.1f})"
            print(f"  {name:<26}{statistics.median(values):9.1f} tokens/s  {spread}")
        for name, r in ratios.items():
            print(f"  {name:<36}{r['median']:6.2f}×  ({r['low']:.2f} to {r['high']:.2f})")
        results[precision] = {"tokens_per_s": speeds, "ratios": ratios, "greedy_tokens_equal": same,
                              "steps": steps}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({
            "benchmark": "generation", "command": command, "machine": machine, "versions": versions,
            "threads": options.threads, "results": results,
            "asked": {"batch 1, dougong / transformers": 1.5, "dougong, batch 16 / batch 1": 6.0}}, indent=1))


if __name__ == "__main__":
    main()

"""Training throughput at equal model, batch, precision and dropout, beside a plain PyTorch loop around transformers.

    python benchmarks/throughput.py [--quick] [--json PATH] [--threads N]

GPT-2's layout, 10.7M parameters: 6 layers, width 384, 6 heads, context 256, batch 16, 65 characters, AdamW. Both have
the same weights. Each contender runs in a process of its own (peak memory is the process's), and the processes take
turns step by step of a round, so a machine that slows down slows both alike; ratios are taken within a round.
Asked: dropout 0: fp32 ≥ 1.05×, bf16 ≥ 1.2×; dropout 0.1: fp32 ≥ 1.4×, bf16 ≥ 1.8×; peak memory no higher.
"""

import argparse
import multiprocessing
import time
from typing import Any

import torch
from machine import header, spread, write

VOCABULARY, CONTEXT, ROWS = 65, 256, 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ASKED = {("fp32", 0.0): 1.05, ("bf16", 0.0): 1.2, ("fp32", 0.1): 1.4, ("bf16", 0.1): 1.8}


def hugging_face(dropout: float) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=384, n_layer=6, n_head=6,
                                      bos_token_id=None, eos_token_id=None,
                                      embd_pdrop=dropout, resid_pdrop=dropout, attn_pdrop=dropout)).train()


def transformers_step(dtype: torch.dtype, dropout: float):
    """The loop one writes around transformers: autocast for bf16, fused AdamW."""
    model = hugging_face(dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(tokens: torch.Tensor, targets: torch.Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(tokens).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def dougong_step(dtype: torch.dtype, dropout: float):
    """The same weights through dougong's own model, objective and step."""
    from dougong.core.config import replace
    from dougong.data.batch import Batch
    from dougong.interop.maps.gpt2 import MAP
    from dougong.objectives.causal_lm import CausalLMConfig
    from dougong.optim.build import AdamWConfig
    from dougong.runtime.allocator import keep_freed_memory
    from dougong.runtime.device import Runtime
    from dougong.train.state import TrainState
    from dougong.train.step import take_step

    keep_freed_memory()
    theirs = hugging_face(dropout)
    config = replace(MAP.config_from_hf(theirs.config.to_dict()), dropout=dropout, embedding_dropout=dropout,
                     attention_dropout=dropout)
    model = config.build()
    model.load_state_dict(MAP.tensors_from_hf(config, theirs.state_dict()))
    del theirs
    model.compute_dtype = dtype
    model.train()
    state = TrainState(model, AdamWConfig(lr=1e-4, weight_decay=0.01).build(model), lambda step: 1.0, loader=None)
    objective, runtime = CausalLMConfig().build(), Runtime(dtype=dtype)

    def step(tokens: torch.Tensor, targets: torch.Tensor) -> float:
        batch = Batch(tokens=tokens, targets=targets, weight=torch.ones(tokens.shape))
        result = take_step(state, objective, batch, runtime, micro_rows=None, clip_norm=1.0,
                           weight=objective.weight(batch))
        return result.metrics["loss"]

    return step


CONTENDERS = {"transformers": transformers_step, "dougong": dougong_step}


def contender(name: str, precision: str, dropout: float, threads: int, pipe: Any) -> None:
    """A process: runs a round of steps when told to and answers with the seconds of each and the memory it grew by."""
    import resource

    torch.set_num_threads(threads)
    step = CONTENDERS[name](DTYPES[precision], dropout)
    generator = torch.Generator().manual_seed(1)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while (count := pipe.recv()) is not None:
        seconds = []
        for _ in range(count):
            tokens = torch.randint(0, VOCABULARY, (ROWS, CONTEXT + 1), generator=generator)
            begin = time.perf_counter()
            loss = step(tokens[:, :-1], tokens[:, 1:])
            seconds.append(time.perf_counter() - begin)
        pipe.send((seconds, loss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base))


def compare(precision: str, dropout: float, *, rounds: int, steps: int, threads: int) -> dict[str, Any]:
    """Tokens/s of both, their ratio within each round, and the memory each grew by."""
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], {}
    for name in CONTENDERS:
        pipes[name], end = context.Pipe()
        processes.append(context.Process(target=contender, args=(name, precision, dropout, threads, end), daemon=True))
        processes[-1].start()
    speeds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    memory, first_loss = {}, {}
    for turn in range(-1, rounds):
        for name, pipe in pipes.items():
            pipe.send(1 if turn < 0 else steps)
            seconds, loss, grown = pipe.recv()
            if turn < 0:
                first_loss[name] = loss
            else:
                speeds[name].append(ROWS * CONTEXT * len(seconds) / sum(seconds))
            memory[name] = grown / 1024
    for pipe, process in zip(pipes.values(), processes):
        pipe.send(None)
        process.join()
    if dropout == 0:    # the same weights and tokens: the same loss, or the comparison means nothing
        assert abs(first_loss["dougong"] - first_loss["transformers"]) < 0.02, first_loss
    ratios = [a / b for a, b in zip(speeds["dougong"], speeds["transformers"])]
    return {"precision": precision, "dropout": dropout, "asked": ASKED[precision, dropout], "ratio": spread(ratios),
            "tokens_per_s": {name: spread(values) for name, values in speeds.items()}, "grown_mib": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="bf16 only, fewer steps: about a minute")
    parser.add_argument("--json", help="write the report here")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = header()
    rounds, steps = (3, 2) if options.quick else (5, 6)
    cases = [(p, d) for p in DTYPES for d in (0.0, 0.1) if p == "bf16" or not options.quick]
    report["results"] = []
    print(f"{'':14}{'transformers':>14}{'dougong':>12}   ratio (spread)        asked    memory grown by, MiB")
    for precision, dropout in cases:
        row = compare(precision, dropout, rounds=rounds, steps=steps, threads=options.threads)
        report["results"].append(row)
        speed, ratio, memory = row["tokens_per_s"], row["ratio"], row["grown_mib"]
        theirs, ours = speed["transformers"]["median"], speed["dougong"]["median"]
        print(f"{precision} drop {dropout:<5}{theirs:>12,.0f}{ours:>12,.0f}"
              f"   {ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})   ≥ {row['asked']:.2f}   "
              f"{memory['transformers']:,.0f} → {memory['dougong']:,.0f}", flush=True)
    write(options.json, report)


if __name__ == "__main__":
    main()

"""LoRA training beside a plain loop around PEFT and transformers: the same model, batch, precision and adapter.

    python benchmarks/lora.py [--quick] [--json PATH] [--threads N]

Qwen3's layout, 5.5M parameters: 6 layers, width 256, 4 heads of 64 (2 for keys and values), inner width 704, 4,096
tokens (what the size dial gives such a model), context 256, batch 4; rank 16 on all matrices but the head; every other
half of a row has no loss, as prompts have in supervised fine-tuning; AdamW. Each contender runs in a process of its
own, and the processes take turns round by round; ratios are taken within a round, of the time on the clock and of the
processor's (which a shared machine disturbs less). Asked: fp32 ≥ 1.2×, peak memory no higher.
"""

import argparse
import multiprocessing
import os
import time
from typing import Any

import torch
from machine import header, spread, write

VOCABULARY, CONTEXT, ROWS, RANK, ALPHA = 4096, 256, 4, 16, 32
ASKED = 1.2


def hugging_face() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None))


def peft_step(kind: str) -> Any:
    """The loop one writes around PEFT: all-linear, fused AdamW over what wants a gradient."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(hugging_face(), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear",
                                                      use_dora=kind == "dora", task_type="CAUSAL_LM")).train()
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=1e-4, fused=True)

    def step(tokens: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> float:
        logits = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1),
                                                 targets.masked_fill(weight == 0, -100).flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wanted, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def dougong_step(kind: str) -> Any:
    """The same weights through dougong's own model, adapter, objective and step."""
    from dougong.adapt.lora import LoRAConfig, hold_frozen
    from dougong.data.batch import Batch
    from dougong.interop.maps.qwen3 import MAP
    from dougong.objectives.causal_lm import CausalLMConfig
    from dougong.optim.build import AdamWConfig
    from dougong.runtime.allocator import keep_freed_memory
    from dougong.runtime.device import Runtime
    from dougong.train.state import TrainState
    from dougong.train.step import take_step

    keep_freed_memory()
    theirs = hugging_face()
    config = MAP.config_from_hf(theirs.config.to_dict())
    model = config.build()
    model.initialise(0)
    model.load_state_dict(MAP.tensors_from_hf(config, dict(theirs.state_dict())), strict=False)
    del theirs
    hold_frozen(LoRAConfig(kind=kind, rank=RANK, alpha=ALPHA).apply(model, seed=0)).train()
    state = TrainState(model, AdamWConfig(lr=1e-4, weight_decay=0.01).build(model), lambda step: 1.0, loader=None)
    objective, runtime = CausalLMConfig().build(), Runtime()

    def step(tokens: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> float:
        batch = Batch(tokens=tokens, targets=targets, weight=weight)
        result = take_step(state, objective, batch, runtime, micro_rows=None, clip_norm=1.0,
                           weight=objective.weight(batch))
        return result.metrics["loss"]

    return step


CONTENDERS = {"peft": peft_step, "dougong": dougong_step}


def contender(name: str, kind: str, threads: int, pipe: Any) -> None:
    """A process: runs a round of steps when told to and answers with the seconds of each and its peak memory."""
    import resource

    torch.set_num_threads(threads)
    step = CONTENDERS[name](kind)
    generator = torch.Generator().manual_seed(1)
    weight = torch.ones(ROWS, CONTEXT)
    weight[:, :CONTEXT // 2] = 0.0
    base = _resident()
    while (count := pipe.recv()) is not None:
        seconds, used = [], time.process_time()
        for _ in range(count):
            tokens = torch.randint(0, VOCABULARY, (ROWS, CONTEXT + 1), generator=generator)
            begin = time.perf_counter()
            loss = step(tokens[:, :-1], tokens[:, 1:], weight)
            seconds.append(time.perf_counter() - begin)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send((seconds, time.process_time() - used, loss, peak - base))


def _resident() -> int:
    """Bytes that this process has in memory now: interpreter, packages and model."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def compare(kind: str, *, rounds: int, steps: int, threads: int) -> dict[str, Any]:
    """Tokens/s of both, their ratio within each round, and what each grew by in its steps."""
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], {}
    for name in CONTENDERS:
        pipes[name], end = context.Pipe()
        processes.append(context.Process(target=contender, args=(name, kind, threads, end), daemon=True))
        processes[-1].start()
    used: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    speeds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    memory, first_loss = {}, {}
    for turn in range(-1, rounds):
        for name, pipe in pipes.items():
            pipe.send(1 if turn < 0 else steps)
            seconds, processor, loss, grown = pipe.recv()
            if turn < 0:
                first_loss[name] = loss
            else:
                speeds[name].append(ROWS * CONTEXT * len(seconds) / sum(seconds))
                used[name].append(processor / len(seconds))
            memory[name] = grown / 2**20
    for pipe, process in zip(pipes.values(), processes):
        pipe.send(None)
        process.join()
    # the same weights and tokens, and adapters that change nothing yet: the same loss, or the comparison means nothing
    assert abs(first_loss["dougong"] - first_loss["peft"]) < 1e-3, first_loss
    ratios = [a / b for a, b in zip(speeds["dougong"], speeds["peft"])]
    return {"kind": kind, "precision": "fp32", "threads": threads, "asked": ASKED, "ratio": spread(ratios),
            "processor_ratio": spread([b / a for a, b in zip(used["dougong"], used["peft"])]),
            "tokens_per_s": {name: spread(values) for name, values in speeds.items()}, "grown_mib": memory,
            "first_loss": first_loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short rounds")
    parser.add_argument("--json")
    parser.add_argument("--threads", type=int, nargs="*", default=[torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    rounds, steps = (2, 2) if args.quick else (args.rounds, 2)
    report = {**header(), "results": []}
    for threads in args.threads:
        for kind in ("lora", "dora"):
            found = compare(kind, rounds=rounds, steps=steps, threads=threads)
            report["results"].append(found)
            write(args.json, report)        # also if it is stopped
            a, b, ratio = found["tokens_per_s"]["dougong"], found["tokens_per_s"]["peft"], found["ratio"]
            print(f"{kind:<5} fp32 {threads} threads  ours {a['median']:>5,.0f} tokens/s, PEFT {b['median']:>5,.0f}: "
                  f"{ratio['median']:.2f}× ({ratio['min']:.2f} to {ratio['max']:.2f}, asked {ASKED}×), of the "
                  f"processor's time {found['processor_ratio']['median']:.2f}×; grown by "
                  f"{found['grown_mib']['dougong']:,.0f} MiB against {found['grown_mib']['peft']:,.0f}", flush=True)


if __name__ == "__main__":
    main()

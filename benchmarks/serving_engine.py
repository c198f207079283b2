"""The generation engine under many clients: throughput, shared beginnings, the scheduler's own cost.

    python benchmarks/serving_engine.py [--quick] [--json PATH] [--threads N] [--dtype bf16|fp32] [--cpu-time]
                                        [--only WORD] [--rounds N]

A random Qwen3-shaped model of 82M parameters. Asked: 16 clients get at least 5 times the tokens/s of one; the time to
the first token of a 1,024-token prompt whose beginning (1,000 tokens) is known falls at least 5 times; scheduler and
sampling take under 10 % of a step at batch 16. Cases take turns, ratios are taken within a round, and the median is
reported with the lowest and highest round. The HTTP server is not part of it. On a machine that others use, --cpu-time
with --threads 1 counts the processor's seconds that the process got instead of those on the wall.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dougong import __version__
from dougong.generate import Engine, Request, SamplingConfig, Scheduler
from dougong.generate.fused import _one_query
from dougong.generate.grammar import Grammars
from dougong.models.families.qwen3 import Qwen3Config
from dougong.runtime.device import Runtime, machine_facts, usable_cores

VOCABULARY, PROMPT = 8192, 64
SCHEMA = {"type": "array", "minItems": 50, "items": {"type": "object", "properties": {
    "name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
    "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3}},
    "required": ["name", "age", "tags"], "additionalProperties": False}}
clock = time.perf_counter
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(dtype: torch.dtype) -> Engine:
    model = Qwen3Config(vocab_size=VOCABULARY, context=2048, dim=768, num_layers=12, num_heads=6, num_kv_heads=6,
                        head_dim=128, ffn_dim=1728).build()
    model.initialise(0)
    return Engine(model, Runtime(dtype=dtype, threads=torch.get_num_threads()))


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


def finish(scheduler: Scheduler) -> int:
    """Steps until nobody is left; returns the tokens written."""
    written = 0
    while scheduler.running or scheduler.waiting:
        written += len(scheduler.step())
    return written


def serve(engine: Engine, clients: int, steps: int, schema: dict | None = None, **sampling) -> Callable[[], float]:
    """Tokens/s of so many clients who ask at once, prompts included."""
    pieces = [bytes([i]) for i in range(256)] + [f"{chr(97 + i % 26)}{i}".encode() for i in range(256, VOCABULARY)]
    grammars = Grammars(pieces, lambda text: list(text.encode()), stop_id=VOCABULARY - 1) if schema else None

    def call() -> float:
        scheduler = Scheduler(engine, max_rows=clients, vocab_size=VOCABULARY)
        config = SamplingConfig(max_tokens=steps, **sampling)
        begin = clock()
        for i, prompt in enumerate(prompts(clients, PROMPT, seed=1)):
            constraint = grammars.json_schema(schema) if grammars and schema else None
            scheduler.add(Request(prompt, config, sample=i, constraint=constraint))
        return finish(scheduler) / (clock() - begin)
    return call


def static(engine: Engine, clients: int, steps: int) -> Callable[[], float]:
    """The same from `Engine.start`: one batch that all enter and leave together."""
    def call() -> float:
        config = SamplingConfig(max_tokens=steps, temperature=0)
        begin = clock()
        written = sum(len(step) for step in engine.start(prompts(clients, PROMPT, seed=1), config))
        return written / (clock() - begin)
    return call


def mixed(engine: Engine, one_lane: bool, steps: int) -> Callable[[], float]:
    """Tokens/s while 1 row of 1,000 tokens writes beside 15 of 40: in lanes by length, or all in one lane."""
    def call() -> float:
        scheduler = Scheduler(engine, cache_tokens=65536, chunk=1024)
        if one_lane:
            scheduler._width = lambda length: 1280
        for prompt in [*prompts(1, 1000, seed=2), *prompts(15, 40, seed=3)]:
            scheduler.add(Request(prompt, SamplingConfig(max_tokens=steps + 8, temperature=0)))
        while len(scheduler.step()) < 16:
            pass
        begin = clock()
        written = sum(len(scheduler.step()) for _ in range(steps))
        return written / (clock() - begin)
    return call


def first_token(engine: Engine, known: bool) -> Callable[[], float]:
    """Seconds to the first token of a 1,024-token prompt, its first 1,000 known or not."""
    beginning, seed = prompts(1, 1000, seed=4)[0], [0]

    def call() -> float:
        scheduler = Scheduler(engine)
        config = SamplingConfig(max_tokens=1, temperature=0)
        if known:
            scheduler.add(Request([*beginning, 1], config))
            finish(scheduler)
        seed[0] += 1
        begin = clock()
        scheduler.add(Request([*beginning, *prompts(1, 24, seed=seed[0])[0]], config))
        finish(scheduler)
        return clock() - begin
    return call


def overhead(engine: Engine, steps: int, **sampling) -> Callable[[], float]:
    """The share of a step at batch 16 that is not the model's: scheduler, sampling, bookkeeping."""
    def call() -> float:
        scheduler = Scheduler(engine, vocab_size=VOCABULARY, chunk=1024)
        for i, prompt in enumerate(prompts(16, PROMPT, seed=5)):
            scheduler.add(Request(prompt, SamplingConfig(max_tokens=steps + 8, **sampling), sample=i))
        while len(scheduler.step()) < 16:
            pass
        read, in_model = engine.read, [0.0]

        def timed(*arguments):
            begin = clock()
            logits = read(*arguments)
            in_model[0] += clock() - begin
            return logits

        engine.read = timed  # type: ignore[method-assign]
        begin = clock()
        for _ in range(steps):
            assert len(scheduler.step()) == 16
        whole = clock() - begin
        del engine.read
        return 1 - in_model[0] / whole
    return call


def guessing(engine: Engine, speculate: int, steps: int) -> Callable[[], float]:
    """Tokens/s of one client whose text is one token over and over (a bias forces it): what guessing can give at best,
    not what an ordinary text gets.
    """
    def call() -> float:
        scheduler = Scheduler(engine)
        config = SamplingConfig(max_tokens=steps, temperature=0, logit_bias=((5, 100.0),))
        begin = clock()
        scheduler.add(Request([5] * PROMPT, config, speculate=speculate))
        return finish(scheduler) / (clock() - begin)
    return call


def attention(pages: bool, dtype: torch.dtype) -> Callable[[], float]:
    """Seconds of 12 layers of attention, 16 rows of 500 keys: over a lane's slice, or over pages gathered first."""
    rows, heads, keys, width, block = 16, 6, 512, 128, 64
    query = torch.randn(rows, heads, 1, width).to(dtype)
    lane = torch.randn(2, rows, heads, keys, width).to(dtype).unbind()
    pool = torch.randn(2, rows * keys // block, heads, block, width).to(dtype)
    table = torch.randperm(pool.shape[1])

    attend = _one_query if dtype == torch.bfloat16 else torch.nn.functional.scaled_dot_product_attention

    def gathered(store: torch.Tensor) -> torch.Tensor:
        own = store.index_select(0, table).view(rows, keys // block, heads, block, width)
        return own.transpose(1, 2).reshape(rows, heads, keys, width)

    def call() -> float:
        begin = clock()
        with torch.inference_mode():
            for _ in range(12):
                k, v = (gathered(store) if pages else store[:, :, 12:] for store in (pool if pages else lane))
                attend(query, k, v, attn_mask=None)
        return clock() - begin
    return call


def agreement(engine: Engine, steps: int) -> dict[str, int]:
    """How many of 16 greedy texts, written together, equal those written alone; and where the first one differs. The
    model is untrained, so its best two tokens are often closer than rounding: a trained one differs later.
    """
    config = SamplingConfig(max_tokens=steps, temperature=0)
    requests = [Request(prompts(1, 8 + 17 * i, seed=20 + i)[0], config) for i in range(16)]

    def texts(groups: list[list[Request]]) -> list[list[int]]:
        written = []
        for group in groups:
            scheduler = Scheduler(engine, cache_tokens=65536)
            own: dict[int, list[int]] = {scheduler.add(request): [] for request in group}
            while scheduler.running or scheduler.waiting:
                for token in scheduler.step():
                    own[token.row].append(token.id)
            written += own.values()
        return written

    same = [next((t for t in range(steps) if a[t] != b[t]), steps)
            for a, b in zip(texts([requests]), texts([[request] for request in requests]))]
    return {"texts": 16, "equal": sum(t == steps for t in same), "tokens": steps, "first_difference": min(same)}


def measure(cases: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each case in turn, `rounds` times, after one call that is not counted."""
    values: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(-1, rounds):
        for name, call in cases.items():
            value = call()
            if turn >= 0:
                values[name].append(value)
    return values


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="24 tokens and 3 rounds instead of 96 and 5")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--cpu-time", action="store_true", help="the process's seconds on the processor (one thread)")
    parser.add_argument("--only", default="", help="cases whose name holds one of these, such as 'client,|share'")
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    steps, rounds = (24, 3) if options.quick else (96, 5)
    rounds = options.rounds or rounds
    if options.cpu_time:
        global clock
        clock, options.threads = time.process_time, 1
    torch.set_num_threads(options.threads)
    machine = machine_facts(torch.device("cpu"))
    command = " ".join(["python", "benchmarks/serving_engine.py", *sys.argv[1:]])
    print(f"{machine['processor']}, {options.threads} threads, {options.dtype}\n{command}")
    engine = build(DTYPES[options.dtype])
    drawn = {"temperature": 0.8, "top_p": 0.95}
    cases = {
        "1 client, tokens/s": serve(engine, 1, steps, temperature=0),
        "16 clients, tokens/s": serve(engine, 16, steps, temperature=0),
        "16 clients, drawn, tokens/s": serve(engine, 16, steps, **drawn),
        "16 clients, JSON schema, tokens/s": serve(engine, 16, steps, schema=SCHEMA, **drawn),
        "1 row, static batch, tokens/s": static(engine, 1, steps),
        "16 rows, static batch, tokens/s": static(engine, 16, steps),
        "1 long and 15 short rows, lanes by length, tokens/s": mixed(engine, False, steps),
        "1 long and 15 short rows, one lane, tokens/s": mixed(engine, True, steps),
        "first token, 1,024 new tokens, s": first_token(engine, known=False),
        "first token, 1,000 known, s": first_token(engine, known=True),
        "attention over pages, gathered, s": attention(True, DTYPES[options.dtype]),
        "attention over a lane, s": attention(False, DTYPES[options.dtype]),
        "share of the step outside the model, greedy": overhead(engine, steps, temperature=0),
        "share of the step outside the model, drawn": overhead(engine, steps, **drawn),
        "repetitive text, tokens/s": guessing(engine, 0, steps),
        "repetitive text, guessing 6 ahead, tokens/s": guessing(engine, 6, steps)}
    cases = {name: call for name, call in cases.items() if any(word in name for word in options.only.split("|"))}
    values = measure(cases, rounds)
    pairs = {
        "16 clients / 1 client": ("16 clients, tokens/s", "1 client, tokens/s"),
        "scheduler / static batch, 1 row": ("1 client, tokens/s", "1 row, static batch, tokens/s"),
        "scheduler / static batch, 16 rows": ("16 clients, tokens/s", "16 rows, static batch, tokens/s"),
        "lanes by length / one lane": ("1 long and 15 short rows, lanes by length, tokens/s",
                                       "1 long and 15 short rows, one lane, tokens/s"),
        "first token, unknown / known": ("first token, 1,024 new tokens, s", "first token, 1,000 known, s"),
        "attention, pages / lane": ("attention over pages, gathered, s", "attention over a lane, s"),
        "JSON schema / free": ("16 clients, JSON schema, tokens/s", "16 clients, drawn, tokens/s"),
        "guessing / not, repetitive text": ("repetitive text, guessing 6 ahead, tokens/s", "repetitive text, tokens/s")}
    ratios = {name: spread([x / y for x, y in zip(values[over], values[under])])
              for name, (over, under) in pairs.items() if over in values and under in values}
    for name, held in values.items():
        print(f"  {name:<54}{statistics.median(held):10.3f}   ({min(held):.3f} to {max(held):.3f})")
    for name, ratio in ratios.items():
        print(f"  {name:<54}{ratio['median']:9.2f}×   ({ratio['low']:.2f} to {ratio['high']:.2f})")
    same = {} if options.only else agreement(engine, steps)
    if same:
        print(f"  {same['equal']} of {same['texts']} texts of {steps} tokens written together equal those written "
              f"alone; all agree up to token {same['first_difference']}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        versions = {"dougong": __version__, "torch": torch.__version__, "python": platform.python_version()}
        options.json.write_text(json.dumps({
            "benchmark": "serving_engine", "command": command, "machine": machine, "versions": versions,
            "threads": options.threads, "dtype": options.dtype, "cpu_time": options.cpu_time, "steps": steps,
            "values": values, "ratios": ratios, "agreement": same,
            "asked": {"16 clients / 1 client": 5.0, "first token, unknown / known": 5.0,
                      "share of the step outside the model": 0.1}}, indent=1))


if __name__ == "__main__":
    main()

"""The server under many clients: 16 against 1, the first token's time, prefix sharing, start, and what HTTP costs.

    python benchmarks/serving.py [--quick] [--json PATH] [--threads N] [--dtype bf16|fp32]

Asked: 16 concurrent clients get at least 5 times the tokens/s of one; with a prompt of 1,000 tokens in common the
first token comes at least 5 times sooner; `dougong serve` answers within 3 s of its start, the weights' reading
apart. The model is that of `generation.py`, 82M parameters with random weights, in bf16 unless told otherwise;
clients are real HTTP streams, in a process of their own. Rounds of 1 and of 16 clients take turns in one server;
ratios are taken within a round.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

os.environ.setdefault("GOMP_SPINCOUNT", "10000")     # as the command does, before torch is loaded

import torch

from dougong import __version__
from dougong.data.tokenizer import BytesConfig
from dougong.generate import Engine
from dougong.models.families.qwen3 import Qwen3Config
from dougong.runtime.device import Runtime, RuntimeConfig, machine_facts, usable_cores
from dougong.serve.app import create_app
from dougong.serve.model import ServedModel
from dougong.serve.server import Server, bind
from dougong.serve.settings import ServeConfig

CONTEXT = 1536


def build(small: bool) -> torch.nn.Module:
    """Random weights: speed does not depend on what is said, but texts would end early, so the end is never drawn."""
    shape = {"dim": 128, "ffn_dim": 288, "num_layers": 4, "num_heads": 2, "num_kv_heads": 2} if small else {
        "dim": 768, "ffn_dim": 1728, "num_layers": 12, "num_heads": 6, "num_kv_heads": 6}
    model = Qwen3Config(vocab_size=8192, context=CONTEXT, head_dim=128, tied=True, **shape).build()
    model.initialise(0)
    return model


async def one(client: httpx.AsyncClient, prompt: str, tokens: int, seed: int) -> tuple[float, float, int]:
    """Seconds to the first token and to the last, and how many came."""
    begin, first, count = time.perf_counter(), 0.0, 0
    body = {"prompt": prompt, "max_tokens": tokens, "seed": seed, "logit_bias": {"256": -100}, "stream": True,
            "stream_options": {"include_usage": True}, "logprobs": 0}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - begin
                if usage := json.loads(line[6:]).get("usage"):
                    count = usage["completion_tokens"]
    assert count == tokens, f"{count} of {tokens} tokens came"
    return first, time.perf_counter() - begin, count


async def _crowd(url: str, prompts: list[str], tokens: int, seed: int) -> dict[str, object]:
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=64)) as client:
        begin = time.perf_counter()
        told = await asyncio.gather(*(one(client, prompt, tokens, seed + i) for i, prompt in enumerate(prompts)))
        seconds = time.perf_counter() - begin
    return {"tokens_per_s": sum(count for *_, count in told) / seconds, "first_s": [first for first, *_ in told]}


def crowd(url: str, prompts: list[str], tokens: int, seed: int) -> dict:
    """Clients in a process of their own, so that their work does not hold the server's interpreter."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_in_process, (url, prompts, tokens, seed))


def _in_process(url: str, prompts: list[str], tokens: int, seed: int) -> dict:
    return asyncio.run(_crowd(url, prompts, tokens, seed))


def serve(model: torch.nn.Module, threads: int, precision: str) -> tuple[Server, str, ServedModel]:
    config = ServeConfig(port=0)
    runtime = Runtime.start(RuntimeConfig(device="cpu", precision=precision, threads=threads))   # type: ignore[arg-type]
    served = ServedModel("model", Engine(model, runtime), BytesConfig().build(), config)
    listener = bind(config)
    server = Server(create_app([served], config), config)
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return server, f"http://127.0.0.1:{listener.getsockname()[1]}", served


def clients(url: str, tokens: int, rounds: int) -> dict[str, object]:
    """Tokens/s of one client and of sixteen, each with a prompt of its own of 64 tokens."""
    speeds: dict[int, list[float]] = {1: [], 16: []}
    firsts: dict[int, list[float]] = {1: [], 16: []}
    for turn in range(-1, rounds):
        for number in speeds:
            prompts = [f"{turn:03d}{number:03d}{i:03d}".ljust(63, "x") for i in range(number)]
            told = crowd(url, prompts, tokens, 100 * turn + 100)
            if turn >= 0:
                speeds[number].append(told["tokens_per_s"])
                firsts[number] += told["first_s"]
    ratios = sorted(many / single for many, single in zip(speeds[16], speeds[1]))
    return {"tokens_per_s": {str(n): s for n, s in speeds.items()}, "first_token_s": {
        str(n): {"median": statistics.median(f), "largest": max(f)} for n, f in firsts.items()},
        "ratio": {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}}


def prefixes(url: str, rounds: int) -> dict[str, object]:
    """The first token's time of a prompt of 1,000 tokens, when nobody and when somebody asked with it before."""
    cold, warm = [], []
    for turn in range(rounds + 1):
        prompt = f"{turn:04d}" + "shared " * 142
        first = crowd(url, [prompt + "a"], 4, 1)["first_s"][0]
        second = crowd(url, [prompt + "b"], 4, 1)["first_s"][0]
        if turn:
            cold.append(first)
            warm.append(second)
    ratios = sorted(a / b for a, b in zip(cold, warm))
    return {"cold_s": cold, "warm_s": warm, "ratio": {"median": statistics.median(ratios), "low": ratios[0],
                                                     "high": ratios[-1]}}


def overhead(url: str, served: ServedModel, tokens: int) -> dict[str, float]:
    """At 16 rows: what goes by beside the engine's reading (the model's own work), HTTP and text included: of all the
    time that 16 clients wait, arrival, prompts and end included, and between two steps that write 16 tokens."""
    engine, steps = served.engine, []

    def timed(read: Callable) -> Callable:
        def outer(tokens_BT: Any, *more: Any) -> Any:
            begin = time.perf_counter()
            logits = read(tokens_BT, *more)
            steps.append((tuple(tokens_BT.shape), begin, time.perf_counter()))
            return logits

        return outer

    engine.read, engine.read_each = timed(engine.read), timed(engine.read_each)   # type: ignore[method-assign]
    try:
        told = crowd(url, [f"over{i:03d}".ljust(63, "x") for i in range(16)], tokens, 7)
    finally:
        del engine.read, engine.read_each
    seconds, inside = 16 * tokens / told["tokens_per_s"], sum(end - begin for _, begin, end in steps)
    both = [(later[1] - end, end - begin) for (shape, begin, end), later in pairwise(steps)
            if shape == later[0] == (16, 1)]
    gap, step = (statistics.median(times) for times in zip(*both))
    return {"seconds": seconds, "in_model_s": inside, "beside_the_model": seconds / inside - 1,
            "step_s": step, "between_steps_s": gap, "of_a_step": gap / step}


def start(rounds: int = 5) -> dict[str, Any]:
    """Seconds from the command to its first answer, with a run of a few steps; and what `import torch` alone takes.

    Python keeps its bytecode, as it does unless told otherwise: the first start writes it and is not counted.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts"
        texts.mkdir()
        for i in range(40):
            (texts / f"{i}.txt").write_text(f"document {i} " + "some words to learn from, " * 40)
        run = Path(folder) / "run"
        subprocess.run([sys.executable, "-m", "dougong", "train", "first", "--run", str(run), f"data.path={texts}",
                        "model.dim=64", "model.num_layers=2", "tokenizer=bytes", "train.minutes=null", "train.steps=2",
                        "train.rows=2", "train.micro_rows=2", "runtime.device=cpu"], check=True, capture_output=True)
        environment["PYTHONPYCACHEPREFIX"] = str(Path(folder) / "bytecode")
        command = [sys.executable, "-m", "dougong", "serve", str(run), "--port", "0"]
        served, imported = [], []
        for _ in range(rounds + 1):
            served.append(_first_answer(command, environment))
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import torch"], check=True, env=environment)
            imported.append(time.perf_counter() - begin)
    return {"first_answer_s": statistics.median(served[1:]), "each_s": served[1:],
            "import_torch_s": statistics.median(imported[1:])}


def _first_answer(command: list[str], environment: dict[str, str]) -> float:
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split(" at ")[1].split()[0]
        while True:
            try:
                reply = httpx.post(url + "/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=30)
                break
            except httpx.ConnectError:
                time.sleep(0.005)
        assert reply.status_code == 200
        return time.perf_counter() - begin
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a model of 1M parameters, fewer tokens and rounds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16",
                        help="fp32 is the faster where the processor has no bf16 instructions")
    options = parser.parse_args()
    tokens, rounds = (32, 2) if options.quick else (96, 5)
    machine = machine_facts(torch.device("cpu"))
    versions = {"dougong": __version__, "torch": torch.__version__, "python": platform.python_version()}
    command = " ".join(["python", "benchmarks/serving.py", *sys.argv[1:]])
    print(f"{machine['processor']}, {options.threads} threads; {versions}\n{command}")
    results: dict = {"start": start(2 if options.quick else 5)}
    print(f"first answer {results['start']['first_answer_s']:.2f} s after the command, of which `import torch` takes "
          f"{results['start']['import_torch_s']:.2f}")
    server, url, served = serve(build(options.quick), options.threads, options.dtype)
    results["clients"] = clients(url, tokens, rounds)
    for number, speeds in results["clients"]["tokens_per_s"].items():
        first = results["clients"]["first_token_s"][number]
        print(f"{number:>3} clients{statistics.median(speeds):9.1f} tokens/s; first token "
              f"{1000 * first['median']:.0f} ms, at most {1000 * first['largest']:.0f}")
    told = results["clients"]["ratio"]
    print(f"{'16 clients / 1':<24}{told['median']:6.2f}×  ({told['low']:.2f} to {told['high']:.2f})")
    results["prefixes"] = prefixes(url, rounds)
    told = results["prefixes"]["ratio"]
    print(f"{'prefix: cold / warm':<24}{told['median']:6.2f}×  ({told['low']:.2f} to {told['high']:.2f})")
    results["overhead"] = overhead(url, served, tokens)
    told = results["overhead"]
    print(f"beside the model at 16 rows: {told['beside_the_model']:.1%} of all; between two steps of "
          f"{1000 * told['step_s']:.1f} ms {1000 * told['between_steps_s']:.1f}: {told['of_a_step']:.1%}")
    server.should_exit = True
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({
            "benchmark": "serving", "command": command, "machine": machine, "versions": versions,
            "threads": options.threads, "dtype": options.dtype, "results": results, "asked": {
                "16 clients / 1": 5.0, "prefix: cold / warm": 5.0, "first_answer_s": 3.0, "overhead": 0.1}}, indent=1))


if __name__ == "__main__":
    main()

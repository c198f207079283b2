"""`dougong serve` beside `transformers serve`: the same weights, the same clients, taking turns.

    python benchmarks/serving_beside.py [--quick] [--json PATH] [--threads N]

Asked: at least twice the tokens/s under the same load, and a lower p99 of the requests' times. The model has 82M
parameters (Qwen3, 12 layers, width 768, float32, random weights); transformers serves it both ways it knows: one
request after the other, and with continuous batching. Clients are HTTP streams of `/v1/completions` in a process of
their own, 1 and 16 at a time, each with a prompt of its own and as many tokens. The servers take turns, so that none
has the machine while another is measured.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import machine
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PROMPT = "def squared_{number}(values):\n    \"\"\"The squares of values, each of them once.\"\"\"\n    return ["


def make(folder: Path, small: bool) -> tuple[Path, Path]:
    """Random weights with a tokenizer as transformers reads them, and the run that `dougong import` makes of them."""
    published, run = folder / "hf", folder / "run"
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:80]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(path) for path in sources], vocab_size=8191, special_tokens=["<|endoftext|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(published)
    torch.manual_seed(0)
    wide, deep, heads, inner = (128, 2, 1, 288) if small else (768, 12, 6, 1728)
    Qwen3ForCausalLM(Qwen3Config(
        vocab_size=8192, hidden_size=wide, intermediate_size=inner, num_hidden_layers=deep, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=128, max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=fast.eos_token_id, bos_token_id=None)).save_pretrained(published)
    subprocess.run([sys.executable, "-m", "dougong", "import", str(published), "--run", str(run)], check=True,
                   stdout=subprocess.DEVNULL)
    return run, published


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(command: list[str], port: int, threads: int) -> Iterator[str]:
    """The server's address while it runs, from when it is healthy."""
    threads_for_all = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                               env={**os.environ, **threads_for_all, "HF_HUB_OFFLINE": "1"})
    url, begin = f"http://127.0.0.1:{port}", time.perf_counter()
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url + "/health", timeout=5).status_code == 200:
                    break
            assert process.poll() is None and time.perf_counter() - begin < 180, f"{command} does not answer"
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def one(client: httpx.AsyncClient, model: str, number: int, tokens: int) -> tuple[float, float, int]:
    """Seconds to the first piece and to the last, and how many tokens came."""
    begin, first, count, pieces = time.perf_counter(), 0.0, 0, 0
    body = {"model": model, "prompt": PROMPT.format(number=number), "max_tokens": tokens, "temperature": 1.0,
            "seed": number, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            told = json.loads(line[6:])
            if any(choice.get("text") for choice in told.get("choices", ())):
                first, pieces = first or time.perf_counter() - begin, pieces + 1
            if told.get("usage"):
                count = told["usage"]["completion_tokens"]
    return first, time.perf_counter() - begin, count or pieces


async def _crowd(url: str, model: str, number: int, tokens: int, turn: int) -> dict:
    async with httpx.AsyncClient(base_url=url, timeout=900, limits=httpx.Limits(max_connections=64)) as client:
        begin = time.perf_counter()
        told = await asyncio.gather(*(one(client, model, 100 * turn + i, tokens) for i in range(number)))
        seconds = time.perf_counter() - begin
    return {"tokens_per_s": sum(count for *_, count in told) / seconds, "first_s": [first for first, *_ in told],
            "request_s": [whole for _, whole, _ in told], "tokens": [count for *_, count in told]}


def crowd(*arguments: object) -> dict:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_in_process, arguments)


def _in_process(*arguments: object) -> dict:
    return asyncio.run(_crowd(*arguments))      # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a model of 1M parameters, fewer tokens, one round")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    tokens, rounds = (16, 1) if options.quick else (64, options.rounds)
    facts = machine.header()
    found: dict[str, dict[int, list[dict]]] = {}
    with tempfile.TemporaryDirectory() as name:
        run, exported = make(Path(name), options.quick)
        theirs = [str(Path(sys.executable).with_name("transformers")), "serve", str(exported), "--device", "cpu",
                  "--dtype", "float32", "--port"]
        servers = {
            "dougong serve": ([sys.executable, "-m", "dougong", "serve", str(run), "--port"], [], run.name),
            "transformers serve": (theirs, [], str(exported)),
            "transformers serve, continuous batching": (theirs, ["--continuous-batching"], str(exported))}
        for turn in range(rounds):
            for title, (command, more, model) in servers.items():
                port = free_port()
                with serving([*command, str(port), *more], port, options.threads) as url:
                    crowd(url, model, 2, 8, 90 + turn)      # warms up
                    for number in (1, 16):
                        told = crowd(url, model, number, tokens, turn)
                        found.setdefault(title, {}).setdefault(number, []).append(told)
                        print(f"round {turn + 1}  {title:<42}{number:>3} clients {told['tokens_per_s']:8.1f} tokens/s",
                              flush=True)
    results, base = {}, found["dougong serve"]
    print(f"\n{'':42}{'clients':>8}{'tokens/s':>10}{'first token':>13}{'p99 of a request':>18}{'dougong / it':>14}")
    for title, by_number in found.items():
        for number, rows in by_number.items():
            gains = [ours["tokens_per_s"] / row["tokens_per_s"] for ours, row in zip(base[number], rows)]
            requests = sorted(s for row in rows for s in row["request_s"])
            p99 = requests[min(len(requests) - 1, int(0.99 * len(requests)))]
            results[f"{title}, {number}"] = {
                "tokens_per_s": machine.spread([row["tokens_per_s"] for row in rows]),
                "first_token_s": machine.spread([s for row in rows for s in row["first_s"]]), "p99_request_s": p99,
                "tokens": [sum(row["tokens"]) for row in rows], "dougong_over_it": machine.spread(gains)}
            print(f"{title:42}{number:>8}{statistics.median(row['tokens_per_s'] for row in rows):10.1f}"
                  f"{statistics.median(s for row in rows for s in row['first_s']):12.2f}s{p99:17.2f}s"
                  f"{statistics.median(gains):13.2f}×")
    machine.write(options.json, {
        "benchmark": "serving_beside", **facts, "transformers": transformers.__version__, "threads": options.threads,
        "tokens": tokens, "rounds": rounds, "results": results,
        "asked": {"dougong over transformers, 16 clients": 2.0, "p99": "lower"}})


if __name__ == "__main__":
    main()

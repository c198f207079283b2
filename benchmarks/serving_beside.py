"""`dougong serve` beside `transformers serve`: the same weights, the same clients, taking turns.

    python benchmarks/serving_beside.py [--quick] [--json PATH] [--threads N]

Asked: at least twice the tokens/s under the same load, and a lower p99 of the requests' times. A run of 82M parameters
(12 layers, width 768, float32) is made by one step of training and exported for transformers, which serves it both ways
it knows: one request after the other, and with continuous batching. Clients are HTTP streams of `/v1/completions` in a
process of their own, 1 and 16 at a time, each with a prompt of its own and as many tokens; the servers' processes take
turns, so that none has the machine while another is measured.
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
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import machine
import transformers

PROMPT = "def squared_{number}(values):\n    \"\"\"The squares of values, each of them once.\"\"\"\n    return ["


def make(folder: Path, small: bool) -> tuple[Path, Path]:
    """A run, and what transformers reads of it."""
    run, exported = folder / "run", folder / "hf"
    shape = ["model.dim=128", "model.num_layers=2", "model.num_heads=1", "model.num_kv_heads=1"] if small else [
        "model.dim=768", "model.num_layers=12", "model.num_heads=6", "model.num_kv_heads=6", "model.ffn_dim=1728"]
    command = [sys.executable, "-m", "dougong"]
    subprocess.run([*command, "train", "first", "--run", str(run), *shape, "model.head_dim=128", "model.context=512",
                    "tokenizer.vocab_size=8192", "train.minutes=null", "train.steps=1", "train.rows=2",
                    "train.micro_rows=2", "runtime.device=cpu", "runtime.precision=fp32"], check=True,
                   stdout=subprocess.DEVNULL)
    subprocess.run([*command, "export", str(run), "--to", "hf", "--out", str(exported)], check=True,
                   stdout=subprocess.DEVNULL)
    return run, exported


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

"""How fast text becomes batches, and how fast a loader finds its place.

Run: `python benchmarks/data.py [--quick] [--json PATH] [--path TEXTS]`. Every figure is the median of at
least three runs with their range. Encoders are compared interleaved in one process, on the same texts and the
same number of threads; ids are checked to be equal. Without --path the text is the Python installation's.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dougong.core.files import write_json
from dougong.data.corpus import Corpus
from dougong.data.dedup import DedupConfig
from dougong.data.encoders import HuggingFaceEncoder
from dougong.data.loader import Loader
from dougong.data.materialise import materialise
from dougong.data.pack import BestFit, Stream, Windows
from dougong.data.prepare import TextData
from dougong.data.shards import write_shards
from dougong.data.split import SPLITS
from dougong.data.tokenizer import BpeConfig, Tokenizer
from dougong.runtime.device import machine_facts, peak_memory_bytes

VOCABULARY, CONTEXT, ROWS = 2048, 512, 32


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "runs": len(values),
    }


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_encoders(texts: list[str], tokenizer: Tokenizer, runs: int) -> dict[str, Any]:
    """MB/s of the chosen encoder and of `tokenizers` itself, taking turns."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    reference, rates = HuggingFaceEncoder(tokenizer.backend), {"ours": [], "tokenizers": []}
    assert all(map(np.array_equal, tokenizer.encode_batch(texts), reference.encode_batch(texts, 0))), (
        "ids differ"
    )
    for _ in range(runs):
        rates["ours"].append(megabytes / timed(lambda: tokenizer.encode_batch(texts)))
        rates["tokenizers"].append(megabytes / timed(lambda: reference.encode_batch(texts, 0)))
    ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["tokenizers"])]
    return {"megabytes": megabytes, "encoder": tokenizer.facts()["encoder"], "ids_equal": True,
            "ours_mb_per_s": spread(rates["ours"]), "tokenizers_mb_per_s": spread(rates["tokenizers"]),
            "ratio": spread(ratios)}


def measure_pipeline(data: TextData, tokenizer: Tokenizer, runs: int, near: bool) -> dict[str, Any]:
    """MB/s of reading with duplicate removal, of tokenising and packing, of both; and MB per second of
    processor time of both, which other work on the machine does not change."""
    figures: dict[str, list[float]] = {
        "reading": [],
        "tokenising_and_packing": [],
        "all": [],
        "all_by_cpu": [],
    }
    size = 0.0
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as scratch:
            start, cpu = time.perf_counter(), time.process_time()
            store = materialise(
                data.resolved_sources(), Path(scratch) / "documents", dedup=DedupConfig(near=near)
            )
            middle = time.perf_counter()
            for name in SPLITS:
                tokens = write_shards(store.split(name), tokenizer, Path(scratch) / name)
                BestFit(Stream(tokens, 0, len(tokens)), CONTEXT, Path(scratch) / name / "pack")
            end, cpu = time.perf_counter(), time.process_time() - cpu
            size = sum(store.split(name).bytes for name in SPLITS) / 1e6
        figures["reading"].append(size / (middle - start))
        figures["tokenising_and_packing"].append(size / (end - middle))
        figures["all"].append(size / (end - start))
        figures["all_by_cpu"].append(size / cpu)
    return {"megabytes": size, "near_duplicates": near, "context": CONTEXT, "packing": "best_fit",
            **{f"{name}_mb_per_s": spread(values) for name, values in figures.items()}}


def measure_training(store: Any, runs: int) -> dict[str, Any]:
    seconds = [
        timed(lambda: BpeConfig(vocab_size=VOCABULARY).build(store.split("train"))) for _ in range(runs)
    ]
    return {"vocab_size": VOCABULARY, "seconds": spread(seconds)}


def measure_loader(corpus: Corpus, runs: int) -> dict[str, Any]:
    """Rows/s of each packing, and milliseconds from a new loader and its state to the first batch."""
    tokens = corpus.tokens("train")
    stream = Stream(tokens, 0, len(tokens))
    with tempfile.TemporaryDirectory() as scratch:
        packs = {
            "windows": Windows(stream, CONTEXT),
            "best_fit": BestFit(stream, CONTEXT, Path(scratch) / "pack"),
        }
        return {name: _loader_figures(pack, runs) for name, pack in packs.items()}


def _loader_figures(pack: Any, runs: int) -> dict[str, Any]:
    def new() -> Loader:
        return Loader([pack], rows=ROWS, seed=1, fingerprint="benchmark")

    loader, rates = new(), []
    for _ in range(runs):
        batches = 100
        rates.append(ROWS * batches / timed(lambda batches=batches: [next(loader) for _ in range(batches)]))
    resumed = {}
    for position in (0, 1_000, 1_000_000, 1_000_000_000_000):
        def resume(position: int = position) -> None:
            fresh = new()
            fresh.load_state_dict({**fresh.state_dict(), "position": position})
            next(fresh)

        resumed[str(position)] = spread([1000 * timed(resume) for _ in range(max(5, runs))])
    return {"rows_per_s": spread(rates), "context": CONTEXT, "resume_ms": resumed}


def show(name: str, value: dict[str, float], unit: str) -> None:
    print(f"{name:<52} {value['median']:10,.2f} {unit:<8} ({value['least']:,.2f} … {value['most']:,.2f}, "
          f"{value['runs']} runs)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a minute: near duplicates are not looked for")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--path", help="a folder of texts instead of the Python installation")
    arguments = parser.parse_args()
    runs = 3 if arguments.quick else 5
    data = TextData(path=arguments.path)
    with tempfile.TemporaryDirectory() as scratch:
        store = materialise(
            data.resolved_sources(), Path(scratch) / "documents", dedup=DedupConfig(near=False)
        )
        training = measure_training(store, 3)
        tokenizer = BpeConfig(vocab_size=VOCABULARY).build(store.split("train"))
        texts = [document.text for document in store.split("train")][:: 4 if arguments.quick else 1]
        tokens = {name: write_shards(store.split(name), tokenizer, Path(scratch) / name) for name in SPLITS}
        corpus = Corpus(store, tokenizer, tokens, context=CONTEXT)
        result = {
            "command": " ".join(["python", "benchmarks/data.py", *sys.argv[1:]]),
            "machine": machine_facts(torch.device("cpu")),
            "load_average": os.getloadavg()[0],
            "versions": {
                name: version(name) for name in ("dougong", "torch", "numpy", "tokenizers", "tiktoken")
            },
            "text": "Python installation" if arguments.path is None else "given by --path",
            "training_the_tokenizer": training,
            "encoding": measure_encoders(texts, tokenizer, runs),
            "pipeline": measure_pipeline(data, tokenizer, runs, near=not arguments.quick),
            "loader": measure_loader(corpus, runs),
            "peak_memory_bytes": peak_memory_bytes(torch.device("cpu")),
        }
    print(
        json.dumps(
            {name: result[name] for name in ("command", "machine", "load_average", "versions", "text")},
            indent=1,
        )
    )
    show(f"training the tokenizer, {training['vocab_size']:,} entries", training["seconds"], "s")
    show(f"encoding by {result['encoding']['encoder']}", result["encoding"]["ours_mb_per_s"], "MB/s")
    show("encoding by tokenizers", result["encoding"]["tokenizers_mb_per_s"], "MB/s")
    show("ratio, run by run", result["encoding"]["ratio"], "times")
    pipeline = result["pipeline"]
    show("reading and removing duplicates" + (" (near too)" if pipeline["near_duplicates"] else " (exact)"),
         pipeline["reading_mb_per_s"], "MB/s")
    show("tokenising and packing (best fit)", pipeline["tokenising_and_packing_mb_per_s"], "MB/s")
    show("all of it", pipeline["all_mb_per_s"], "MB/s")
    show("all of it, by processor time", pipeline["all_by_cpu_mb_per_s"], "MB/CPU-s")
    for name, figures in result["loader"].items():
        show(f"loader, {name}, context {CONTEXT}", figures["rows_per_s"], "rows/s")
        for position, values in figures["resume_ms"].items():
            show(f"  from state to batch at position {int(position):,}", values, "ms")
    print(f"peak memory {result['peak_memory_bytes'] / 1e6:,.0f} MB, of which torch's import is a part")
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()

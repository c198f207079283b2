"""Realistic run directories without a training: noise, kills, resumes, skips, samples, results.

`python fake_runs.py DIRECTORY` writes one of each kind, to look at.
"""

import json
import sys
from pathlib import Path

import numpy as np
import yaml

from dougong.core.run import RunDirectory

BEGAN = 1_760_000_000.0
PROMPTS = ("def read_json(path):\n", "天地玄黄，")
WRITTEN = {
    PROMPTS[0]: (
        "e t\n  se ,(ret\n x",
        "    self.in = [self]\n    return the path\n",
        "    with open(path) as file:\n        return file.read(path)\n",
        '    with open(path, encoding="utf-8") as file:\n'
        '        return json.load(file)\n\n\ndef write_json(path, value):\n    """Writes value."""\n',
    ),
    PROMPTS[1]: (
        "的的不一，了",
        "人之日月，不可以为。",
        "宇宙洪荒，日月之行，天下之人。",
        "宇宙洪荒。日月盈昃，辰宿列张。\n寒来暑往，秋收冬藏。",
    ),
}


def recipe(**changes) -> dict:
    values = {
        "name": "first",
        "seed": 0,
        "size": "2M",
        "data": {"kind": "text", "sources": [{"kind": "python"}], "deduplicate": True},
        "tokenizer": {"kind": "bpe", "vocab_size": 2048},
        "model": {"kind": "qwen3", "dim": 192, "num_layers": 5},
        "objective": {"kind": "causal_lm", "z_loss": 0.0},
        "optim": {"kind": "muon", "lr": 0.012, "weight_decay": 0.1},
        "schedule": {"kind": "wsd", "warmup": 0.05},
        "train": {"steps": 1200, "batch": 32, "context": 256},
        "evaluate": {"split": "test", "tokens": 65536},
        "sample": {"prompts": list(PROMPTS), "tokens": 96},
        "runtime": {"precision": "bf16", "threads": 2, "compile": True},
    }
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        if leaf:
            values[section] = values[section] | {leaf: value}
        else:
            values[section] = value
    return values


class Writer:
    """Collects events of one run with a clock of its own."""

    def __init__(self, path: Path, values: dict) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.run, self.lines, self.attempt, self.now = RunDirectory(path), [], 1, BEGAN
        self.run.recipe.write_text(
            yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )

    def event(self, kind: str, **fields) -> None:
        self.lines.append(
            json.dumps(
                {"event": kind, "time": round(self.now, 3), "attempt": self.attempt, **fields},
                ensure_ascii=False,
            )
        )

    def finish(self) -> RunDirectory:
        self.run.events.write_text("\n".join(self.lines) + "\n", encoding="utf-8")
        return self.run


def start(
    writer: Writer,
    step: int = 0,
    command: tuple[str, ...] = ("/opt/venv/bin/dougong", "train", "first"),
    resumed_from: str | None = None,
) -> None:
    writer.event(
        "start",
        step=step,
        command=list(command),
        precision="bf16",
        threads=2,
        compile=True,
        peak_flops_per_s=7.8e11,
        resumed_from=resumed_from,
        versions={"dougong": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu"},
        machine={
            "processor": "AMD EPYC 9V74 80-Core Processor",
            "cores": 2,
            "memory_bytes": 8_333_000_000,
            "system": "Linux x86_64",
            "device": "cpu",
        },
    )


def preface(writer: Writer) -> None:
    """The events between the start and the first step."""
    writer.event(
        "derived",
        values=[
            {
                "key": "model.dim",
                "value": 192,
                "reason": "size 2M with a 2k vocabulary leaves 1.6M for 5 layers",
            },
            {
                "key": "train.steps",
                "value": 1200,
                "reason": "five minutes at 28,000 tokens/s, measured over ten steps",
            },
            {
                "key": "optim.lr",
                "value": 0.012,
                "reason": "0.02 · (128 / dim)^0.5, kept from sweeps at 0.8M and 4.7M",
            },
            {
                "key": "runtime.precision",
                "value": "bf16",
                "reason": "matrix products here: bf16 780 GFLOP/s, fp32 177 GFLOP/s",
            },
        ],
    )
    writer.event(
        "data",
        facts={
            "documents": 2491,
            "bytes": 28_641_022,
            "tokens": {"train": 8_404_122, "validation": 466_213, "test": 471_900},
            "bytes_per_token": 3.066,
            "duplicates": {"exact": 41, "near": 118},
            "skipped": {
                "not UTF-8": {
                    "count": 3,
                    "examples": ["test/bad_coding.py (byte 0xe9 at 81)", "a.py", "b.py"],
                },
                "looks like a secret": {"count": 5, "examples": ["keycert.pem", "a.key", "b.key", "c.pem"]},
                "hidden": {"count": 12, "examples": [".gitignore"]},
            },
            "split": {
                "rule": "hash",
                "train": {"documents": 2242, "bytes": 25_770_112},
                "validation": {"documents": 124, "bytes": 1_430_455},
                "test": {"documents": 125, "bytes": 1_440_455},
            },
            "packing": {"method": "best fit", "rows": 32_830, "documents_cut": 2031, "filled": 0.9987},
            "sources": [
                {"source": "library", "documents": 1742, "bytes": 19_822_001, "tokens": 6_480_000},
                {"source": "documentation", "documents": 749, "bytes": 8_819_021, "tokens": 2_862_235},
            ],
            "python_version": "3.11.7",
            "tokenizer": {"kind": "bpe", "vocab_size": 2048, "pre_tokenizer": "qwen2"},
        },
    )
    writer.event(
        "model",
        flops_per_token=1.31e7,
        parameters={
            "total": 2_064_384,
            "embedding": 393_216,
            "matrices": 2_059_776,
            "by_part": {"stem": 393_216, "stack.attention": 368_640, "stack.mlp": 1_297_920, "norm": 4_608},
        },
        groups=[
            {
                "optimizer": "muon",
                "names": [f"stack.{i}.attention.q.weight" for i in range(5)],
                "parameters": 1_666_560,
                "lr": 0.012,
                "weight_decay": 0.1,
            },
            {
                "optimizer": "adamw",
                "names": ["stem.embedding.weight"],
                "parameters": 393_216,
                "lr": 0.006,
                "weight_decay": 0.0,
            },
            {
                "optimizer": "adamw",
                "names": [f"stack.{i}.norm.weight" for i in range(10)],
                "parameters": 4_608,
                "lr": 0.006,
                "weight_decay": 0.0,
            },
        ],
    )


def true_loss(step: np.ndarray | float, steps: int, floor: float = 2.62) -> np.ndarray:
    """A curve with a fast fall, a slow one, and the drop of a decaying rate at the end."""
    part = np.asarray(step) / steps
    return floor + 5.0 * np.exp(-np.asarray(step) / (0.03 * steps)) + 0.55 * (1 - part) ** 0.7 * np.exp(-part)


def train_steps(
    writer: Writer,
    first: int,
    last: int,
    steps: int,
    *,
    seed: int = 0,
    floor: float = 2.62,
    every: int = 1,
    rate: float = 28_000,
    skips: tuple[int, ...] = (),
) -> None:
    random = np.random.default_rng(seed)
    evaluations = {round(steps * f) for f in (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)}
    best = np.inf
    for step in range(first, last + 1, every):
        noise, part, weight = random.normal(0, 0.06), step / steps, 8192
        speed = rate * (1 - abs(random.normal(0, 0.03))) * (0.6 if step < 3 else 1)
        elapsed = step * weight / rate
        writer.now = BEGAN + elapsed * 1.08 + 400 * (writer.attempt - 1)
        if step in skips:
            writer.event("skip", step=step, reason="non-finite gradient", count=1)
            continue
        spike = 9.0 if random.random() < 0.003 else 0.0
        writer.event(
            "step",
            step=step,
            loss=round(float(true_loss(step, steps, floor)) + noise, 5),
            lr=0.012 * min(1, step / (0.05 * steps)) * min(1, (1 - part) / 0.4 + 1e-9),
            grad_norm=round(float(0.4 + 2 * np.exp(-6 * part) + abs(random.normal(0, 0.08)) + spike), 4),
            weight=weight,
            tokens=step * weight,
            tokens_per_s=round(speed),
            mfu=round(0.42 * speed / rate, 4),
            elapsed_s=round(elapsed, 3),
            memory_bytes=1_310_000_000,
            epoch=round(step * weight / 8.4e6, 4),
            phases={"forward": 0.1, "backward": 0.19, "checkpoint": 0.0005},
        )
        if step in evaluations or (every > 1 and round(step / every) % max(1, steps // every // 12) == 0):
            loss = float(true_loss(step, steps, floor)) + 0.03
            best = min(best, loss)
            writer.event(
                "evaluation",
                step=step,
                split="validation",
                loss=round(loss, 4),
                bits_per_byte=round(loss / np.log(2) / 3.066, 4),
                tokens=65536,
                seconds=1.8,
                elapsed_s=round(elapsed, 3),
                best=loss == best,
                weights="raw",
            )
            for prompt, texts in WRITTEN.items():
                writer.event(
                    "sample",
                    step=step,
                    prompt=prompt,
                    elapsed_s=round(elapsed, 3),
                    text=texts[min(int(part * len(texts) * 0.999), len(texts) - 1)],
                )
    writer.event(
        "checkpoint",
        step=last,
        path=f"checkpoints/step-{last:06d}",
        bytes=24_900_000,
        seconds=0.4,
        reason="interval",
    )


def result(writer: Writer, bits: float, steps: int) -> None:
    writer.event(
        "result",
        split="test",
        bits_per_byte=bits,
        interval=[bits - 0.021, bits + 0.022],
        context=256,
        stride=256,
        weights="raw",
        baselines=[
            {
                "name": "byte 5-gram",
                "bits_per_byte": 1.951,
                "difference": round(bits - 1.951, 4),
                "interval": [round(bits - 1.951 - 0.018, 4), round(bits - 1.951 + 0.018, 4)],
            },
            {
                "name": "xz -9 per document",
                "bits_per_byte": 1.684,
                "difference": round(bits - 1.684, 4),
                "interval": [round(bits - 1.684 - 0.024, 4), round(bits - 1.684 + 0.025, 4)],
            },
        ],
        sources=[
            {"source": "library", "documents": 88, "bytes": 1_002_455, "bits_per_byte": bits - 0.06},
            {"source": "documentation", "documents": 37, "bytes": 438_000, "bits_per_byte": bits + 0.14},
        ],
    )
    writer.event(
        "end",
        step=steps,
        reason="done",
        elapsed_s=steps * 8192 / 28_000,
        peak_memory_bytes=1_402_000_000,
        energy_wh=2.71,
        energy_assumption="2 of 80 cores of a 400 W processor, fully busy, plus 15 % for memory",
    )


def finished(
    path: Path,
    *,
    steps: int = 1200,
    seed: int = 0,
    floor: float = 2.62,
    bits: float = 1.312,
    every: int = 1,
    **changes,
) -> RunDirectory:
    """A run that was killed at 60 % after a checkpoint at 50 %, resumed, skipped two steps, and finished."""
    writer = Writer(path, recipe(name="first", seed=seed, train__steps=steps, **changes))
    half = steps // 2 // every * every
    start(writer)
    preface(writer)
    train_steps(writer, every, round(steps * 0.6), steps, seed=seed, floor=floor, every=every)
    writer.lines.append('{"event": "step", "step": 7')  # torn by the kill
    writer.attempt = 2
    start(
        writer,
        half,
        ("/opt/venv/bin/dougong", "train", "--resume", "--run", "runs/first"),
        "checkpoints/half",
    )
    writer.event(
        "warning", message="the last attempt was killed; continuing from the newest valid checkpoint"
    )
    train_steps(
        writer,
        half + every,
        steps,
        steps,
        seed=seed + 1,
        floor=floor,
        every=every,
        skips=(round(steps * 0.7) // every * every, round(steps * 0.71) // every * every),
    )
    result(writer, bits, steps)
    return writer.finish()


def running(path: Path) -> RunDirectory:
    """Still on its way: no result, no end."""
    writer = Writer(path, recipe())
    start(writer)
    preface(writer)
    train_steps(writer, 1, 420, 1200)
    return writer.finish()


def gan(path: Path) -> RunDirectory:
    """Images: two losses, no tokens, no bits per byte."""
    writer = Writer(
        path,
        recipe(
            name="digits_gan",
            data={"kind": "digits"},
            tokenizer=None,
            model={"kind": "gan"},
            objective={"kind": "gan"},
        ),
    )
    start(writer, command=("dougong", "train", "digits_gan"))
    writer.event("data", facts={"examples": 1797, "split": {"train": 1437, "test": 360}})
    random = np.random.default_rng(3)
    for step in range(1, 301):
        writer.now += 0.05
        writer.event(
            "step",
            step=step,
            loss=1.4 + random.normal(0, 0.1),
            generator=0.8 + random.normal(0, 0.1),
            discriminator=0.6 + random.normal(0, 0.05),
            weight=64,
            elapsed_s=step * 0.05,
            lr=2e-4,
        )
    writer.event("end", step=300, reason="done", elapsed_s=15.0, peak_memory_bytes=410_000_000)
    return writer.finish()


def digits(path: Path) -> RunDirectory:
    """A classifier: accuracy instead of bits per byte, compared with scikit-learn's."""
    writer = Writer(
        path,
        recipe(
            name="digits_cnn",
            data={"kind": "digits"},
            tokenizer=None,
            model={"kind": "cnn"},
            objective={"kind": "classify"},
        ),
    )
    start(writer, command=("dougong", "train", "digits_cnn"))
    for step in range(1, 201):
        writer.now += 0.03
        writer.event(
            "step", step=step, loss=2.3 * np.exp(-step / 40) + 0.02, weight=64, elapsed_s=step * 0.03, lr=1e-3
        )
        if step % 25 == 0:
            writer.event(
                "evaluation",
                step=step,
                split="validation",
                loss=2.3 * np.exp(-step / 40) + 0.05,
                bits_per_byte=None,
                accuracy=1 - 0.9 * np.exp(-step / 40) - 0.006,
                seconds=0.1,
            )
    writer.event(
        "result",
        split="test",
        bits_per_byte=None,
        accuracy=0.989,
        baselines=[
            {"name": "random forest", "accuracy": 0.972, "difference": 0.017, "interval": [0.003, 0.031]},
            {"name": "linear SVM", "accuracy": 0.983, "difference": 0.006, "interval": [-0.006, 0.017]},
        ],
    )
    writer.event("end", step=200, reason="early stop", elapsed_s=6.0)
    return writer.finish()


def begun(path: Path) -> RunDirectory:
    """Killed before its first step."""
    writer = Writer(path, recipe())
    start(writer)
    return writer.finish()


def hostile(path: Path, payload: str) -> RunDirectory:
    """`payload` in every place where a run's own words reach the page."""
    writer = Writer(path, recipe(name="x", seed=0, data={"kind": payload}, tokenizer={"kind": payload}))
    start(writer, command=("dougong", "train", payload))
    writer.event("warning", message=payload)
    writer.event("derived", values=[{"key": payload, "value": payload, "reason": payload}])
    writer.event(
        "data",
        facts={
            "documents": 3,
            payload: payload,
            "skipped": {payload: {"count": 1, "examples": [payload]}},
            "duplicates": {payload: 2},
            "split": {"rule": payload, payload: {"documents": 1}},
            "packing": payload,
            "sources": [{"source": payload, "documents": 3, payload: 4}],
        },
    )
    writer.event(
        "model",
        parameters={"total": 5, payload: 5},
        flops_per_token=30,
        groups=[
            {"optimizer": payload, "names": [payload], "parameters": 5, "lr": 0.1, "weight_decay": payload}
        ],
    )
    for step in range(1, 30):
        writer.event(
            "step", step=step, loss=3.0 - step / 20, lr=0.1, elapsed_s=step, weight=1, **{payload: step}
        )
    writer.event("skip", step=9, reason=payload, count=1)
    writer.event("evaluation", step=20, split=payload, loss=2.0, bits_per_byte=1.5, weights=payload)
    writer.event("sample", step=20, prompt=payload, text=payload + payload)
    writer.event(
        "result",
        split=payload,
        bits_per_byte=1.4,
        weights=payload,
        context=payload,
        stride=payload,
        baselines=[{"name": payload, "bits_per_byte": 2.0}],
        sources=[{"source": payload, "bits_per_byte": 1.0}],
    )
    writer.event("end", step=29, reason=payload, energy_wh=1.0, energy_assumption=payload)
    return writer.finish()


if __name__ == "__main__":
    root = Path(sys.argv[1])
    finished(root / "first")
    finished(root / "first-wide", seed=5, floor=2.48, bits=1.247, model__dim=256, optim__lr=0.009)
    finished(root / "first-small", seed=7, floor=2.9, bits=1.44, model__dim=128)
    for seed in (1, 2, 3):
        finished(root / f"seed-{seed}", seed=seed, floor=2.62 + 0.004 * seed, bits=1.312 + 0.003 * seed)
    for make in (running, gan, digits, begun):
        make(root / make.__name__)

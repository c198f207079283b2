"""Rewards against flawed demonstrations: GRPO, and rejection sampling on as many samples.

    python benchmarks/grpo.py [--quick] [--json PATH] [--seeds N]

Task: digits to be sorted ("4071" → "0147", 4 to 6 of them). The base of about 0.1M parameters learns from
demonstrations of which four in ten are right; the others are in falling order or have two neighbours exchanged. It
copies their mixture, so about four in ten of its samples are right. Then the same number of samples of other lists is
drawn with each method, rewarded 1 where they are exactly right and 0 otherwise. Passed is measured on held-out lists
that neither has seen: of samples at temperature 1, which is what is trained, and of greedy replies. Asked: from 20 to
60 % passed to at least 95 %, and more than rejection sampling reaches; whatever comes out is printed.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import header, spread, write

from dougong.recipes.assemble import assemble, prepare_data
from dougong.recipes.derive import resolve
from dougong.recipes.recipe import load_recipe
from dougong.recipes.train import train_run
from dougong.train import fit
from dougong.train.hooks import aside

RUNTIME = "runtime={device: cpu, precision: fp32, threads: 1}"     # models this small do not fill a second one
MODEL = ("{kind: qwen3, dim: 64, num_layers: 2, num_heads: 2, num_kv_heads: 2, head_dim: 32, ffn_dim: 192, "
         "context: 64}")
RATES = {"grpo": 2e-4, "rejection": 2e-4}
MARKS = 10      # places of the curve


def lists(path: Path, count: int, *, seed: int, right: float, avoid: set[str]) -> Path:
    """Questions with answers, of which a share is right; none of `avoid`, to which they are added."""
    draw = random.Random(seed)
    lines = []
    while len(lines) < count:
        digits = [draw.choice("0123456789") for _ in range(draw.randint(4, 6))]
        asked = "".join(digits)
        if asked in avoid:
            continue
        avoid.add(asked)
        said = sorted(digits)
        if draw.random() >= right:
            place = draw.randrange(len(said) - 1)
            said = said[::-1] if draw.random() < 0.5 else [
                *said[:place], said[place + 1], said[place], *said[place + 2:]]
        lines.append(json.dumps({"question": asked, "answer": "".join(said)}))
    path.write_text("\n".join(lines) + "\n")
    return path


def base(folder: Path, demonstrations: Path, steps: int) -> Path:
    """The run that copies the demonstrations."""
    recipe, first = load_recipe("first", [
        "size=null", f"data={{kind: chats, path: {demonstrations}, row_tokens: 64}}", "sample.prompts=[]",
        "tokenizer={kind: bpe, vocab_size: 272}", f"model={MODEL}", "optim={kind: adamw, lr: 3e-3}",
        "schedule=cosine",
        f"train={{steps: {steps}, rows: 32, trackers: [], checkpoint_every: {steps}, evaluate_every: {steps}}}",
        RUNTIME])
    return train_run(recipe, first, path=folder / "base").directory.path


def reward(start: Path, tasks: Path, kind: str, seed: int, *, steps: int, rows: int) -> dict[str, Any]:
    """One run of a method: what it passed before, on the way and after."""
    recipe, _ = resolve(load_recipe("grpo", [
        f"start.path={start}", f"data={{kind: chats, path: {tasks}, fractions: [0.9, 0.05, 0.05]}}", f"seed={seed}",
        f"objective={{kind: {kind}, samples: 8, max_tokens: 10}}", f"optim.lr={RATES[kind]}",
        "schedule={kind: cosine, warmup: 0.02, floor: 0.1}",
        f"train={{steps: {steps}, rows: {rows}, micro_rows: {rows}}}", RUNTIME])[0])
    corpus = prepare_data(recipe)
    built = assemble(recipe, corpus)
    curve = [{"step": 0, **passed(built)}]
    begin = time.process_time()
    for result in fit(built.state, built.objective, built.runtime, built.recipe.train):
        if result.step % max(1, steps // MARKS) == 0:
            with aside(built.state):
                curve.append({"step": result.step, **passed(built),
                              "idle_groups": result.metrics["idle_groups"], "nll": result.metrics["nll"]})
    return {"seed": seed, "kind": kind, "samples": steps * rows, "cpu_seconds": time.process_time() - begin,
            "before": curve[0], "after": curve[-1], "curve": curve}


def passed(built: Any) -> dict[str, float]:
    """The share of held-out lists that are sorted rightly: eight samples of each of them, and greedily."""
    model, corpus, runtime = built.state.model, built.corpus, built.runtime
    greedy = corpus.score(model, runtime, "test")
    tasks = int(greedy["tasks"])
    drawn = corpus.loader("test", rows=8 * tasks, seed=1).batch(0)
    return {"sampled": float(drawn["passed"][0]), "greedy": greedy["pass_rate"], "tasks": tasks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed and a fifth of the steps")
    parser.add_argument("--json", help="write the report here")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    seeds, steps = (1, options.steps // 5) if options.quick else (options.seeds, options.steps)
    report = header()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["DOUGONG_CACHE"] = str(folder / "cache")
        seen: set[str] = set()
        demonstrations = lists(folder / "demonstrations.jsonl", 12_000, seed=1, right=0.4, avoid=seen)
        tasks = lists(folder / "tasks.jsonl", 3_000, seed=2, right=1.0, avoid=seen)
        start = base(folder, demonstrations, 300)
        runs = []
        for seed in range(seeds):
            for kind in ("grpo", "rejection"):
                runs.append(reward(start, tasks, kind, seed, steps=steps, rows=128))
                before, after = runs[-1]["before"], runs[-1]["after"]
                print(f"seed {seed} {kind:<10} sampled {before['sampled']:.1%} → {after['sampled']:.1%}, greedy "
                      f"{before['greedy']:.1%} → {after['greedy']:.1%} ({runs[-1]['samples']:,} samples, "
                      f"{runs[-1]['cpu_seconds']:.0f} s of processor)", flush=True)
    report["runs"] = runs
    for kind in ("grpo", "rejection"):
        mine = [run for run in runs if run["kind"] == kind]
        for how in ("sampled", "greedy"):
            report[f"{kind}_{how}"] = spread([run["after"][how] for run in mine])
            print(f"{kind:<10} {how:<8} {statistics.median(run['after'][how] for run in mine):.1%} "
                  f"({min(run['after'][how] for run in mine):.1%} to {max(run['after'][how] for run in mine):.1%})")
    report["before"] = spread([run["before"]["sampled"] for run in runs])
    write(options.json, report)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

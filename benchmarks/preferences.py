"""A planted preference: what DPO learns of it on pairs it has not seen, and what that costs of the text.

    python benchmarks/preferences.py [--run RUN] [--quick] [--json PATH] [--seeds N] [--steps N] [--text FILE]

Without `--run` (one of recipe `first`, say) a base of about 0.4M parameters learns a text (this Python installation's
library unless `--text` names another). Half of `--words` invented words ("lopu", "dizoka") are drawn to be preferred.
Each pair asks for one of two words, one of each half; held-out pairs join words that never stood in one pair. With
`--words-of text` the words are frequent ones of the text instead, which then has to lose with the words that are not
preferred. Accuracy is the share of held-out pairs whose preferred word has the larger log-probability: about half
before. Bits per byte are those of the text's validation split, before and after, on the same documents. Asked: at
least 90 % of the pairs, at less than 1 % more bits per byte; whatever comes out is printed. DPO, IPO and ORPO side by
side.
"""

import argparse
import json
import os
import random
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import header, spread, write

from dougong.evaluate import bits_per_byte
from dougong.objectives.preference import pair_log_probs
from dougong.recipes.assemble import assemble, prepare_data
from dougong.recipes.derive import resolve
from dougong.recipes.open_run import open_run
from dougong.recipes.recipe import load_recipe
from dougong.recipes.train import train_run
from dougong.train import fit

RUNTIME = "runtime={device: cpu, precision: fp32, threads: 1}"     # models this small do not fill a second one
MODEL = ("{kind: qwen3, dim: 96, num_layers: 3, num_heads: 3, num_kv_heads: 3, head_dim: 32, ffn_dim: 256, "
         "context: 128}")
OBJECTIVES = {"dpo": "{kind: dpo, beta: 1.0}", "ipo": "{kind: ipo, beta: 0.3, per_token: true}",
              "orpo": "{kind: orpo, beta: 1.0}"}
RATE = 1e-4
DOCUMENTS = 40      # of the validation split, on which bits per byte are measured


def base(folder: Path, text: str | None, steps: int) -> Path:
    """The run that knows the text and no preference."""
    recipe, first = load_recipe("first", [
        "size=null", *([f"data.path={text}"] if text else []), "tokenizer={kind: bpe, vocab_size: 512}",
        f"model={MODEL}",
        "optim={kind: adamw, lr: 3e-3}", "schedule=cosine", "sample.prompts=[]", "evaluate.baselines=false",
        f"train={{minutes: null, steps: {steps}, rows: 16, trackers: [], checkpoint_every: {steps}, "
        f"evaluate_every: {steps}}}", RUNTIME])
    return train_run(recipe, first, path=folder / "base").directory.path


def pairs(path: Path, words: list[str], seed: int, *, train: int, held_out: int) -> tuple[Path, Path]:
    """Two files of pairs, training and held out."""
    draw = random.Random(seed)
    shuffled = draw.sample(words, len(words))
    good, bad = shuffled[:len(words) // 2], shuffled[len(words) // 2:]
    if train + held_out > len(good) * len(bad):
        raise SystemExit(f"{len(words)} words make {len(good) * len(bad)} pairs; --pairs asks for {train + held_out}.")
    seen: set[tuple[str, str]] = set()
    while len(seen) < train + held_out:
        seen.add((draw.choice(good), draw.choice(bad)))
    lines = []
    for chosen, rejected in sorted(seen, key=lambda _: draw.random()):
        first, second = draw.sample([chosen, rejected], 2)
        lines.append(json.dumps({"prompt": f"<{first}|{second}>", "chosen": f" {chosen}", "rejected": f" {rejected}"}))
    paths = path.with_suffix(".train.jsonl"), path.with_suffix(".test.jsonl")
    for where, some in zip(paths, (lines[:train], lines[train:])):
        where.write_text("\n".join(some) + "\n")
    return paths


def frequent(documents: Any, count: int) -> list[str]:
    """The most frequent words of four to eight letters."""
    found: dict[str, int] = {}
    for document in documents:
        for word in re.findall(r"\b[a-z]{4,8}\b", document.text):
            found[word] = found.get(word, 0) + 1
    return sorted(found, key=lambda word: (-found[word], word))[:count]


def invented(documents: Any, count: int) -> list[str]:
    """Words of two or three syllables that no document holds."""
    draw, text, words = random.Random(0), "\n".join(document.text for document in documents), set[str]()
    while len(words) < count:
        word = "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(draw.choice((2, 3))))
        if word not in text:
            words.add(word)
    return sorted(words)


def section(path: Path, start: Path, kind: str, seed: int, *, steps: int = 1, rate: float = RATE) -> Any:
    recipe, _ = resolve(load_recipe("dpo", [
        f"start.path={start}", f"data={{kind: preferences, path: {path}, spelling: text, fractions: [1, 0, 0]}}",
        f"objective={OBJECTIVES[kind]}", f"optim.lr={rate}", f"seed={seed}",
        f"train={{epochs: null, steps: {steps}, rows: 32, micro_rows: 32}}", RUNTIME])[0])
    corpus = prepare_data(recipe)
    return assemble(recipe, corpus)


@torch.no_grad()
def accuracy(model: Any, corpus: Any) -> float:
    """The share of pairs whose preferred reply is the more probable one."""
    model.eval()
    logp = torch.cat([pair_log_probs(model, batch, 1 << 22)[0] for batch in corpus.all_batches(rows=64)])
    return float((logp[:, 0] > logp[:, 1]).double().mean())


def learn(start: Path, kind: str, files: tuple[Path, Path], opened: Any, seed: int, steps: int,
          rate: float) -> dict[str, Any]:
    """One objective, one seed."""
    documents = [opened.corpus.documents("validation")[i] for i in range(min(DOCUMENTS, len(
        opened.corpus.documents("validation"))))]
    built = section(files[0], start, kind, seed, steps=steps, rate=rate)
    held_out = section(files[1], start, kind, seed)
    model = built.state.model

    def measure() -> dict[str, float]:
        model.eval()
        text = bits_per_byte(model, opened.tokenizer, documents, context=128, runtime=built.runtime)
        return {"accuracy": accuracy(model, held_out.corpus), "bits_per_byte": text.bits_per_byte}

    before, begin = measure(), time.process_time()
    for _ in fit(built.state, built.objective, built.runtime, built.recipe.train):
        pass
    seconds, after = time.process_time() - begin, measure()
    return {"seed": seed, "kind": kind, "steps": steps, "cpu_seconds": seconds, "before": before, "after": after,
            "text_worse": after["bits_per_byte"] / before["bits_per_byte"] - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--json", help="write the report here")
    parser.add_argument("--run", type=Path, help="a trained run to begin from, instead of the base")
    parser.add_argument("--text", help="a file or folder of text for the base")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="of 32 pairs")
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--words", type=int, default=40)
    parser.add_argument("--words-of", choices=("invention", "text"), default="invention")
    parser.add_argument("--pairs", type=int, default=240, help="to train on; half as many are held out")
    parser.add_argument("--base-steps", type=int, default=250)
    options = parser.parse_args()
    report = header()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.run is None:
            os.environ["DOUGONG_CACHE"] = str(folder / "cache")
        start = options.run or base(folder, options.text, options.base_steps)
        opened = open_run(start)
        source = frequent if options.words_of == "text" else invented
        words = source(opened.corpus.documents("train"), options.words)
        runs = []
        for seed in range(1 if options.quick else options.seeds):
            files = pairs(folder / f"pairs-{seed}", words, seed, train=options.pairs, held_out=options.pairs // 2)
            for kind in OBJECTIVES:
                runs.append(learn(start, kind, files, opened, seed, options.steps, options.rate))
                run = runs[-1]
                print(f"seed {seed} {kind:<5} accuracy {run['before']['accuracy']:.1%} → "
                      f"{run['after']['accuracy']:.1%}, bits per byte {run['before']['bits_per_byte']:.4f} → "
                      f"{run['after']['bits_per_byte']:.4f} "
                      f"({run['text_worse']:+.2%}), {run['cpu_seconds']:.0f} s of processor", flush=True)
    report["runs"] = runs
    for kind in OBJECTIVES:
        mine = [run for run in runs if run["kind"] == kind]
        report[kind] = {"accuracy": spread([run["after"]["accuracy"] for run in mine]),
                        "text_worse": spread([run["text_worse"] for run in mine])}
        print(f"{kind:<5} accuracy {statistics.median(run['after']['accuracy'] for run in mine):.1%}, text "
              f"{statistics.median(run['text_worse'] for run in mine):+.2%}")
    write(options.json, report)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

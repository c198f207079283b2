"""A student alone, the same student taught, and its teacher: what part of the gap does distillation recover?

One teacher is trained on this Python's own library. Students of one shape are trained from scratch, seed by seed, alone
(the text's next token) and taught (the `distil` recipe): the same data in the same order, the same number of steps, the
same rate. In the first setting a student has all of the teacher's text, which it sees in part, and the teacher at hand;
in the second only a few documents of it, which it sees many times, and the teacher's likeliest tokens kept on disk: as
one who has little text of their own and a model of somebody who had more.
Each run's best checkpoint by its own validation text is scored on the teacher's test documents, which nobody was
trained on. Asked: at least half of the gap between the student alone and the teacher, at equal student steps.
"""

import argparse
import shutil
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import header, spread, write

from dougong.data.documents import DocumentView
from dougong.evaluate import Calibration, bits_per_byte
from dougong.models import count
from dougong.recipes.open_run import open_run
from dougong.recipes.recipe import load_recipe
from dougong.recipes.train import train_run

PACKAGES = ("asyncio", "collections", "concurrent", "ctypes", "email", "http", "idlelib", "importlib", "json",
            "logging", "multiprocessing", "tkinter", "unittest", "urllib", "xml")
FIXED = ["train.minutes=null", "train.trackers=[]", "sample.prompts=[]", "evaluate.baselines=false",
         "evaluate.split=validation", "runtime.precision=fp32", "runtime.threads=1", "runtime.compile=false"]
SHAPES = {   # widths, layers and heads given, so that the figures outlive changes of the size dial
    "1M": (160, 3, 2, 1, 64, 448), "300K": (96, 2, 3, 3, 32, 256), "100K": (64, 2, 2, 1, 32, 192)}
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"teacher": "1M", "student": "300K", "vocabulary": 1024, "teacher_steps": 1500, "student_steps": 600,
             "rows": 32, "bytes": 200_000, "scored_bytes": 400_000},
    "small": {"teacher": "300K", "student": "100K", "vocabulary": 512, "teacher_steps": 500, "student_steps": 300,
              "rows": 16, "bytes": 60_000, "scored_bytes": 60_000},
    "quick": {"teacher": "100K", "student": "100K", "vocabulary": 512, "teacher_steps": 60, "student_steps": 30,
              "rows": 8, "bytes": 30_000, "scored_bytes": 20_000}}
TAUGHT = ["objective.hard=0", "objective.temperature=1"]
TEACHER_IS = {"all the text": "objective.top_k=null", "little text": "objective.top_k=64"}


def shape(size: str) -> list[str]:
    """Overrides that make a model of this size."""
    names = ("dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim")
    return [f"size={size}", "model.previous_token_head=false",
            *(f"model.{name}={value}" for name, value in zip(names, SHAPES[size], strict=True))]


def library(folder: Path) -> Path:
    """Modules of this Python's own library, its tests and vendored data left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.glob("*.py")) + sorted(
        path for package in PACKAGES for path in (root / package).rglob("*.py") if "test" not in path.parts)
    folder.mkdir()
    for file in files:
        shutil.copy(file, folder / "-".join(file.relative_to(root).parts))
    return folder


def some_of(documents: DocumentView, size: int, folder: Path) -> Path:
    """Documents in a scattered order until they hold `size` bytes, each short enough that there are several."""
    folder.mkdir()
    held = 0
    for number in range(len(documents)):
        text = documents[number * 61 % len(documents)].text
        if held >= size:
            break
        if len(text.encode()) <= size / 5:
            (folder / f"{number:04d}.py").write_text(text)
            held += len(text.encode())
    return folder


def scored(path: Path, documents: list[Any]) -> dict[str, Any]:
    """Bits per byte and calibration of a run's best checkpoint on these documents."""
    opened, sure = open_run(path), Calibration()
    found = bits_per_byte(opened.model, opened.tokenizer, documents, context=opened.recipe.model.context,
                          runtime=opened.runtime, calibration=sure)
    told = sure.payload()
    return {"bits_per_byte": found.bits_per_byte, "step": opened.step,
            "parameters": count.parameters(opened.recipe.model)["total"],
            **{name: told[name] for name in ("error", "brier", "confidence", "accuracy")}}


def trained(name: str, path: Path, overrides: list[str]) -> float:
    """Trains a recipe into `path`; returns the seconds it took, evaluations included."""
    begin = time.perf_counter()
    asked, base = load_recipe(name, [*FIXED, *overrides])
    if (finished := train_run(asked, base, path=path)).reason != "done":
        raise SystemExit(f"{path.name} was stopped at step {finished.step}, so nothing is compared with it.")
    return time.perf_counter() - begin


def compare(folder: Path, name: str, text: Path, teacher: Path, plan: dict[str, Any], documents: list[Any],
            best: dict[str, Any], *, seeds: int, taught: list[str]) -> dict[str, Any]:
    """Students alone and taught on one text, seed by seed."""
    common = [*shape(plan["student"]), f"data.path={text}", f"model.vocab_size={plan['vocabulary']}",
              "model.context=128", f"train.rows={plan['rows']}", f"train.steps={plan['student_steps']}",
              f"evaluate.tokens={plan['scored_bytes'] // 3}", "data.split.fractions=[0.9,0.1,0.0]"]
    alone_is = ["objective={kind: causal_lm}", "tokenizer.kind=file", f"tokenizer.path={teacher / 'tokenizer'}"]
    rows = []
    for seed in range(seeds):
        row: dict[str, Any] = {"seed": seed}
        for who, changes in (("alone", alone_is), ("taught", [f"objective.teacher={teacher}", *taught])):
            path = folder / f"{name}-{who}-{seed}"
            seconds = trained("distil", path, [*common, *changes, f"seed={seed}"])
            row[who] = {**scored(path, documents), "seconds": seconds}
        gap = row["alone"]["bits_per_byte"] - best["bits_per_byte"]
        row["recovered"] = (row["alone"]["bits_per_byte"] - row["taught"]["bits_per_byte"]) / gap
        rows.append(row)
        print(f"{name}, seed {seed}: " + ", ".join(
            f"{who} {row[who]['bits_per_byte']:.4f} (error {row[who]['error']:.4f})" for who in ("alone", "taught"))
            + f", teacher {best['bits_per_byte']:.4f}: {row['recovered']:.0%} of the gap", flush=True)
    recovered = [row["recovered"] for row in rows]
    print(f"{name}: {statistics.mean(recovered):.0%} of the gap on average (asked: at least 50%)\n", flush=True)
    return {"rows": rows, "recovered": spread(recovered), "recovered_mean": statistics.mean(recovered)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny models, one seed: whether it runs")
    parser.add_argument("--size", choices=tuple(SETTINGS), default="full", help="of models, text and steps")
    parser.add_argument("--json", help="write the report here")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher", help="a run to learn from, instead of training one")
    parser.add_argument("--only", choices=("all the text", "little text"), help="one setting alone")
    parser.add_argument("--taught", nargs="*", default=TAUGHT, help="how the taught student differs (objective.…=…)")
    options = parser.parse_args()
    plan, seeds = SETTINGS["quick" if options.quick else options.size], 1 if options.quick else options.seeds
    report = {**header(), "plan": plan, "taught": options.taught}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        teacher = Path(options.teacher).absolute() if options.teacher else folder / "teacher"
        if not options.teacher:
            seconds = trained("first", teacher, [
                *shape(plan["teacher"]), f"data.path={library(folder / 'library')}", "model.context=128",
                f"tokenizer.vocab_size={plan['vocabulary']}", f"train.steps={plan['teacher_steps']}",
                f"train.rows={plan['rows']}", f"evaluate.tokens={plan['scored_bytes'] // 3}"])
            print(f"teacher: {plan['teacher_steps']} steps in {seconds / 60:.1f} minutes", flush=True)
        corpus = open_run(teacher).corpus
        held, documents = 0, []
        for document in corpus.documents("test"):
            if held < plan["scored_bytes"]:
                documents.append(document)
                held += len(document.text.encode())
        report["teacher"] = best = scored(teacher, documents)
        print(f"teacher: {best['parameters']:,} parameters, {best['bits_per_byte']:.4f} bits per byte of {held:,} "
              f"bytes, calibration error {best['error']:.4f}\n", flush=True)
        everything = folder / "everything"
        everything.mkdir()
        for number, document in enumerate(corpus.documents("train")):
            (everything / f"{number:04d}.py").write_text(document.text)
        texts = {"all the text": everything,
                 "little text": some_of(corpus.documents("train"), plan["bytes"], folder / "little")}
        for name, text in texts.items():
            if options.only in (None, name):
                report[name] = compare(folder, name.replace(" ", "-"), text, teacher, plan, documents, best,
                                       seeds=seeds, taught=[*options.taught, TEACHER_IS[name]])
    write(options.json, report)


if __name__ == "__main__":
    main()

"""What compression costs and gives: every way there is, on one run of recipe `first`, and the card that compares them.

    python benchmarks/compression.py [--run RUN] [--steps N] [--quick] [--keep DIR] [--json PATH]

Without --run a model is trained first (recipe `first`, its 5 minutes; quick: 30 steps). Everything is done by the
commands a user has, which are printed. Asked, in bits per byte on the test split: int8 at most 0.2 % worse; int4 by the
better of GPTQ and AWQ at most 2 %; training with rounded weights makes up for at least a third of what int4 lost; with
30 % of the parameters pruned and distilled back at most 3 %; files 3.5 (int8) and 6.5 (int4) times smaller, embedding
and all.

Training on helps by itself, so the run is also trained on for the same steps without rounding: what training for int4
makes up for is given against the original and against that control (`recovered_of_control`).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import header, write

STEPS = 150
FINE = ["schedule.kind=wsd", "schedule.warmup=0.05", "schedule.decay=0.9", "optim.lr=0.004", "optim.adamw_lr=0.0006"]
"""a fifth of the rates of a first training"""


def dougong(*arguments: object) -> dict[str, Any]:
    """Runs a command and returns its JSON."""
    words = ["dougong", *map(str, arguments)]
    print("$", " ".join(words), flush=True)
    done = subprocess.run([sys.executable, "-m", *words, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def begin(place: Path, run: Path | None, quick: bool) -> Path:
    """The run that all is made from, as `first` in a folder of its own."""
    original = place / "first"
    if run is not None:
        original.symlink_to(run.resolve())
        return original
    dougong("train", "first", "--run", original, *(["train.steps=30"] if quick else []))
    return original


def make(original: Path, steps: int) -> list[Path]:
    """Every variant, in the order of the table."""
    name = {what: original.with_name(f"first-{what}") for what in
            ("int8", "int4", "int4-gptq", "int4-awq", "on", "on-int4", "qat", "qat-int4", "pruned", "distilled",
             "distilled-int4")}
    dougong("compress", original, "--to", "int8", "--out", name["int8"])
    for method in ("rtn", "gptq", "awq"):
        out = name["int4" if method == "rtn" else f"int4-{method}"]
        dougong("compress", original, "--to", "int4", "--method", method, "--out", out)
    common = ["--model", original, f"train.steps={steps}", *FINE]
    dougong("train", "first", *common, "--run", name["on"])
    dougong("compress", name["on"], "--to", "int4", "--out", name["on-int4"])
    dougong("train", "first", *common, "adapt.kind=qat", "--run", name["qat"])
    dougong("compress", name["qat"], "--to", "int4", "--out", name["qat-int4"])
    dougong("compress", original, "--prune", 0.3, "--out", name["pruned"])
    dougong("train", "distil", "--model", name["pruned"], f"objective.teacher={original}", f"train.steps={2 * steps}",
            "schedule.kind=wsd", "schedule.warmup=0.05", "schedule.decay=0.9", "optim.lr=0.01", "optim.adamw_lr=0.0015",
            "--run", name["distilled"])
    dougong("compress", name["distilled"], "--to", "int4", "--method", "gptq", "--out", name["distilled-int4"])
    return list(name.values())


def judge(card: dict[str, Any]) -> dict[str, Any]:
    """What was asked beside what came."""
    original, *others = card["variants"]
    rows = {"first": original, **{row["name"].removeprefix("first-"): row for row in others}}
    bits = {name: row["bits_per_byte"] for name, row in rows.items()}
    best = min(("int4-gptq", "int4-awq"), key=lambda name: bits[name])
    lost = bits["int4"] - bits["first"]
    control = bits["on-int4"] - bits["on"]
    found = {
        "int8_worse": (rows["int8"]["relative"], "<=", 0.002),
        f"{best}_worse": (rows[best]["relative"], "<=", 0.02),
        "recovered": ((bits["int4"] - bits["qat-int4"]) / lost, ">=", 1 / 3),
        "recovered_of_control": ((bits["on-int4"] - bits["qat-int4"]) / control, ">=", 1 / 3),
        "pruned_parameters": (1 - rows["distilled"]["parameters"] / original["parameters"], ">=", 0.3),
        "distilled_worse": (rows["distilled"]["relative"], "<=", 0.03),
        "int8_smaller": (original["disk_bytes"] / rows["int8"]["disk_bytes"], ">=", 3.5),
        "int4_smaller": (original["disk_bytes"] / rows[best]["disk_bytes"], ">=", 6.5)}
    return {name: {"value": value, "asked": f"{sign} {limit:.4g}",
                   "met": value <= limit if sign == "<=" else value >= limit}
            for name, (value, sign, limit) in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, help="a run of recipe first; without it one is trained")
    parser.add_argument("--steps", type=int, help="of training on, with rounding and without; twice as many to distil")
    parser.add_argument("--keep", type=Path, help="an empty folder for the runs; default: a temporary one")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: no figure")
    parser.add_argument("--json", help="where the report goes")
    args = parser.parse_args()
    facts, steps = header(), args.steps or (4 if args.quick else STEPS)
    with tempfile.TemporaryDirectory() as temporary:
        place = args.keep or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        original = begin(place, args.run, args.quick)
        variants = make(original, steps)
        beside = [word for path in variants for word in ("--with", path)]
        card = dougong("compress", original, "--card", *beside, "--out", place / "card.html")
    print(f"\n{'variant':<22}{'bytes':>12}{'bits/weight':>12}{'bits/byte':>11}{'':>9}{'KL':>9}{'tok/s':>9}")
    for row in card["variants"]:
        divergence = "" if row["kl_mean"] is None else f"{row['kl_mean']:.4f}"
        print(f"{row['name']:<22}{row['disk_bytes']:>12,}{row['bits_per_weight']:>12.2f}{row['bits_per_byte']:>11.4f}"
              f"{100 * row['relative']:>+8.2f}%{divergence:>9}{row['tokens_per_s']['1']['median']:>9.0f}")
    asked = judge(card)
    for name, one in asked.items():
        print(f"{name:<24}{one['value']:>10.4f}   asked {one['asked']:<10} {'met' if one['met'] else 'NOT MET'}")
    write(args.json, {"benchmark": "compression", **facts, "quick": args.quick, "steps": steps, "asked": asked,
                      "card": card})
    sys.exit(0 if args.quick or all(one["met"] for one in asked.values()) else 1)


if __name__ == "__main__":
    main()

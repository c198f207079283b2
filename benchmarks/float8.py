"""What float8 costs in loss and gains in time: the same training with and without, side by side.

    python benchmarks/float8.py [--steps 300] [--seeds 3] [--json PATH] [KEY=VALUE]

Recipe `first` at size=464K (two layers of 128, 525K parameters, vocabulary 1,024) from the same first weights on the
same batches, `runtime.float8` on and off; each pair is one seed. What is told is the difference in bits per byte of
held-out text, both scored without float8, and the ratio of the seconds of a step. On a CPU the time says nothing about
a GPU, where float8 has hardware of its own; the loss does. KEY=VALUE changes the recipe (on a GPU: size=1B
runtime.precision=bf16).
"""

import argparse
import statistics
from typing import Any

from machine import header, write

from dougong.recipes import small_runs
from dougong.recipes.assemble import prepare_data
from dougong.recipes.derive import resolve
from dougong.recipes.recipe import load_recipe, with_values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    report = header()
    recipe, _ = load_recipe("first", ["train.minutes=null", f"train.steps={options.steps}", "size=464K",
                                      "evaluate.tokens=150000", *options.overrides])
    recipe, _ = resolve(recipe)
    corpus = prepare_data(recipe)
    pairs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        found = {}
        for float8 in (False, True):
            run = small_runs.train_small(with_values(recipe, {"seed": seed, "runtime.float8": float8}), corpus,
                                         recipe.size or "", options.steps)
            found["float8" if float8 else "without"] = {"bits_per_byte": run.bits_per_byte,
                                                        "seconds_per_step": run.seconds_per_step}
        pairs.append({"seed": seed, **found})
        loss, time = ([found[name][key] for name in ("without", "float8")] for key in ("bits_per_byte",
                                                                                      "seconds_per_step"))
        print(f"  seed {seed}: {loss[0]:.4f} bits per byte without, {loss[1]:.4f} with float8 "
              f"({loss[1] / loss[0] - 1:+.2%}); a step takes {time[1] / time[0]:.2f} times as long", flush=True)
    changes = [pair["float8"]["bits_per_byte"] / pair["without"]["bits_per_byte"] - 1 for pair in pairs]
    print(f"{options.steps} steps, {len(pairs)} seeds: median {statistics.median(changes):+.2%} bits per byte "
          f"({min(changes):+.2%} to {max(changes):+.2%})")
    write(options.json, {**report, "steps": options.steps, "pairs": pairs})


if __name__ == "__main__":
    main()

"""The same recipe under several seeds: is a difference larger than the luck of the draw?"""

from pathlib import Path
from typing import Any

from dougong.core.config import replace
from dougong.core.errors import ConfigError, DougongError
from dougong.recipes.recipe import Recipe, recipe_from_run
from dougong.recipes.train import train_run
from dougong.runtime.processes import from_first

_MEASURES = ("bits_per_byte", "accuracy", "frechet_distance", "loss")   # the first one that a result has


def train_seeds(asked: Recipe, base: Recipe, *, count: int, path: Path | None, out: Any,
                progress: Any) -> dict[str, Any]:
    """Trains `count` runs that differ in `seed` alone and prints mean, standard deviation and interval.

    What the first one derives and measures (size, steps, precision) is that of all. Raises DougongError where one is
    stopped, or ends without scores.
    """
    from rich.table import Table as Grid

    from dougong.evaluate import seed_spread

    path = path or Path("runs") / asked.name
    rows = []
    for seed in range(asked.seed, asked.seed + count):
        finished = train_run(replace(asked, seed=seed), base, path=path.with_name(f"{path.name}-seed{seed}"),
                             progress=progress)
        if finished.reason == "interrupted":
            raise DougongError(f"stopped in seed {seed}; the finished runs are kept.")
        result = from_first(finished.result)
        if result is None:
            raise ConfigError(f"{finished.directory.path} is done and has no score, as nothing is held out, so seeds "
                              "cannot be compared. Give its data a validation or test split.")
        asked, _ = recipe_from_run(finished.directory.recipe)
        rows.append({"seed": seed, "run": str(finished.directory.path), "result": result})
    measure = next(name for name in _MEASURES if name in rows[0]["result"])
    values = [row["result"][measure] for row in rows]
    spread = seed_spread(values)
    grid = Grid("seed", measure.replace("_", " "), "run", box=None, header_style="bold", pad_edge=False)
    for row, value in zip(rows, values):
        grid.add_row(str(row["seed"]), f"{value:.4f}", row["run"])
    out.print(grid)
    low, high = spread.interval or (float("nan"),) * 2
    out.print(f"mean [bold]{spread.mean:.4f}[/], standard deviation {spread.sd:.4f}, 95 % interval of the mean "
              f"{low:.4f} to {high:.4f} ({count} seeds)")
    return {"measure": measure, "mean": spread.mean, "sd": spread.sd, "interval": [low, high], "runs": rows}

"""Where the numbers of a run go besides its own log: TensorBoard, and W&B or MLflow where installed and asked
for."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dougong.core.errors import MissingExtraError
from dougong.train.config import Tracker

_NOT_MEASURES = ("event", "time", "attempt", "step", "best")


class Track(Protocol):
    """A listener of events that keeps scalars and texts by step."""

    def __call__(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_trackers(names: tuple[Tracker, ...], directory: Path, *, run_name: str, recipe: Mapping[str, Any],
                  step: int = 0) -> list[Track]:
    """Opens the named trackers; `step` is where this attempt begins. Raises MissingExtraError, before
    anything starts, for one that is not installed."""
    check_trackers(names)
    opened: list[Track] = []
    for name in names:
        if name == "tensorboard":
            opened.append(TensorBoard(directory, step=step))
        else:
            opened.append({"wandb": WandB, "mlflow": MLflow}[name](run_name, recipe, directory.parent))
    return opened


def check_trackers(names: tuple[Tracker, ...]) -> None:
    """Raises MissingExtraError for a tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(name, name, f"train.trackers={name}")


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a `step` or `evaluation` event as `train/loss`, `validation/bits_per_byte`; else
    nothing."""
    if record["event"] not in ("step", "evaluation"):
        return {}
    prefix = "train" if record["event"] == "step" else record.get("split", "validation")
    return {f"{prefix}/{key}": value for key, value in record.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and key not in _NOT_MEASURES}


class TensorBoard:
    """Scalars and samples as TensorBoard shows them; what a killed attempt wrote after `step` is hidden."""

    def __init__(self, directory: Path, *, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=step + 1 if step else None)

    def __call__(self, record: dict[str, Any]) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"], walltime=record["time"])
        if record["event"] == "sample":
            self._writer.add_text("sample", f"**{record['prompt']}**{record['text']}", record["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases; a resumed run continues the same one by name."""

    def __init__(self, run_name: str, recipe: Mapping[str, Any], directory: Path) -> None:
        import wandb  # type: ignore[import-not-found]

        self._run = wandb.init(project="dougong", id=run_name, name=run_name, config=dict(recipe),
                               resume="allow",
                               dir=str(directory))

    def __call__(self, record: dict[str, Any]) -> None:
        if values := scalars(record):
            self._run.log(values, step=record["step"])

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow, into whatever tracking store the environment names."""

    def __init__(self, run_name: str, recipe: Mapping[str, Any], directory: Path) -> None:
        import mlflow  # type: ignore[import-not-found]

        self._mlflow = mlflow
        mlflow.set_experiment("dougong")
        mlflow.start_run(run_name=run_name)
        mlflow.log_dict(dict(recipe), "recipe.json")

    def __call__(self, record: dict[str, Any]) -> None:
        if values := scalars(record):
            self._mlflow.log_metrics(values, step=record["step"])

    def close(self) -> None:
        self._mlflow.end_run()

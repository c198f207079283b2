"""A run on disk: the one directory that holds all that came of a recipe, readable without dougong."""

import re
from pathlib import Path
from shlex import quote

from dougong.core.errors import CheckpointError

_STEP = re.compile(r"step-(\d{6,})$")
_RUNS = "runs"
"""the folder in which runs are made unless told otherwise"""


class RunDirectory:
    """Paths inside a run.

    ```
    recipe.yaml  tokenizer/  events.jsonl  tensorboard/  checkpoints/step-000500/  report.html
    ```
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    recipe = property(lambda self: self.path / "recipe.yaml")
    tokenizer = property(lambda self: self.path / "tokenizer")
    events = property(lambda self: self.path / "events.jsonl")
    tensorboard = property(lambda self: self.path / "tensorboard")
    checkpoints = property(lambda self: self.path / "checkpoints")
    report = property(lambda self: self.path / "report.html")
    lock = property(lambda self: self.path / ".lock")

    def events_of(self, rank: int) -> Path:
        """The event log of one process: events.jsonl for the first, events-rank-00003.jsonl for the fourth."""
        return self.events if rank == 0 else self.path / f"events-rank-{rank:05d}.jsonl"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a checkpoint directory, ascending; says nothing about their validity."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(int(match[1]) for path in self.checkpoints.iterdir() if (match := _STEP.match(path.name)))

    @classmethod
    def create(cls, root: Path, name: str) -> "RunDirectory":
        """Makes `root/name`, or `root/name-2`, `-3`, … when it exists: a run is never overwritten."""
        for number in range(1, 10_000):
            path = root / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            return cls(path)
        raise CheckpointError(f"{root} holds 9,999 runs named {name!r}. Choose another name with --run.")

    @classmethod
    def open(cls, path: Path | str) -> "RunDirectory":
        """Opens an existing run. Raises CheckpointError saying what the path holds instead and which runs exist."""
        path = Path(path)
        if (path / "recipe.yaml").is_file():
            return cls(path)
        if not path.exists():
            parent = path.parent
            if str(path).count("/") == 1 and not parent.exists() and parent.name != _RUNS:     # as OWNER/NAME
                raise CheckpointError(f"no run at {path}. To fetch it from a hub: hf:{path}")
            siblings = sorted(p.parent.name for p in parent.glob("*/recipe.yaml")) if parent.is_dir() else []
            hint = f" Runs in {parent}: {', '.join(siblings[:12])}." if siblings else ""
            raise CheckpointError(f"no run at {path}.{hint}\nStart one with: "
                                  f"dougong train first --run {quote(str(path))}")
        raise CheckpointError(f"{path} is not a run: it has no recipe.yaml.")

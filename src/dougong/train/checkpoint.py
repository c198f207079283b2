"""Checkpoints: directories that are whole or do not count, readable by anything that reads safetensors and
JSON.

`checkpoints/step-000500/` holds model.safetensors, optimizer.safetensors, rng.safetensors, shadow.safetensors
(where an average is kept), state.json and, written last, manifest.json with size and SHA-256 of each. The
design and what it was weighed against: docs/design/checkpoints.md.
"""

import json
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import dougong
from dougong.core import files
from dougong.core.errors import CheckpointError
from dougong.core.run import RunDirectory
from dougong.train.safetensors_file import write_tensors
from dougong.train.state import TrainState

_FORMAT = 1


@dataclass(frozen=True)
class Found:
    """A checkpoint that passed its checks, and what was wrong with those passed over on the way to it."""

    path: Path | None
    step: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Saved:
    """What one save wrote."""

    step: int
    path: Path
    bytes: int
    seconds: float
    reason: str


def save_checkpoint(run: RunDirectory, state: TrainState, *, recipe_hash: str = "",
                    reason: str = "last") -> Saved:
    """Writes a checkpoint of `state` and returns when it is on disk. Raises DougongError on a full or
    read-only disk; what was there before stays."""
    return _write(run, _snapshot(state), recipe_hash, reason)


def latest_valid(run: RunDirectory) -> Found:
    """The newest checkpoint that passes all checks; path None if there is none."""
    return _first_valid(run, sorted(run.checkpoint_steps(), reverse=True))


def best_valid(run: RunDirectory) -> Found:
    """The checkpoint with the lowest validation loss among those that passed all checks (the newest of
    equals)."""
    losses = {step: loss for step in run.checkpoint_steps()
              if (loss := _manifest(run.checkpoint(step)).get("loss")) is not None}
    return _first_valid(run, sorted(losses, key=lambda step: (losses[step], -step)))


def load_checkpoint(path: Path, state: TrainState, *, recipe_hash: str = "") -> None:
    """Puts a checkpoint into `state`. Raises CheckpointError if it is damaged or of another recipe."""
    _refuse_damaged(path)
    made_with = _manifest(path).get("recipe", "")
    if recipe_hash and made_with and recipe_hash != made_with:
        raise CheckpointError(f"{path} was made with another recipe (hash {made_with[:12]}, this one "
                              f"{recipe_hash[:12]}).\nResume without overrides, or start a new run.")
    names = [p.stem for p in path.glob("*.safetensors")]
    tensors = {name: safetensors.torch.load_file(path / f"{name}.safetensors") for name in names}
    state.load_state_dict({"tensors": tensors, "json": json.loads((path / "state.json").read_text())})


def load_model_tensors(path: Path, *, weights: str = "raw") -> dict[str, torch.Tensor]:
    """Only the weights of a checkpoint: "raw", or "ema" for the average. Raises CheckpointError."""
    _refuse_damaged(path)
    file = path / {"raw": "model.safetensors", "ema": "shadow.safetensors"}[weights]
    if not file.exists():
        raise CheckpointError(f"{path} holds no average of the weights: its recipe had no train.ema. Use "
                              f"weights=raw.")
    return safetensors.torch.load_file(file)


def problems(path: Path) -> list[str]:
    """What is wrong with a checkpoint directory; empty if its manifest and every checksum hold."""
    manifest = _manifest(path)
    if not manifest:
        return [f"{path.name}: no readable manifest.json (writing was interrupted)"]
    found = []
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            found.append(f"{path.name}/{name}: missing")
        elif file.stat().st_size != expected["bytes"]:
            size = file.stat().st_size
            found.append(f"{path.name}/{name}: {size:,} bytes instead of {expected['bytes']:,}")
        elif files.sha256(file) != expected["sha256"]:
            found.append(f"{path.name}/{name}: its checksum does not match its content")
    return found


class Checkpointer:
    """Writes checkpoints in the background, one at a time, and removes those that are no longer kept.

    `save` copies the state (training may go on at once); `poll` returns finished saves and raises the error
    of a failed one; `wait` does so after the running one has ended.
    """

    def __init__(self, run: RunDirectory, *, recipe_hash: str = "", keep_last: int = 2,
                 keep_best: bool = True) -> None:
        self.run, self.recipe_hash = run, recipe_hash
        self.keep_last, self.keep_best = keep_last, keep_best
        self.last_step: int | None = None
        self._thread: threading.Thread | None = None
        self._finished: list[Saved | BaseException] = []
        remove_unfinished(run)

    def save(self, state: TrainState, reason: str) -> list[Saved]:
        """Starts a save, after the one before has ended; returns what has finished. Raises its error."""
        finished = self.wait()
        snapshot = _snapshot(state)
        self.last_step = state.step
        self._thread = threading.Thread(target=self._work, args=(snapshot, reason), name="checkpoint")
        self._thread.start()
        return finished

    def poll(self) -> list[Saved]:
        if self._thread and not self._thread.is_alive():
            return self.wait()
        return []

    def wait(self) -> list[Saved]:
        if self._thread:
            self._thread.join()
            self._thread = None
        finished, self._finished = self._finished, []
        for result in finished:
            if isinstance(result, BaseException):
                self.last_step = None
                raise result
        return finished  # type: ignore[return-value]

    def _work(self, snapshot: dict[str, Any], reason: str) -> None:
        try:
            self._finished.append(_write(self.run, snapshot, self.recipe_hash, reason))
            self._prune()
        except BaseException as error:
            self._finished.append(error)

    def _prune(self) -> None:
        steps = self.run.checkpoint_steps()
        whole = [step for step in steps if _manifest(self.run.checkpoint(step))]
        kept = set(whole[-self.keep_last:])
        losses = {step: loss for step in whole
                  if (loss := _manifest(self.run.checkpoint(step)).get("loss")) is not None}
        if self.keep_best and losses:
            kept.add(min(losses, key=lambda step: (losses[step], -step)))
        for step in steps:
            if step not in kept and whole and step < whole[-1]:
                shutil.rmtree(self.run.checkpoint(step), ignore_errors=True)


def remove_unfinished(run: RunDirectory) -> None:
    """Deletes what a killed save left behind (names that begin with a dot never count as checkpoints)."""
    for path in run.checkpoints.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _snapshot(state: TrainState) -> dict[str, Any]:
    """Copies of everything, so that the next step cannot change what is being written."""
    current = state.state_dict()
    tensors = {file: {name: t.detach().to("cpu", copy=True).contiguous() for name, t in group.items()}
               for file, group in current["tensors"].items()}
    return {"tensors": tensors, "json": json.loads(json.dumps(current["json"]))}


def _write(run: RunDirectory, snapshot: dict[str, Any], recipe_hash: str, reason: str) -> Saved:
    begin = time.perf_counter()
    values = snapshot["json"]
    final = run.checkpoint(values["step"])
    temporary = run.checkpoints / f".{final.name}"
    with files.explained_disk_errors(f"the checkpoint of step {values['step']}"):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            written = {f"{name}.safetensors": write_tensors(temporary / f"{name}.safetensors", tensors)
                       for name, tensors in snapshot["tensors"].items()}
            files.write_json(temporary / "state.json", values)
            written["state.json"] = {"sha256": files.sha256(temporary / "state.json"),
                                     "bytes": (temporary / "state.json").stat().st_size}
            best = values["best"] or {}
            files.write_json(temporary / "manifest.json", {
                "format": _FORMAT, "step": values["step"], "reason": reason, "recipe": recipe_hash,
                "loss": best.get("loss") if best.get("step") == values["step"] else None,
                "versions": {"dougong": dougong.__version__, "torch": torch.__version__}, "files": written})
            files.sync_directory(temporary)
            _replace_directory(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    size = sum(entry["bytes"] for entry in written.values())
    return Saved(values["step"], final, size, time.perf_counter() - begin, reason)


def _replace_directory(new: Path, final: Path) -> None:
    """Renames `new` to `final`; an older directory of that name (a damaged one) makes way."""
    old = final.with_name(f".{final.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    files.sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest, or {} if it is absent, torn or of a format this version does not know."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return {}
    known = isinstance(manifest, dict) and manifest.get("format") == _FORMAT
    return manifest if known and isinstance(manifest.get("files"), dict) else {}


def _refuse_damaged(path: Path) -> None:
    if wrong := problems(path):
        raise CheckpointError(f"{path} cannot be trusted:\n  " + "\n  ".join(wrong)
                              + "\nUse another checkpoint of the run; resuming picks the newest whole one "
                                "by itself.")


def _first_valid(run: RunDirectory, steps: list[int]) -> Found:
    wrong: list[str] = []
    for step in steps:
        found = problems(run.checkpoint(step))
        if not found:
            return Found(run.checkpoint(step), step, wrong)
        wrong += found
    return Found(None, 0, wrong)

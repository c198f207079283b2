"""Checkpoints: directories that are whole or do not count, readable by anything that reads safetensors and
JSON.

`checkpoints/step-000500/` holds model.safetensors, optimizer.safetensors, rng.safetensors, shadow.safetensors
(where an average is kept), state.json and, written last, manifest.json with size and SHA-256 of each. Several
processes write parts instead, model-00000-of-00004.safetensors and so on, and any number of processes in any layout
load either. The design and what it was weighed against: docs/design/checkpoints.md.
"""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from dougong.core import files
from dougong.core.errors import CheckpointError
from dougong.core.run import RunDirectory
from dougong.runtime.mesh import Mesh
from dougong.train.manifest import (
    PARTS,
    WHOLE,
    Found,
    Saved,
    best_first,
    check_files,
    first_valid,
    losses,
    publish,
    read_manifest,
    refuse_damaged,
    temporary,
    unnamed,
)
from dougong.train.parts import Stored
from dougong.train.peers import Peers
from dougong.train.safetensors_file import write_tensors
from dougong.train.sharded import Sharing, load_parts
from dougong.train.state import TrainState

__all__ = ["Checkpointer", "Found", "Saved", "best_valid", "latest_valid", "load_checkpoint", "load_model_tensors",
           "problems", "remove_unfinished", "save_checkpoint"]


def save_checkpoint(run: RunDirectory, state: TrainState, *, recipe_hash: str = "",
                    reason: str = "last", mesh: Mesh | None = None) -> Saved:
    """Writes a checkpoint of `state` and returns when it is on disk. Raises DougongError on a full or
    read-only disk, on every process of the mesh alike; what was there before stays."""
    writer = _Writer(run, recipe_hash, mesh, Peers.of(mesh))
    return writer.write(writer.snapshot(state), reason)


def latest_valid(run: RunDirectory, mesh: Mesh | None = None, *, weights_only: bool = False) -> Found:
    """The newest checkpoint that passes all checks, also one that a kill left without its name; path None if there is
    none. Processes of a mesh share the work and get the same answer. `weights_only`: what only training reads need not
    be whole."""
    peers = Peers.of(mesh)

    def newest_first() -> dict[int, Path]:
        found = unnamed(run) | {step: run.checkpoint(step) for step in run.checkpoint_steps()}
        return {step: found[step] for step in sorted(found, reverse=True)}

    return first_valid(peers.from_first(newest_first), peers, weights_only=weights_only)


def best_valid(run: RunDirectory, mesh: Mesh | None = None, *, weights_only: bool = False) -> Found:
    """The checkpoint with the lowest validation loss among those that passed all checks (the newest of
    equals)."""
    peers = Peers.of(mesh)
    steps = peers.from_first(lambda: best_first(losses(run)))
    return first_valid({step: run.checkpoint(step) for step in steps}, peers, weights_only=weights_only)


def load_checkpoint(path: Path, state: TrainState, *, recipe_hash: str = "", mesh: Mesh | None = None,
                    checked: bool = False) -> None:
    """Puts a checkpoint of any layout into `state`. Raises CheckpointError, on every process alike, if it is damaged
    (unless it was `checked` just now) or of another recipe."""
    peers = Peers.of(mesh)
    if not checked:
        refuse_damaged(path, peers)
    manifest = peers.from_first(lambda: read_manifest(path))
    made_with = manifest.get("recipe", "")
    if recipe_hash and made_with and recipe_hash != made_with:
        raise CheckpointError(f"{path} was made with another recipe (hash {made_with[:12]}, this one "
                              f"{recipe_hash[:12]}).\nResume without overrides, or start a new run.")
    if peers.size > 1 or manifest["format"] == PARTS:
        load_parts(path, manifest, state, peers, mesh or Mesh())
        return
    names = [p.stem for p in path.glob("*.safetensors")]
    tensors = {name: safetensors.torch.load_file(path / f"{name}.safetensors") for name in names}
    state.load_state_dict({"tensors": tensors, "json": json.loads((path / "state.json").read_text())})


def load_model_tensors(path: Path, *, weights: str = "raw", checked: bool = False) -> dict[str, torch.Tensor]:
    """Only the weights of a checkpoint, whole: "raw", or "ema" for the average. Raises CheckpointError, also for damage
    unless it was `checked` just now."""
    if not checked:
        refuse_damaged(path, Peers())
    group = {"raw": "model", "ema": "shadow"}[weights]
    stored = Stored(path, group)
    if not stored:
        raise CheckpointError(f"{path} holds no average of the weights: its recipe had no train.ema. Use "
                              f"weights=raw.")
    if read_manifest(path)["format"] == WHOLE:
        return safetensors.torch.load_file(path / f"{group}.safetensors")
    return {name: stored.read(name) for name in stored}


def problems(path: Path, mesh: Mesh | None = None, *, weights_only: bool = False) -> list[str]:
    """What is wrong with a checkpoint directory; empty if its manifest and every checksum hold."""
    return check_files(path, Peers.of(mesh), weights_only=weights_only)


class Checkpointer:
    """Writes checkpoints in the background, one at a time, and removes those that are no longer kept: all but the last
    `keep_last`, the best, every `keep_every`-th step, and while steps leap the last one before each of them.

    `save` copies the state (training may go on at once); `poll` returns finished saves and raises the error
    of a failed one; `wait` does so after the running one has ended. Processes of a mesh make one each, save at the
    same steps, and raise the error of any of them at the next `save` or `wait`, so that all stop at the same step.
    """

    def __init__(self, run: RunDirectory, *, recipe_hash: str = "", keep_last: int = 2,
                 keep_best: bool = True, keep_every: int | None = None, mesh: Mesh | None = None) -> None:
        self.run, self.recipe_hash, self.mesh = run, recipe_hash, mesh
        self.keep_last, self.keep_best, self.keep_every = keep_last, keep_best, keep_every
        self.last_step: int | None = None
        self._peers = Peers.apart(mesh)
        self._writer = _Writer(run, recipe_hash, mesh, self._peers, reuse=True)
        self._thread: threading.Thread | None = None
        self._finished: list[Saved | BaseException] = []
        if self._peers.first:
            remove_unfinished(run)

    def save(self, state: TrainState, reason: str) -> list[Saved]:
        """Starts a save, after the one before has ended; returns what has finished. Raises its error."""
        finished = self.wait()
        snapshot = self._writer.snapshot(state)
        self.last_step = state.step
        self._thread = threading.Thread(target=self._work, name="checkpoint",
                                        args=(snapshot, reason, state.spikes.leaps))
        self._thread.start()
        return finished

    def poll(self) -> list[Saved]:
        ended = self._thread is None or not self._thread.is_alive()
        failed = any(isinstance(result, BaseException) for result in self._finished)
        # threads end at different times: an error waits for the next step at which all processes meet
        return self.wait() if ended and not (failed and self._peers.size > 1) else []

    def wait(self, *, take: bool = True) -> list[Saved]:
        """Returns what is finished, after the running save has ended, and raises its error; unless it is to `take` it,
        the next call returns it again."""
        if self._thread:
            self._thread.join()
            self._thread = None
        finished = self._finished
        failed = next((result for result in finished if isinstance(result, BaseException)), None)
        self._finished = [] if take or failed else finished
        if failed:
            self.last_step = None
            raise failed
        return list(finished)  # type: ignore[arg-type]

    def keeps(self, step: int) -> bool:
        """Whether a checkpoint of this step is of those never removed."""
        return self.keep_every is not None and step % self.keep_every == 0

    def has_loss(self, step: int) -> bool:
        """Whether this step's checkpoint says that it was the best."""
        return self._peers.from_first(lambda: step in losses(self.run))

    def _work(self, snapshot: Any, reason: str, leaps: list[int]) -> None:
        try:
            self._finished.append(self._writer.write(snapshot, reason))
            if self._peers.first:
                self._prune(leaps)
        except BaseException as error:
            self._finished.append(error)

    def _prune(self, leaps: list[int]) -> None:
        steps = self.run.checkpoint_steps()
        whole = [step for step in steps if read_manifest(self.run.checkpoint(step))]
        kept = set(whole[-self.keep_last:]) | {step for step in whole if self.keeps(step)}
        for leap in leaps:
            kept.update([step for step in whole if step < leap][-1:])
        if self.keep_best:
            kept.update(best_first(losses(self.run))[:1])
        for step in steps:
            if step not in kept and whole and step < whole[-1]:
                shutil.rmtree(self.run.checkpoint(step), ignore_errors=True)


def remove_unfinished(run: RunDirectory) -> None:
    """Gives whole checkpoints that a kill left without their name that name again, and deletes what else a killed save
    left behind. Raises OSError, before anything is deleted, where one cannot be renamed."""
    for step, path in unnamed(run).items():
        path.rename(run.checkpoint(step))
        files.sync_directory(run.checkpoints)
    for path in run.checkpoints.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


class _Writer:
    """Copies a state, and writes the copy: whole tensors by one process, parts by several."""

    def __init__(self, run: RunDirectory, recipe_hash: str, mesh: Mesh | None, peers: Peers, *,
                 reuse: bool = False) -> None:
        self.run, self.recipe_hash = run, recipe_hash
        self._sharing = Sharing(mesh, peers) if mesh is not None and peers.size > 1 else None
        self._pinned: dict[Any, torch.Tensor] | None = {} if reuse and torch.cuda.is_available() else None

    def snapshot(self, state: TrainState) -> Any:
        """Copies of everything, so that the next step cannot change what is being written."""
        if self._sharing:
            snapshot = self._sharing.snapshot(state, self._copy)
        else:
            current = state.state_dict()
            tensors = {file: {name: self._copy((file, name), t.detach()) for name, t in group.items()}
                       for file, group in current["tensors"].items()}
            snapshot = {"tensors": tensors, "json": json.loads(json.dumps(current["json"]))}
        if self._pinned:
            torch.cuda.current_stream().synchronize()   # the copies were only begun
        return snapshot

    def _copy(self, key: Any, tensor: torch.Tensor) -> torch.Tensor:
        """On CUDA into page-locked memory, taken once: all copies are under way together."""
        if self._pinned is None or tensor.device.type != "cuda":
            return tensor.to("cpu", copy=True).contiguous()
        buffer = self._pinned.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._pinned[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return buffer.copy_(tensor, non_blocking=True)

    def write(self, snapshot: Any, reason: str) -> Saved:
        if self._sharing:
            return self._sharing.write(self.run, snapshot, recipe_hash=self.recipe_hash, reason=reason)
        return _write(self.run, snapshot, self.recipe_hash, reason)


def _write(run: RunDirectory, snapshot: dict[str, Any], recipe_hash: str, reason: str) -> Saved:
    begin = time.perf_counter()
    values = snapshot["json"]
    place = temporary(run, values["step"])
    with files.explained_disk_errors(f"the checkpoint of step {values['step']}"):
        try:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            written = {f"{name}.safetensors": write_tensors(place / f"{name}.safetensors", tensors)
                       for name, tensors in snapshot["tensors"].items()}
            publish(run, values, written, recipe_hash=recipe_hash, reason=reason)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
    size = sum(entry["bytes"] for entry in written.values())
    return Saved(values["step"], run.checkpoint(values["step"]), size, time.perf_counter() - begin, reason)

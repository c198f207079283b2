"""What makes a directory a checkpoint: the manifest, written last and renamed with it, and the checks before use."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import dougong
from dougong.core import files
from dougong.core.errors import CheckpointError
from dougong.core.run import RunDirectory
from dougong.train.peers import Peers

WHOLE, PARTS = 1, 2
"""formats: whole tensors written by one process, and parts written by several"""
_OF_TRAINING = ("optimizer", "rng")
"""files that begin so are read by training alone"""


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


def temporary(run: RunDirectory, step: int) -> Path:
    """Where a checkpoint is written: a name with a dot never counts as one."""
    return run.checkpoints / f".{run.checkpoint(step).name}"


def publish(run: RunDirectory, values: dict[str, Any], written: dict[str, dict], *, recipe_hash: str, reason: str,
            **more: Any) -> None:
    """Writes state.json and the manifest beside the tensors already written, then gives the directory its name."""
    place, final = temporary(run, values["step"]), run.checkpoint(values["step"])
    files.write_json(place / "state.json", values)
    written["state.json"] = {"sha256": files.sha256(place / "state.json"),
                             "bytes": (place / "state.json").stat().st_size}
    best = values["best"] or {}
    manifest = {
        "format": PARTS if more else WHOLE, "step": values["step"], "reason": reason, "recipe": recipe_hash,
        "loss": best.get("loss") if best.get("step") == values["step"] else None,
        "versions": {"dougong": dougong.__version__, "torch": torch.__version__}, **more, "files": written}
    files.write_json(place / "manifest.json", {**manifest, "sha256": _digest(manifest)})
    files.sync_directory(place)
    _replace_directory(place, final)


def _replace_directory(new: Path, final: Path) -> None:
    """Renames `new` to `final`; an older directory of that name (damaged, or gone back to) makes way. A kill between
    the renames leaves both without their name: `unnamed` finds them."""
    old = final.with_name(f".{final.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    files.sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def unnamed(run: RunDirectory) -> dict[int, Path]:
    """Whole checkpoints that a kill left without their name, by step; of a new one and the one it was to replace, the
    new."""
    found: dict[int, Path] = {}
    for path in sorted(run.checkpoints.glob(".step-*")):      # `.step-000500` before `.step-000500-old`
        step = read_manifest(path).get("step")
        if step is not None and not run.checkpoint(step).exists():
            found.setdefault(step, path)
    return found


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, or {} if it is absent, torn, changed or of a format this version does not know."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return {}
    known = isinstance(manifest, dict) and manifest.get("format") in (WHOLE, PARTS)
    return manifest if known and manifest.get("sha256") == _digest(manifest) else {}


def _digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of everything else in it: what vouches for the other files must itself be whole."""
    others = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def losses(run: RunDirectory) -> dict[int, float]:
    """Step -> validation loss of the checkpoints that were the best when they were saved."""
    return {step: loss for step in run.checkpoint_steps()
            if (loss := read_manifest(run.checkpoint(step)).get("loss")) is not None}


def best_first(found: dict[int, float]) -> list[int]:
    """Steps by loss, the newest of equals first."""
    return sorted(found, key=lambda step: (found[step], -step))


def check_files(path: Path, peers: Peers, *, weights_only: bool = False) -> list[str]:
    """What is wrong with a checkpoint directory: every byte of it read once, by its share of the processes.
    `weights_only`: what only training reads is passed over."""
    manifest = peers.from_first(lambda: read_manifest(path))
    if not manifest:
        return [f"{path.name}: no whole manifest.json (writing was interrupted, or it was damaged)"]
    # the largest file first, dealt out in turn: about equal work for each
    names = sorted((name for name in manifest["files"] if not (weights_only and name.startswith(_OF_TRAINING))),
                   key=lambda name: (-manifest["files"][name]["bytes"], name))
    mine = names[peers.rank::peers.size]
    wrong = peers.together(lambda: {name: text for name in mine if (text := _check(path / name, manifest, path.name))})
    found = {name: text for one in wrong for name, text in one.items()}
    return [found[name] for name in manifest["files"] if name in found]


def _check(file: Path, manifest: dict[str, Any], directory: str) -> str | None:
    expected = manifest["files"][file.name]
    if not file.is_file():
        return f"{directory}/{file.name}: missing"
    if (size := file.stat().st_size) != expected["bytes"]:
        return f"{directory}/{file.name}: {size:,} bytes instead of {expected['bytes']:,}"
    if files.sha256(file) != expected["sha256"]:
        return f"{directory}/{file.name}: its checksum does not match its content"
    return None


def refuse_damaged(path: Path, peers: Peers) -> None:
    if wrong := check_files(path, peers):
        raise CheckpointError(f"{path} cannot be trusted:\n  " + "\n  ".join(wrong)
                              + "\nUse another checkpoint of the run; resuming picks the newest whole one "
                                "by itself.")


def first_valid(candidates: Mapping[int, Path], peers: Peers, *, weights_only: bool = False) -> Found:
    """The first of these checkpoints, by step, that passes all checks. Every process brings the same."""
    wrong: list[str] = []
    for step, path in candidates.items():
        found = check_files(path, peers, weights_only=weights_only)
        if not found:
            return Found(path, step, wrong)
        wrong += found
    return Found(None, 0, wrong)

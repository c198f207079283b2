"""Checkpoints of several processes: each writes some of the parts it holds, and reads the parts it needs.

Who writes what is decided once, by process 0, from a list of what everyone holds: each part by one of its holders,
about equally many bytes each, whatever the layout made equal or different. After that a save costs the step a copy
to the CPU and one small message.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dougong.core import files
from dougong.core.errors import CheckpointError, DougongError
from dougong.core.run import RunDirectory
from dougong.runtime import seeds
from dougong.runtime.mesh import Mesh
from dougong.runtime.parts import local
from dougong.train.manifest import Saved, publish, temporary
from dougong.train.parts import Box, Part, Stored, box, write_parts
from dougong.train.peers import Peers
from dougong.train.shadow import moving
from dougong.train.state import TrainState, check, merge_optimizers, narrow_optimizer

Key = tuple[str, str]
"""group (model, optimizer, shadow, rng) and name"""
Holding = dict[Key, tuple[Box, tuple[int, ...], int]]
"""what a process holds: the part, shape of the whole, bytes"""
_RNG_BYTES = 1 << 14    # JSON of python's and numpy's generators fits; one length, so that what is held never changes


@dataclass(frozen=True)
class Task:
    """What one process writes, and whether it tells of its optimiser's groups (one of each pipeline stage does)."""

    keys: tuple[Key, ...]
    tells: bool


@dataclass(frozen=True)
class Snapshot:
    """What one process will write of one moment, copied."""

    tensors: dict[str, dict[str, tuple[Tensor, Box, tuple[int, ...]]]]
    values: dict[str, Any]
    tells: bool


class Sharing:
    """The task of this process in every save, decided again only when what somebody holds has changed."""

    def __init__(self, mesh: Mesh, peers: Peers) -> None:
        self.mesh, self.peers = mesh, peers
        self._held: tuple[Holding, list[str]] | None = None
        self._task = Task((), False)

    def snapshot(self, state: TrainState, copy: Any) -> Snapshot:
        """`copy(key, tensor)` brings a tensor to the CPU. All processes call this together, while no save goes on."""
        current = state.state_dict()
        tensors, values = current["tensors"], current["json"]
        tensors["rng"] = _rng_entry(self.mesh, tensors["rng"], values["rng"])
        values["rng"] = None
        live = {(group, name): tensor for group, named in tensors.items() for name, tensor in named.items()}
        self._settle(live, values)
        parts: dict[str, dict[str, Any]] = {}
        for key in self._task.keys:
            group, name = key
            at = self._held[0][key]     # type: ignore[index]
            parts.setdefault(group, {})[name] = (copy(key, local(live[key])), at[0], at[1])
        return Snapshot(parts, json.loads(json.dumps(values)), self._task.tells)

    def _settle(self, live: Mapping[Key, Tensor], values: dict[str, Any]) -> None:
        trained = [name for group in values["optimizer"]["groups"] for name in group["param_names"]]
        mine: list[tuple[Holding, list[str]]] = []

        def changed() -> bool:
            mine.append(({key: (box(t), tuple(t.shape), local(t).nbytes) for key, t in live.items()}, trained))
            return mine[0] != self._held

        if any(self.peers.together(changed)):
            everyone, tasks = self.peers.to_first(mine[0]), []
            self.peers.from_first(lambda: tasks.extend(share_out(everyone or [])))
            self._held, self._task = mine[0], self.peers.to_each(tasks)

    def write(self, run: RunDirectory, snapshot: Snapshot, *, recipe_hash: str, reason: str) -> Saved:
        """Every process writes its files; process 0 then names the whole. All return, or all raise what went wrong for
        one of them and leave nothing behind."""
        begin, step, peers = time.perf_counter(), snapshot.values["step"], self.peers
        place = temporary(run, step)
        try:
            peers.from_first(lambda: _empty(place))
            told = peers.together(lambda: self._write_own(place, snapshot))
            peers.from_first(lambda: self._publish(run, snapshot.values, told, recipe_hash, reason))
        except DougongError:
            if peers.first:     # everyone has stopped writing
                shutil.rmtree(place, ignore_errors=True)
            raise
        except RuntimeError as error:
            raise CheckpointError(f"the checkpoint of step {step} was not finished: a process was lost ({error}).\n"
                                  "Resume: the newest whole checkpoint is used.") from error
        size = sum(entry["bytes"] for written, _ in told for entry in written.values())
        return Saved(step, run.checkpoint(step), size, time.perf_counter() - begin, reason)

    def _write_own(self, place: Path, snapshot: Snapshot) -> tuple[dict[str, dict], dict[str, Any] | None]:
        with files.explained_disk_errors(f"a part of the checkpoint of step {snapshot.values['step']}"):
            number = f"{self.peers.rank:05d}-of-{self.peers.size:05d}"
            written = {f"{group}-{number}.safetensors": write_parts(place / f"{group}-{number}.safetensors", parts)
                       for group, parts in snapshot.tensors.items()}
        return written, snapshot.values["optimizer"] if snapshot.tells else None

    def _publish(self, run: RunDirectory, values: dict[str, Any], told: list[tuple[dict[str, dict], Any]],
                 recipe_hash: str, reason: str) -> None:
        values = {**values, "optimizer": merge_optimizers(groups for _, groups in told if groups)}
        with files.explained_disk_errors(f"the checkpoint of step {values['step']}"):
            publish(run, values, {name: entry for written, _ in told for name, entry in written.items()},
                    recipe_hash=recipe_hash, reason=reason, processes=self.peers.size, layout=str(self.mesh.layout))


def _empty(place: Path) -> None:
    with files.explained_disk_errors(f"the checkpoint {place}"):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)


def share_out(everyone: list[tuple[Holding, list[str]]]) -> list[Task]:
    """Each part of each tensor to one of the processes that hold it, the largest first to whoever has least so far.

    Raises CheckpointError where the parts of a tensor are not the whole.
    """
    holders: dict[Key, dict[Box, list[int]]] = {}
    about: dict[Key, tuple[tuple[int, ...], int]] = {}
    for rank, (held, _) in enumerate(everyone):
        for key, (part, whole, size) in held.items():
            about[key] = (whole, max(size, about.get(key, (whole, 0))[1]))
            holders.setdefault(key, {}).setdefault(part, []).append(rank)
    load, tasks = [0] * len(everyone), [[] for _ in everyone]
    for key in sorted(about, key=lambda key: (-about[key][1], key)):
        for part in _cover(key, about[key][0], holders[key]):
            rank = min(holders[key][part], key=lambda rank: (load[rank], rank))
            load[rank] += everyone[rank][0][key][2]
            tasks[rank].append(key)
    told: list[list[str]] = []
    tells = [names not in told and not told.append(names) for _, names in everyone]     # type: ignore[func-returns-value]
    return [Task(tuple(keys), bool(tell)) for keys, tell in zip(tasks, tells)]


def _cover(key: Key, whole: tuple[int, ...], parts: Mapping[Box, Any]) -> list[Box]:
    """Parts that hold every element once. Copies cut differently (a tied weight of two stages) are left out."""
    chosen = sorted(part for part in parts if math.prod(part[1]) or not math.prod(whole))
    if sum(math.prod(shape) for _, shape in chosen) != math.prod(whole):
        candidates, chosen = sorted(chosen, key=lambda part: (-math.prod(part[1]), part)), []
        for part in candidates:
            if not any(_overlap(part, other) for other in chosen):
                chosen.append(part)
    if sum(math.prod(shape) for _, shape in chosen) != math.prod(whole):
        raise CheckpointError(f"the parts of {key[0]} {key[1]} held by the processes do not make up its "
                              f"{tuple(whole)}: it cannot be saved.")
    return chosen[:1] if not math.prod(whole) else chosen


def _overlap(a: Box, b: Box) -> bool:
    return all(max(i, j) < min(i + n, j + m) for i, n, j, m in zip(a[0], a[1], b[0], b[1]))


def load_parts(path: Path, manifest: dict[str, Any], state: TrainState, peers: Peers, mesh: Mesh) -> None:
    """Puts any checkpoint into the state of any layout; each process reads the parts it needs. All load, or none does
    and all raise the same error."""
    model = moving(state.model)
    trained = {name: p for group in state.optimizer.param_groups
               for name, p in zip(group["param_names"], group["params"])}
    held = peers.everyone((list(model), list(trained)))
    elsewhere = {name for names, _ in held for name in names}
    elsewhere_trained = {name for _, names in held for name in names}

    def read() -> dict[str, Any]:
        stored = {group: Stored(path, group) for group in ("model", "optimizer", "shadow", "rng")}
        values = json.loads((path / "state.json").read_text())
        check(state, stored["model"], values, elsewhere=elsewhere, elsewhere_trained=elsewhere_trained)
        values["optimizer"] = narrow_optimizer(state.optimizer, values["optimizer"], elsewhere_trained)
        tensors = {"model": {name: stored["model"].part(name, own) for name, own in model.items()},
                   "optimizer": _optimizer_parts(stored["optimizer"], trained)}
        if state.shadow:
            tensors["shadow"] = {name: stored["shadow"].part(name, own) for name, own in state.shadow.tensors.items()}
        tensors["rng"], values["rng"] = _generators(stored["rng"], manifest, values, mesh)
        return {"tensors": tensors, "json": values}

    box_for_one: list[dict[str, Any]] = []
    peers.together(lambda: box_for_one.append(read()))      # everything is read and checked before anything changes
    peers.together(lambda: state.load_state_dict(box_for_one[0]))


def _optimizer_parts(stored: Stored, trained: Mapping[str, Tensor]) -> dict[str, Tensor | Part]:
    """Slots of the parameters that are here: the same part of them where they have its shape; counts are whole."""
    found: dict[str, Tensor | Part] = {}
    for key in stored:
        name, _, slot = key.rpartition("/")
        if name in trained:
            alike = slot != "step" and stored[key] == trained[name].shape
            found[key] = stored.part(key, trained[name]) if alike else stored.read(key)
    return found


def _place(mesh: Mesh) -> int:
    """Which of the readers of the same rows this is."""
    return mesh.rank("pipeline", "context", "tensor")


def _rng_entry(mesh: Mesh, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> dict[str, Tensor]:
    """This process's generators, under the number of its rows and its place among those that read the same."""
    text = json.dumps(values).encode().ljust(_RNG_BYTES)
    assert len(text) == _RNG_BYTES
    entry = {**tensors, "json": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    return {f"{mesh.data_rank}/{_place(mesh)}/{name}": tensor for name, tensor in entry.items()}


def _generators(stored: Stored, manifest: dict[str, Any], values: dict[str, Any],
                mesh: Mesh) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The generators with which this process goes on.

    In the layout of the checkpoint each process takes its own back. In another, the first reader of slice r of the
    batch takes what the first reader of slice r had. All others begin anew, each from its own seed, made of the first
    process's generator, the step and its place.
    """
    def entry(prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        found = {name.removeprefix(prefix): stored.read(name) for name in stored if name.startswith(prefix)}
        return (found, json.loads(bytes(found.pop("json").tolist()))) if found else None

    here = f"{mesh.data_rank}/{_place(mesh)}/"
    if values["rng"] is not None:       # written by one process, as it is
        first = {name: stored.read(name) for name in stored}, values["rng"]
        own = first if here == "0/0/" else None
    else:
        first = entry("0/0/")
        own = entry(here) if _place(mesh) == 0 or manifest["layout"] == str(mesh.layout) else None
    if own:
        return own
    assert first is not None
    digest = int.from_bytes(hashlib.sha256(bytes(first[0]["torch"].tolist())).digest()[:8], "little")
    before = seeds.rng_state()
    seeds.seed_all(seeds.derive(digest, "rng", values["step"], here))
    fresh = seeds.rng_state()
    seeds.set_rng_state(before)
    return {name: fresh.pop(name) for name in ("torch", "cuda") if name in fresh}, fresh

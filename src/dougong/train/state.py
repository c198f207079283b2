"""Everything that training changes, in one place that can be saved and put back."""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dougong.core.errors import CheckpointError
from dougong.data.batch import Batch
from dougong.runtime import seeds
from dougong.train.parts import Part, fill, placed_like
from dougong.train.shadow import Shadow, moving
from dougong.train.spikes import Rewind, Spikes


class Loader(Protocol):
    """What the loop asks of a source of batches: endless, and able to return to any place."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainState:
    """Model, optimiser, loader, lagged copy, random numbers, and the counters of the run.

    `step` and `tokens` count what was done, `elapsed_s` is training time over all attempts, `skips` the
    skipped steps in a row, `best` the lowest validation loss with its step and the evaluations since
    (`waited`), `evaluated` the step last evaluated, `window` the sums of steps not yet logged, `spikes` what is known
    of losses and norms so far. `stop` names the reason for which training ends after this step, and is the same on all
    processes; `asked_to_stop` is what a signal asked of this one, and the loop makes a stop of it that all agree on.
    `rewind` is set by the loop when it has to go back (train/rewind.py). None of the three is saved.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Callable[[int], float],
                 loader: Loader, shadow: Shadow | None = None) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.loader, self.shadow = loader, shadow
        self.step = self.tokens = self.skips = self.evaluated = 0
        self.elapsed_s = 0.0
        self.best: dict[str, Any] | None = None
        self.window: dict[str, float] = {}
        self.spikes = Spikes()
        self.stop: str | None = None
        self.asked_to_stop = False
        self.rewind: Rewind | None = None

    def let_go(self) -> None:
        """Frees all that takes memory, when training is over; the counters stay."""
        for name in ("model", "optimizer", "schedule", "loader", "shadow"):
            setattr(self, name, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def state_dict(self) -> dict[str, Any]:
        """`tensors`: file -> name -> tensor (the live ones); `json`: all the rest as JSON values."""
        optimizer_tensors, optimizer_json = _flatten_optimizer(self.optimizer)
        rng = seeds.rng_state()
        tensors = {"model": {name: t.detach() for name, t in moving(self.model).items()},
                   "optimizer": optimizer_tensors,
                   "rng": {name: rng.pop(name) for name in ("torch", "cuda") if name in rng}}
        counters = {name: getattr(self, name) for name in _COUNTERS}
        json = {**counters, "optimizer": optimizer_json, "loader": self.loader.state_dict(), "rng": rng,
                "shadow": None, "spikes": self.spikes.state_dict()}
        if self.shadow:
            shadow = self.shadow.state_dict()
            tensors["shadow"] = shadow["tensors"]
            json["shadow"] = {"updates": shadow["updates"]}
        return {"tensors": tensors, "json": json}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned, of a divided tensor also a `Part`. Raises CheckpointError, before
        anything changes, if it is of another model, optimiser or averaging.

        From the CPU, as tensors are read, the device needs room for one of them beside what training holds.
        """
        tensors, json = state["tensors"], state["json"]
        check(self, tensors["model"], json)
        load_weights(self.model, tensors["model"])
        said = narrow_optimizer(self.optimizer, json["optimizer"])
        self.optimizer.state.clear()    # what takes its place might not fit beside it
        self.optimizer.load_state_dict(_unflatten_optimizer(self.optimizer, tensors["optimizer"], said))
        if self.shadow:
            self.shadow.load_state_dict({"updates": json["shadow"]["updates"], "tensors": tensors["shadow"]})
        self.loader.load_state_dict(json["loader"])
        for name in _COUNTERS:
            setattr(self, name, json[name])
        if "spikes" in json:
            self.spikes.load_state_dict(json["spikes"])
        seeds.set_rng_state({**json["rng"], **tensors["rng"]})


_COUNTERS = ("step", "tokens", "skips", "evaluated", "elapsed_s", "best", "window")


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor | Part], own: dict[str, Tensor] | None = None) -> None:
    """Copies tensors (whole, placed like the model's, or parts) into a model by name: into `own` of its tensors, else
    into all that move. Raises CheckpointError naming what is missing, unknown or misshapen."""
    own = moving(model) if own is None else own
    _same_tensors("model", own, shapes(tensors))
    for name, tensor in own.items():
        fill(tensor, tensors[name])


def check(state: TrainState, saved: Mapping[str, Any], json: dict[str, Any], *, elsewhere: Iterable[str] = (),
          elsewhere_trained: Iterable[str] = ()) -> None:
    """Raises CheckpointError where a checkpoint with these model tensors (or their shapes) is of another model,
    optimiser or averaging. `elsewhere`: names of tensors, and of trained parameters, that other processes hold."""
    _same_tensors("model", moving(state.model), shapes(saved), elsewhere)
    if (state.shadow is not None) != (json["shadow"] is not None):
        raise CheckpointError("the checkpoint was made " + ("without" if state.shadow else "with")
                              + " an average of the weights (train.ema). Resume with the recipe it was made "
                                "with.")
    narrow_optimizer(state.optimizer, json["optimizer"], elsewhere_trained)


def narrow_optimizer(optimizer: torch.optim.Optimizer, json: dict[str, Any],
                     elsewhere: Iterable[str] = ()) -> dict[str, Any]:
    """What a checkpoint says of an optimiser's parameters, in the order of its groups. Raises CheckpointError where it
    is another class, has parameters that nobody here has, or had apart in groups what is together here."""
    home = {name: number for number, group in enumerate(json["groups"]) for name in group["param_names"]}
    own = [group["param_names"] for group in optimizer.param_groups]
    names = {name for group in own for name in group}
    homes = [{home.get(name) for name in group} for group in own]
    # groups that agree in every setting are one group where stages were put together
    apart = {(min(map(str, one)), _settings(group)) for one, group in zip(homes, optimizer.param_groups)}
    if (json["class"] != type(optimizer).__name__ or home.keys() != names.union(elsewhere)
            or any(len(one) > 1 for one in homes) or len({one for one, _ in apart}) < len(apart)):
        raise CheckpointError(f"the checkpoint's optimiser is {json['class']} with "
                              f"{len(json['groups'])} parameter "
                              f"groups, this one is {type(optimizer).__name__} with {len(own)}.\n"
                              "Resume with the recipe the checkpoint was made with.")
    groups = [{**json["groups"][home[group[0]]], "param_names": group} for group in own]
    values = {key: value for key, value in json["values"].items() if key.rpartition("/")[0] in names}
    return {**json, "groups": groups, "values": values}


def _settings(group: dict[str, Any]) -> str:
    return str(sorted((key, value) for key, value in group.items() if key not in ("params", "param_names")))


def merge_optimizers(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What is said of one optimiser by processes that hold different parameters: groups of equal settings are one."""
    groups: dict[str, dict[str, Any]] = {}
    values: dict[str, Any] = {}
    kind = ""
    for part in parts:
        kind = part["class"]
        values |= part["values"]
        for group in part["groups"]:
            merged = groups.setdefault(_settings(group), {**group, "param_names": []})
            merged["param_names"] += [name for name in group["param_names"] if name not in merged["param_names"]]
    return {"class": kind, "groups": list(groups.values()), "values": values}


def shapes(tensors: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Shapes of the whole tensors, of whatever part of them is here."""
    return {name: value if isinstance(value, torch.Size) else value.shape for name, value in tensors.items()}


def _same_tensors(what: str, own: dict[str, Tensor], saved: dict[str, torch.Size],
                  elsewhere: Iterable[str] = ()) -> None:
    lines = [f"missing: {name}" for name in own.keys() - saved.keys()]
    lines += [f"unknown: {name}" for name in saved.keys() - own.keys() - set(elsewhere)]
    lines += [f"{name}: {tuple(saved[name])} in the checkpoint, {tuple(own[name].shape)} here"
              for name in own.keys() & saved.keys() if own[name].shape != saved[name]]
    if lines:
        shown = "\n  ".join(sorted(lines)[:8]) + (f"\n  … and {len(lines) - 8} more" if len(lines) > 8
                                                  else "")
        raise CheckpointError(f"the checkpoint's {what} is not this one:\n  {shown}\n"
                              "Open it with the recipe it was made with.")


def _flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors as `parameter/slot`; hyperparameters and other values as JSON."""
    tensors: dict[str, Tensor] = {}
    groups, values = [], {}
    for group in optimizer.param_groups:
        groups.append({key: list(value) if isinstance(value, tuple) else value
                       for key, value in group.items() if key != "params"})
        for name, parameter in zip(group["param_names"], group["params"]):
            for slot, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{slot}"] = value
                elif value is not None:
                    values[f"{name}/{slot}"] = value
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "values": values}


def _unflatten_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor | Part],
                         json: dict[str, Any]) -> dict[str, Any]:
    """torch's own index-keyed form, in the order of this optimiser's parameters."""
    parameters = {name: p for group in optimizer.param_groups for name, p in zip(group["param_names"], group["params"])}
    numbers = {name: number for number, name in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {}
    for key, value in (tensors | json["values"]).items():
        name, _, slot = key.rpartition("/")
        state.setdefault(numbers[name], {})[slot] = _settled(value, parameters[name], slot)
    groups = []
    for own, saved in zip(optimizer.param_groups, json["groups"]):
        restored = {key: tuple(value) if isinstance(own.get(key), tuple) else value for key,
                    value in saved.items()}
        groups.append({**restored, "params": [numbers[name] for name in saved["param_names"]]})
    return {"state": state, "param_groups": groups}


def _settled(value: Any, parameter: Tensor, slot: str) -> Any:
    """A slot in memory that nobody else has, copied once at most: what was read is nobody's, a live state's is its own.
    On the parameter's device, but for counts of steps: torch knows where those belong."""
    if isinstance(value, Part):
        return placed_like(parameter, value)
    if not isinstance(value, Tensor):
        return value
    moved = value if slot == "step" else value.to(parameter.device)
    return moved.clone() if moved is value else moved
